"""Hugging Face datasets on disk, as `save_to_disk` leaves them."""

import datasets
import pytest
from PIL import Image

from finecap_ray.errors import DataError
from finecap_ray.sources.hf_datasets import hf_datasets_source, is_hf_dataset
from finecap_ray.sources.images import usable_image


def found(path, split="rest"):
    source = hf_datasets_source(str(path), split)
    return [image for task in source.tasks for image in source.read(task)]


def picture(shade):
    return Image.new("RGB", (20, 10), (shade, 0, 0))


def test_a_dataset_with_splits(tmp_path):
    whole = datasets.Dataset.from_dict(
        {"image": [picture(n) for n in range(100)], "caption": [f"shade {n}" for n in range(100)], "id": range(100)},
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string"), "id": datasets.Value("int64")}
        ),
    )
    datasets.DatasetDict({"train": whole.select(range(70)), "val": whole.select(range(70, 100))}).save_to_disk(tmp_path)
    assert is_hf_dataset(str(tmp_path)) and is_hf_dataset(f"file://{tmp_path}")
    images = found(tmp_path)
    assert [image.image_id for image in images] == [str(n) for n in range(100)]
    assert [image.split for image in images] == ["train"] * 70 + ["val"] * 30
    assert images[80].captions == ("shade 80",)
    usable_image(images[80].image, None, 90)  # encoded as it lies there


def test_ids_that_start_anew_in_each_split_get_its_name(tmp_path):
    def saved(name, **splits):
        rows = {
            split: datasets.Dataset.from_dict({"id": ids, "image": [image.encode() for image in images]})
            for split, (ids, images) in splits.items()
        }
        datasets.DatasetDict(rows).save_to_disk(tmp_path / name)
        return [image.image_id for image in found(tmp_path / name)]

    assert saved("anew", train=([0, 1, None], "abc"), val=([0, 1], "de")) == [
        "train/0",
        "train/1",
        "train/2",
        "val/0",
        "val/1",
    ]
    # one image in two splits, and a row for each caption, are what they say
    assert saved("shared", train=([0, 1, 1], "abb"), val=([1, 2], "bc")) == ["0", "1", "1", "1", "2"]


def test_a_dataset_without_splits_ids_or_captions_and_with_gaps(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes of a file")
    values = [
        {"bytes": b"in the row", "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},  # `save_to_disk` takes it in
        None,
    ]
    datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        tmp_path / "set"
    )
    images = found(tmp_path / "set")
    assert [image.image_id for image in images] == ["rest/0", "rest/1", "rest/2"]
    assert [image.image for image in images] == [b"in the row", b"bytes of a file", b""]
    assert [image.problem for image in images] == [None, None, "row without an image"]
    assert all(image.captions == () for image in images)


def test_what_is_none(tmp_path):
    assert not is_hf_dataset(str(tmp_path))
    datasets.Dataset.from_dict({"picture": [b"x"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="has no column image: found picture"):
        found(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="can't be read as a Hugging Face dataset"):
        found(tmp_path / "set")
