"""Captions against references, without images: nothing of this needs Ray or a model."""

import json

import pytest

from finecap_ray.config import EvaluationSettings, Settings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.evaluate import evaluate_texts
from finecap_ray.evaluation.present import as_json, as_markdown, as_tables
from finecap_ray.evaluation.text_metrics import text_metrics

REFERENCES = {"annotations": [{"image_id": 1, "caption": "A dog runs."}, {"image_id": 2, "caption": "A cat."}]}
JUDGES = """
class Negation:
    def contradiction(self, premises, hypotheses):
        return [float(("no" in a.split()) != ("no" in b.split())) for a, b in zip(premises, hypotheses)]

class Sees:
    def faithful(self, images, captions):
        return [float(image == caption.encode()) for image, caption in zip(images, captions)]
"""


def settings(**evaluation) -> Settings:
    return Settings(evaluation=EvaluationSettings(java_metrics=(), **evaluation))


@pytest.fixture
def files(tmp_path):
    def write(captions, references=REFERENCES) -> tuple[str, str]:
        paths = tmp_path / "captions.json", tmp_path / "references.json"
        for path, tree in zip(paths, (captions, references), strict=True):
            path.write_text(json.dumps(tree))
        return str(paths[0]), str(paths[1])

    return write


def test_results_of_cocos_forms(files):
    results = evaluate_texts(settings(), *files([{"image_id": 1, "caption": "a dog runs"}]))
    assert results["caption_metrics"]["Bleu_1"] == pytest.approx(1.0) and results["images"] == 1
    assert results["left_out"] == {"references without a caption": 1}
    assert "no images were given" in results["warnings"][0] and results["retrieval"] == []
    assert {"seed", "settings", "versions", "scorers", "tokenisation"} <= results.keys()
    assert json.loads(as_json(results))["references"].endswith("references.json")
    assert "no images were given" in as_markdown(results) and len(as_tables(results)) > 2


def test_the_first_of_several_captions_is_scored_and_that_is_said(files):
    results = evaluate_texts(settings(), *files({"1": ["a dog runs", "x"], "2": ["a cat"], "3": ["no reference"]}))
    assert results["caption_metrics"]["Bleu_1"] == pytest.approx(1.0)
    assert results["left_out"] == {"captions without a reference": 1}
    assert results["warnings"][1].startswith("1 of 2 images have several captions")


def test_ids_that_do_not_meet_are_shown(files):
    with pytest.raises(DataError, match=r"none of the 1 captions .*'COCO_1\.jpg' there and '1' here"):
        evaluate_texts(settings(), *files({"COCO_1.jpg": "a dog"}))


def test_aspects_and_judges_of_faithfulness(files, tmp_path, monkeypatch):
    aspects = tmp_path / "FineCapEval.csv"
    aspects.write_text("image,caption,background,object,relation\n1.jpg,x,grass,dog,runs\n")
    (tmp_path / "judges_of_mine.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    evaluation = {"finecapeval": str(aspects), "nli_judge": "judges_of_mine:Negation"}
    evaluation["vlm_judge"] = "judges_of_mine:Sees"
    results = evaluate_texts(settings(**evaluation), *files({"1": "a dog runs", "2": "no cat"}))
    assert results["caption_metrics"]["finecapeval_object"] == 1 and results["caption_metrics"]["NLI"] == 0  # 1 and -1
    assert results["caption_metrics"]["finecapeval_background"] == 0
    assert results["not_available"] == {"VLM": "no images were given"}
    captions = {"1": "bright", "2": "bright"}
    with_images = text_metrics(settings(**evaluation).evaluation, captions, {}, {"1": b"bright", "2": b"dark"})
    assert with_images.values["VLM"] == 1 / 2
    assert with_images.not_available == {"metrics against references": "no image has a human caption"}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("nli", "is MODULE:CLASS, got 'nli'"),
        ("no_such_module_here:Nli", "no judge of faithfulness .* No module named"),
        ("json:Nli", "no judge of faithfulness 'json:Nli': module 'json' has no attribute"),
        ("collections:Counter", "collections:Counter has no method contradiction"),
    ],
)
def test_judges_that_are_none(files, judge, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_texts(settings(nli_judge=judge), *files({"1": "a dog"}))
