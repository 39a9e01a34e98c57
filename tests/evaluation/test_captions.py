import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation.captions import caption_metrics, text_statistics

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


def test_input_that_cannot_be_scored():
    with pytest.raises(DataError, match="0 captions"):
        caption_metrics({}, REFERENCES)
    with pytest.raises(DataError, match="2 of 3 captions have no reference, such as those of cow, pig"):
        caption_metrics({"cat": "a cat", "cow": "a cow", "pig": "a pig"}, {**REFERENCES, "pig": []})
