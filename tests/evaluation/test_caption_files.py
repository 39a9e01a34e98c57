import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation.caption_files import read_captions, read_references


def written(tmp_path, content) -> str:
    file = tmp_path / "file.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(file)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"1": "a cat", "x.jpg": ""}, {"1": ["a cat"], "x.jpg": [""]}),
        ({"1": ["a cat", "日本"]}, {"1": ["a cat", "日本"]}),
        ([{"image_id": 1, "caption": "a"}, {"image_id": "b", "caption": "c"}], {"1": ["a"], "b": ["c"]}),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], {"1": ["a", "b"]}),
        ({"images": [], "annotations": [{"image_id": 1, "id": 7, "caption": "a"}]}, {"1": ["a"]}),
    ],
    ids=["one each", "several each", "COCO results", "an image twice", "COCO captions"],
)
def test_forms(tmp_path, tree, expected):
    assert read_captions(written(tmp_path, tree)) == read_references(written(tmp_path, tree)) == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_captions(written(tmp_path, b'\xef\xbb\xbf{"1": "a"}')) == {"1": ["a"]}


def test_parquet_holds_captions_and_references_side_by_side(tmp_path):
    path = tmp_path / "both.parquet"
    pq.write_table(pa.table({"image_id": [1, 2], "caption": ["a", "b"], "references": [["c", "d"], ["e"]]}), path)
    assert read_captions(path) == {"1": ["a"], "2": ["b"]}
    assert read_references(path) == {"1": ["c", "d"], "2": ["e"]}


def test_images_without_a_reference_are_no_references(tmp_path):
    assert read_references(written(tmp_path, {"1": [], "2": ["a"]})) == {"2": ["a"]}
    with pytest.raises(DataError, match="holds no reference"):
        read_references(written(tmp_path, {"1": []}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read as JSON"),
        (b"{", "can't be read as JSON"),
        (b'{"a": "caf\xe9"}', "isn't UTF-8 text"),
        (b'{"a": "one", "a": "two"}', "the key 'a' comes twice; several captions of an image are a list"),
        ([], "holds no captions by image id, such as"),
        ({}, "holds no captions by image id"),
        ("a cat", "holds no captions by image id"),
        ({"a": 3, "b": "x"}, r"1 of 2 entries .* such as \('a', 3\)"),
        ({"a": None}, "1 of 1 entries"),
        ({"a": ["x", None]}, "1 of 1 entries"),
        (b'{"a": NaN}', "1 of 1 entries"),
        (["a cat"], "1 of 1 entries"),
        ([{"image_id": True, "caption": "x"}], "1 of 1 entries"),
        ([{"id": 1, "text": "x"}], "1 of 1 entries"),
        ({"a": []}, "1 of 1 images have an empty list of captions, such as 'a'"),
        (b"[" * 100_000, "can't be read as JSON"),
    ],
)
def test_what_holds_no_captions(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_captions(written(tmp_path, content))


def test_files_that_are_no_parquet_or_lack_a_column(tmp_path):
    path = tmp_path / "captions.parquet"
    path.write_text("no parquet")
    with pytest.raises(DataError, match="can't be read as parquet"):
        read_captions(path)
    with pytest.raises(DataError, match="can't be read"):
        read_captions(tmp_path / "absent.json")
    pq.write_table(pa.table({"image_id": [1], "text": ["a"]}), path)
    with pytest.raises(DataError, match="has the columns image_id, text: image_id and caption or captions are needed"):
        read_captions(path)
    pq.write_table(pa.table({"image_id": pa.array([], pa.int64()), "caption": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="has no rows"):
        read_captions(path)
