import json
import math
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from finecap_ray.errors import DataError
from finecap_ray.evaluation.captions import caption_metrics, reference_metrics, text_statistics

PHOTOS = Path(os.environ.get("FINECAP_PHOTOS", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.photos
def test_published_scores_of_coco_captions():
    table = PHOTOS / "metrics" / "coco_test_gptj.parquet"
    if not table.exists():
        pytest.skip(f"{table} is absent: set FINECAP_PHOTOS to the folder that holds metrics/")
    rows = pq.read_table(table).to_pylist()
    published = json.loads(table.with_suffix(".published.json").read_text())
    metrics = caption_metrics(
        {row["image_id"]: row["caption"] for row in rows},
        {row["image_id"]: row["references"] for row in rows},
        tokenisation="keep_punctuation",
    )
    assert {name: metrics[name] for name in published} == pytest.approx(published, abs=1e-4)


WORDS = [
    *("a", "the", "dog", "cat", "man", "red", "runs", "on", "of", "in", "and", "with", "grass", "street"),
    "café",
    "naïve",
    "日本",
    "ñandú",
    "x" * 40,
]


def random_text(rng: random.Random) -> str:
    """Words that are tokens as they are: none, one, some, repeated, or very many."""
    kind = rng.randrange(6)
    if kind == 0:
        return ""
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2:
        return " ".join([rng.choice(WORDS)] * rng.randint(2, 30))
    return " ".join(rng.choices(WORDS, k=400 if kind == 3 and rng.random() < 0.05 else rng.randint(2, 15)))


def test_random_caption_sets_score_as_pycocoevalcap_does():
    """1,000 sets of 3 images, with raw text on its side: its own tokens are what stands between spaces."""
    rng = random.Random(0)
    worst = 0.0
    for _ in range(1000):
        candidates = {str(image): random_text(rng) for image in range(3)}
        references = {key: [random_text(rng) for _ in range(rng.randint(1, 3))] for key in candidates}
        single = {key: [text] for key, text in candidates.items()}
        bleu, _ = Bleu(4).compute_score(references, single, verbose=0)
        expected = [*bleu, Rouge().compute_score(references, single)[0], Cider().compute_score(references, single)[0]]
        ours = reference_metrics(candidates, references, "coco")
        found = [ours[name] for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")]
        worst = max(worst, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
    assert worst <= 1e-6


REFERENCES = {"cat": ["A black cat sleeps.", "A cat is asleep."], "dog": ["A dog runs.", "A brown dog runs fast."]}


def test_a_reference_as_caption_scores_full():
    metrics = caption_metrics({image_id: texts[0] for image_id, texts in REFERENCES.items()}, REFERENCES)
    assert metrics["Bleu_1"] == pytest.approx(1.0)
    assert metrics["ROUGE_L"] == pytest.approx(1.0)
    assert metrics["CIDEr"] > 4  # 10 for each reference that is matched, about half of them are


def test_bleu_and_rouge_by_hand():
    # "a dog sleeps": 2 of 3 words, 1 of 2 pairs ("a dog") are in the reference of 3 words: no brevity penalty
    metrics = caption_metrics({"dog": "A dog sleeps"}, {"dog": ["a dog runs"]})
    assert metrics["Bleu_1"] == pytest.approx(2 / 3)
    assert metrics["Bleu_2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert metrics["ROUGE_L"] == pytest.approx(2 / 3)  # longest common subsequence 2, precision = recall = 2 / 3
    assert metrics["CIDEr"] == 0  # one image: every n-gram is in all documents


def test_punctuation_counts_only_when_it_is_kept():
    candidates, references = {"dog": "a cat."}, {"dog": ["a dog."]}
    assert caption_metrics(candidates, references)["Bleu_1"] == pytest.approx(1 / 2)
    assert caption_metrics(candidates, references, "keep_punctuation")["Bleu_1"] == pytest.approx(2 / 3)


def test_references_of_other_images_change_nothing():
    candidates = {"cat": "a cat", "dog": "a dog"}
    more = {**REFERENCES, "cow": ["a cow is a cat"]}
    assert caption_metrics(candidates, more) == caption_metrics(candidates, REFERENCES)


def test_text_statistics_by_hand():
    metrics = text_statistics(["A dog and a dog.", "a cat  ", "A dog"])
    # words: a dog and a dog | a cat | a dog: 9, distinct a, dog, and, cat: 4
    assert metrics["distinct_1"] == pytest.approx(4 / 9)
    # pairs: a-dog dog-and and-a a-dog | a-cat | a-dog: 6, distinct 4
    assert metrics["distinct_2"] == pytest.approx(4 / 6)
    assert metrics["vocabulary"] == 4
    assert metrics["mean_length"] == pytest.approx(9 / 3)
    assert metrics["repeated_words"] == pytest.approx(2 / 9)  # the second "a" and the second "dog"
    assert metrics["trailing_space"] == pytest.approx(1 / 3)
    assert metrics["full_stop"] == pytest.approx(1 / 3)


def test_captions_without_text():
    metrics = caption_metrics({"cat": "", "dog": " . "}, REFERENCES)
    assert metrics["CIDEr"] == metrics["distinct_1"] == metrics["distinct_2"] == metrics["mean_length"] == 0
    assert metrics["ROUGE_L"] == 0
    assert metrics["Bleu_1"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())


def test_nothing_is_printed(capsys):
    caption_metrics({"dog": "a dog"}, REFERENCES)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({"a": ["a cat"]}, {"a": ["a cat"]}, "the caption of a is list, not a text"),
        ({"a": float("nan")}, {"a": ["a cat"]}, "the caption of a is float, not a text"),
        ({"a": "a cat"}, {"a": "a cat"}, "the references of a are no list of texts: 'a cat'"),
        ({"a": "a cat"}, {"a": ["a cat", None]}, "the references of a are no list of texts"),
        ({7: "a cat"}, {"7": ["a cat"]}, "1 of 1 captions have no reference, such as those of 7"),
    ],
)
def test_what_is_no_text_is_not_scored(candidates, references, message):
    with pytest.raises(DataError, match=message):
        caption_metrics(candidates, references)


def test_input_that_cannot_be_scored():
    with pytest.raises(DataError, match="0 captions"):
        caption_metrics({}, REFERENCES)
    with pytest.raises(DataError, match="2 of 3 captions have no reference, such as those of cow, pig"):
        caption_metrics({"cat": "a cat", "cow": "a cow", "pig": "a pig"}, {**REFERENCES, "pig": []})
