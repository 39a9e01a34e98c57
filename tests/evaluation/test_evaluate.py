"""A checkpoint and captions files through vLLM, Ray Data and two scorers, on 60 emoji."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.config import EvaluationSettings, Settings, dump_settings, load_settings
from finecap_ray.errors import ConfigError, DataError, UnsupportedError
from finecap_ray.evaluation.evaluate import Request, default_scorers, evaluate, find_all_pools
from finecap_ray.evaluation.present import as_json, as_markdown, as_tables
from finecap_ray.evaluation.sample import DecodingSpec, caption_images, check_left_out, parse_decoding
from finecap_ray.records import EXAMPLE_SCHEMA

pytestmark = pytest.mark.timeout(900)  # an engine starts in 15 s on 2 quiet cores, and in minutes on busy ones

IMAGES = 24
EVALUATION = {"against": ("random:6", "all"), "bootstrap_samples": 100, "java_metrics": (), "groups": {"test": "test"}}


@pytest.fixture(scope="module")
def settings(emoji, resources, tmp_path_factory):
    columns = (emoji.image_ids, emoji.images, emoji.captions, ["test"] * len(emoji.images))
    examples = pa.table([list(column) for column in columns], schema=EXAMPLE_SCHEMA).slice(0, IMAGES)
    path = tmp_path_factory.mktemp("examples") / "examples.parquet"
    pq.write_table(examples, path)
    return Settings.model_validate(
        {
            "data": {"examples": str(path)},
            "tower": {"image_size": 64},
            "evaluation": EVALUATION,
            "resources": resources.model_dump() | {"samplers": 1},
        }
    )


def changed(settings, **evaluation) -> Settings:
    tree = settings.evaluation.model_dump() | evaluation
    return settings.model_copy(update={"evaluation": EvaluationSettings.model_validate(tree)})


def request(tmp_path, captions: dict | None = None, **change) -> Request:
    file = None
    if captions is not None:
        file = tmp_path / "captions.json"
        file.write_text(json.dumps(captions))
    return Request(
        **{"captions": file and str(file), "checkpoint": None, "splits": None, "judge": None, "reward_scorer": None}
        | change
    )


def row(results, captions: str, by: str, against: str) -> dict:
    (found,) = [
        own for own in results["retrieval"] if (own["captions"], own["by"], own["against"]) == (captions, by, against)
    ]
    return found


@pytest.fixture(scope="module")
def captions_out(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "captions.json"


@pytest.fixture(scope="module")
def of_checkpoint(ray_session, settings, captioner_folder, judge_folder, scorer_folder, tmp_path_factory, captions_out):
    asked = request(
        tmp_path_factory.mktemp("none"),
        captions_out=str(captions_out),
        checkpoint=str(captioner_folder),
        judge=str(judge_folder),
        reward_scorer=str(scorer_folder),
    )
    return evaluate(settings, asked)


def test_a_checkpoint_is_captioned_and_judged(of_checkpoint, judge_folder):
    results = of_checkpoint
    assert results["images"] == IMAGES and results["warnings"] == []
    for by in ("judge", "reward scorer"):
        for whose in ("evaluated", "human"):
            found = row(results, whose, by, "6 random images")
            assert (
                0 <= found["recall_at_1"]["low"] <= found["recall_at_1"]["value"] <= found["recall_at_1"]["high"] <= 1
            )
            assert (found["pools"], found["chance"]) == (4, 1 / 6)
    assert row(results, "evaluated", "judge", f"all {IMAGES} images")["n"] == IMAGES
    assert 0 <= results["caption_metrics"]["ended"] <= 1
    assert {"CIDEr", "Bleu_4", "object_precision", "vocabulary"} <= results["caption_metrics"].keys()
    assert {"CLIPScore", "RefCLIPScore", "truncated"} <= results["similarity"]["judge"].keys()
    assert results["scorers"]["judge"]["digest"] != results["scorers"]["reward scorer"]["digest"]
    assert results["versions"]["finecap-ray"] and results["seed"] == 0 and results["settings"]["evaluation"]


def test_the_captions_of_a_checkpoint_are_kept_as_they_can_be_read_again(of_checkpoint, captions_out, settings):
    again = evaluate(settings, Request(str(captions_out), None, None, None, None))
    assert again["images"] == IMAGES
    assert (
        again["caption_metrics"] | {"ended": of_checkpoint["caption_metrics"]["ended"]}
        == of_checkpoint["caption_metrics"]
    )


def test_every_human_caption_is_a_candidate_of_its_own(of_checkpoint, emoji):
    found = row(of_checkpoint, "human", "judge", f"all {IMAGES} images")
    assert found["n"] == sum(len(own) for own in emoji.captions[:IMAGES]) > IMAGES


def test_results_as_json_markdown_and_tables(of_checkpoint):
    assert json.loads(as_json(of_checkpoint)) == json.loads(json.dumps(of_checkpoint))
    markdown = as_markdown(of_checkpoint)
    assert "| captions | by | against |" in markdown and "6 random images" in markdown
    assert f"digest {of_checkpoint['scorers']['judge']['digest']}" in markdown and "tokenisation coco" in markdown
    assert len(as_tables(of_checkpoint)) > 2


def test_a_captions_file_with_the_judge_that_rewarded_is_warned_of(
    ray_session, settings, judge_folder, emoji, tmp_path
):
    captions = {key: own[0] for key, own in zip(emoji.image_ids[:8], emoji.captions, strict=False)}
    bags = tmp_path / "bags.json"
    # the third bag has two images without captions here: they compete, and aren't asked about
    bags.write_text(json.dumps([emoji.image_ids[:3], emoji.image_ids[3:6], emoji.image_ids[7:10], ["gone", "i"]]))
    asked = request(tmp_path, captions, judge=str(judge_folder), reward_scorer=str(judge_folder))
    results = evaluate(changed(settings, against=(f"bags:{bags}",), tokenisation="keep_punctuation"), asked)
    assert "the judge is the reward scorer" in results["warnings"][0]
    assert results["left_out"] == {"bags with an image that isn't there": 1}
    # the first human caption of each image, judged as the captions and among the human ones
    assert row(results, "evaluated", "judge", "bags of 3")["n"] == 3 + 3 + 1
    assert results["caption_metrics"]["Bleu_1"] == pytest.approx(1.0)
    assert results["tokenisation"] == "keep_punctuation" and results["captioner"] is None


def test_without_a_judge_there_is_a_warning_and_no_retrieval(ray_session, settings, emoji, tmp_path):
    results = evaluate(settings, request(tmp_path, {key: ["a", "b"] for key in emoji.image_ids[:8]}))
    assert "no judge was given" in results["warnings"][0] and results["retrieval"] == []
    assert "**warning**: no judge was given" in as_markdown(results)


def test_best_of_n_is_the_most_probable_sample_and_images_that_cannot_be_read_are_counted(
    of_checkpoint, captions_out, settings, captioner_folder, emoji
):
    """Of samples at a temperature near 0 each is the greedy caption."""
    ids = emoji.image_ids[:7]
    arguments = (str(captioner_folder), settings.tower, DecodingSpec(3, 0.01), settings.resources)
    best = caption_images(ids, [*emoji.images[:6], b"broken"], *arguments, 0, batch_size=4, max_bad_fraction=0.5)
    greedy = json.loads(captions_out.read_text())
    assert list(best.captions) == ids[:6] and best.left_out == {"undecodable": 1}
    assert best.captions == {image_id: greedy[image_id] for image_id in ids[:6]}


@pytest.mark.parametrize(("bad", "max_bad_fraction"), [(1, 0.1), (7, 1.0)])
def test_too_many_images_without_a_caption_are_an_error(bad, max_bad_fraction):
    check_left_out(Counter(undecodable=1), 7, 0.15)
    with pytest.raises(
        DataError, match=rf"{bad} of 7 images can't be captioned \(undecodable\), more than data.max_bad"
    ):
        check_left_out(Counter(undecodable=bad), 7, max_bad_fraction)


def test_decodings():
    assert parse_decoding("best:8", 0.7) == DecodingSpec(8, 0.7)
    with pytest.raises(ConfigError, match="'best' is unknown"):
        parse_decoding("best", 0.7)
    with pytest.raises(UnsupportedError, match="captions greedily, or takes the best of N"):
        parse_decoding("beam:5", 0.7)


def test_requests_and_files_that_do_not_fit(settings, tmp_path):
    with pytest.raises(ConfigError, match="either captions"):
        evaluate(settings, request(tmp_path))
    with pytest.raises(DataError, match="no image of"):
        evaluate(settings, request(tmp_path, {"gone": "a cat"}))


def test_a_run_on_other_images_lends_no_judge(tmp_path):
    settings = load_settings("demo", [f"run_dir={tmp_path}"])
    for name in ("judge", "scorer"):
        (tmp_path / name).mkdir()
    assert default_scorers(settings, None) == (None, None)  # no run has been here
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    assert default_scorers(settings, None) == (str(tmp_path / "judge"), str(tmp_path / "scorer"))
    other = load_settings("demo", [f"run_dir={tmp_path}", "data.examples=photos"])
    assert default_scorers(other, None) == (None, None)


def test_two_files_of_bags_are_told_apart_and_what_each_leaves_out_is_counted(tmp_path):
    rows = [{"image_id": name} for name in "abcd"]
    for name, bags in (("one", [["a", "b"], ["a", "x"], ["y", "b"]]), ("two", [["c", "d"], ["c", "z"]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(bags))
    files = [f"bags:{tmp_path / name}.json" for name in ("one", "two")]
    settings = load_settings("demo", [f"evaluation.against={json.dumps(files)}"])
    sets, left_out = find_all_pools(settings, rows, [])
    assert [own.name for own in sets] == [f"{file}: bags of 2" for file in files]
    assert list(left_out.values()) == [3]


def test_a_group_has_a_name_of_its_own():
    for groups in ("{whole: test}", "{}"):
        with pytest.raises(ConfigError, match="none of them `whole`"):
            load_settings("demo", [f"evaluation.groups={groups}"])
