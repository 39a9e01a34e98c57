"""`finecap caption`: of files, ranked or not, to the terminal or to a file."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from finecap_ray.caption_images import CaptionRequest, caption_files, check_images, image_files, write_captions
from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.captioning import open_checkpoint, sampling_spec
from finecap_ray.config import CaptionerSettings, EvaluationSettings, Settings, TowerSettings
from finecap_ray.errors import ConfigError, DataError, UnsupportedError
from finecap_ray.images import decode_image
from finecap_ray.sampling.beam import check_beam
from finecap_ray.scorers import load_scorer

ROWS = [
    {"image": "a.png", "captions": ["a dog", "a «cat»"], "logprobs": [-1.5, -2.0], "scores": [0.5, 0.25]},
    {"image": "b.png", "captions": ["a hat"], "logprobs": [-0.5], "scores": None},
]


@pytest.fixture
def folder(emoji, tmp_path):
    """Six images, one of them in a subfolder, and a text."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for row, image in enumerate(emoji.images[:6]):
        (tmp_path / "images" / ("more" if row == 5 else "") / f"{row}.webp").write_bytes(image)
    (tmp_path / "images" / "notes.txt").write_text("nothing to see")
    return tmp_path / "images"


@pytest.fixture
def settings(resources, tower):
    """Four images at a time, one engine."""
    return Settings(
        tower=TowerSettings(image_size=tower.image_size),
        resources=resources.model_copy(update={"samplers": 1}),
        evaluation=EvaluationSettings(batch_size=4),
    )


def test_a_folder_is_its_images(folder, tmp_path):
    names = [path.removeprefix(str(folder)) for path in image_files([str(folder)])]
    assert names == ["/0.webp", "/1.webp", "/2.webp", "/3.webp", "/4.webp", "/more/5.webp"]
    assert image_files(["x.png"]) == ["x.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in"):
        image_files([str(tmp_path / "empty")])


def test_files_that_are_no_images_are_named_before_anything_starts(folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"2 of 3 files(?s:.*)bad\.png(?s:.*)missing\.png"):
        check_images([str(folder / "0.webp"), str(bad), str(tmp_path / "missing.png")])


def test_captions_are_ranked_by_the_scorer_and_files_that_are_no_images_are_named_at_the_end(
    ray_session, settings, captioner_folder, scorer_folder, folder, emoji, tmp_path
):
    """All of 8 samples, the one closest to its image first; 2 of 8 files can't be read, and 2 % may be bad."""
    paths, broken = image_files([str(folder)]), tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    request = CaptionRequest(n=8, best=8, scorer=str(scorer_folder))
    rows = caption_files([str(broken), *paths, "missing.png"], str(captioner_folder), settings, request)
    found = [next(rows) for _ in paths]
    with pytest.raises(DataError, match=r"2 of 8 files .* \(1 undecodable, 1 unreadable\)(?s:.*)broken\.png"):
        next(rows)
    assert [row["image"] for row in found] == paths
    scorer = load_scorer(scorer_folder)
    for row, image in zip(found, scorer.embed_images(emoji.images[:6]), strict=True):
        assert len(set(row["captions"])) == len(row["captions"]) == len(row["logprobs"]) > 3
        assert row["scores"] == sorted(row["scores"], reverse=True) and max(row["logprobs"]) < 0
        np.testing.assert_allclose(row["scores"], scorer.embed_texts(row["captions"]) @ image, atol=1e-5)


def test_beams_are_those_of_transformers(ray_session, settings, folder, emoji, tmp_path):
    """Of a tiny image-text model: the two best texts of a beam of four."""
    save_tiny("qwen2_5_vl", tmp_path / "vlm")
    model, processor = load_captioner(tmp_path / "vlm")
    family, paths = family_of(model.config, processor), image_files([str(folder)])[:2]
    found = list(caption_files(paths, str(tmp_path / "vlm"), settings, CaptionRequest(n=2, max_tokens=6, beam=4)))
    for image, row in zip(emoji.images[:2], found, strict=True):
        inputs = family.process(decode_image(image))
        with torch.no_grad():
            beams = model.generate(**inputs, num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=6)
        texts = processor.tokenizer.batch_decode(beams[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["captions"] == list(dict.fromkeys(texts))[:2]  # two beams may read alike


def test_a_captioner_says_no_more_than_it_was_trained_to_unless_asked(settings, tmp_path):
    """However much room its context has."""
    save_tiny("qwen2_5_vl", tmp_path / "start")
    model, processor = load_captioner(tmp_path / "start", CaptionerSettings(max_tokens=3))
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    facts = open_checkpoint(str(tmp_path / "vlm"), settings.tower).facts
    assert (facts.trained_tokens, sampling_spec(1, None, None, facts).max_tokens) == (3, 3)
    assert facts.max_tokens > 100 and sampling_spec(1, None, 100, facts).max_tokens == 100


def test_beams_that_can_not_be_are_refused():
    check_beam(10, "image")
    with pytest.raises(ConfigError, match="from 2 to 10 captions wide"):
        check_beam(11, "image")
    with pytest.raises(UnsupportedError, match="beam search takes token prompts only"):
        check_beam(4, "features")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"best": 4, "beam": 4}, "give one of them"),
        ({"beam": 4, "temperature": 0.5}, "samples nothing"),
        ({"n": 5, "best": 4}, "n=5 captions can't be kept of 4"),
        ({"scorer": "ViT-B-32/openai"}, "nothing to choose from"),
    ],
)
def test_what_excludes_each_other_is_refused(request_, message):
    with pytest.raises(ConfigError, match=message):
        CaptionRequest(**request_).check()


def test_rows_are_written_as_they_come_and_the_file_appears_when_it_is_whole(tmp_path):
    parquet, lines = tmp_path / "captions.parquet", tmp_path / "captions.jsonl"
    assert write_captions(iter(ROWS), parquet) == write_captions(iter(ROWS), lines) == 2
    assert pq.read_table(parquet).to_pylist() == [json.loads(line) for line in lines.read_text().splitlines()] == ROWS

    def broken():
        yield ROWS[0]
        raise DataError("no more")

    for name, rows in (
        ("part.jsonl", lambda path: [json.loads(line) for line in path.read_text().splitlines()]),
        ("part.parquet", lambda path: pq.read_table(path).to_pylist()),
    ):
        with pytest.raises(DataError, match=rf"no more\n1 images that were captioned are in \S+\.{name}\.unfinished"):
            write_captions(broken(), tmp_path / name)
        assert not (tmp_path / name).exists()
        assert rows(tmp_path / f".{name}.unfinished") == ROWS[:1]
    with pytest.raises(ConfigError, match=r"ends in \.parquet or \.jsonl"):
        write_captions(iter(()), tmp_path / "captions.csv")
