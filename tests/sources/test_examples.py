"""read_examples: from every form that is ready for use, and a clear answer where it isn't."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.sources import ExampleSet, read_examples

ROWS = [
    {"image_id": "a", "image": b"1", "captions": ["one"], "split": "train"},
    {"image_id": "b", "image": b"2", "captions": [], "split": "test"},
]


def table(rows=ROWS, **kwargs):
    return pa.Table.from_pylist(rows, **kwargs)


def test_a_file_a_folder_and_an_imported_folder(tmp_path):
    (tmp_path / "imported" / "examples").mkdir(parents=True)
    (tmp_path / "imported" / "manifest.json").write_text("{}")
    for path in ("one.parquet", "imported/examples/part-0.parquet"):
        pq.write_table(table(schema=EXAMPLE_SCHEMA), tmp_path / path)
    for spec in (tmp_path / "one.parquet", tmp_path, tmp_path / "imported", tmp_path / "imported" / "examples"):
        assert read_examples(str(spec)).to_pylist() == ROWS
    assert read_examples(f"file://{tmp_path}/one.parquet").schema == EXAMPLE_SCHEMA


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name, row in zip(("part-1.parquet", "part-0.parquet"), ROWS, strict=True):
        pq.write_table(table([row], schema=EXAMPLE_SCHEMA), tmp_path / name)
    assert read_examples(str(tmp_path))["image_id"].to_pylist() == ["b", "a"]


def test_columns_of_a_kindred_type_are_taken_and_others_left_behind(tmp_path):
    kindred = table().set_column(1, "image", pa.array([b"1", b"2"], pa.large_binary())).append_column("width", [[3, 4]])
    pq.write_table(kindred, tmp_path / "a.parquet")
    assert read_examples(str(tmp_path)).equals(table(schema=EXAMPLE_SCHEMA))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image_id": "a", "image": b"1"}], "no column captions, split: found image_id, image"),
        ([{**ROWS[0], "captions": "one"}], "column captions is string, an example needs list"),
        ([ROWS[0], {**ROWS[1], "image": None}], "1 of 2 rows have no image"),
    ],
)
def test_tables_that_are_no_examples(tmp_path, rows, message):
    pq.write_table(table(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_examples(str(tmp_path))


def test_two_examples_of_one_id(tmp_path):
    pq.write_table(table([*ROWS, ROWS[1]], schema=EXAMPLE_SCHEMA), tmp_path / "a.parquet")
    examples = ExampleSet(str(tmp_path))
    for read in (lambda: examples.digest, lambda: examples.split("train")):
        with pytest.raises(
            DataError, match="1 ids belong to several examples, such as 'b'; `finecap import` keeps the first"
        ):
            read()


@pytest.mark.parametrize("captions", [["a dog", ""], ["a dog", None], [" \n"]])
def test_captions_that_say_nothing(tmp_path, captions):
    path = tmp_path / "a.parquet"
    pq.write_table(table([*ROWS, {**ROWS[0], "image_id": "z", "captions": captions}], schema=EXAMPLE_SCHEMA), path)
    with pytest.raises(DataError, match=r"1 captions are empty, such as one of 'z'; `finecap import` drops them"):
        _ = ExampleSet(str(path)).labels


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"no examples at .*nowhere"):
        read_examples(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"has no \.parquet file"):
        read_examples(str(tmp_path))
    with pytest.raises(DataError, match="can't open nothing://"):
        read_examples("nothing://bucket/examples")
    pq.write_table(table([], schema=EXAMPLE_SCHEMA), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no examples"):
        read_examples(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="can't be read as parquet"):
        read_examples(str(tmp_path))


def test_pages_of_several_files_and_row_groups(tmp_path):
    rows = [{"image_id": str(n), "image": b"%d" % n, "captions": [], "split": "train"} for n in range(700)]
    for number, (start, end) in enumerate([(0, 300), (300, 310), (310, 700)]):
        made = table(rows[start:end], schema=EXAMPLE_SCHEMA)
        pq.write_table(made, tmp_path / f"part-{number}.parquet", row_group_size=7 if number == 1 else 290)
    examples = ExampleSet(str(tmp_path))
    assert len(examples) == 700
    assert examples.labels["image_id"].to_pylist() == [row["image_id"] for row in rows]
    for start, size in ((0, 700), (0, 1), (295, 20), (299, 1), (300, 10), (650, 100), (310, 300)):
        assert examples.page(start, size).to_pylist() == rows[start : start + size]
    pq.write_table(table(rows, schema=EXAMPLE_SCHEMA), tmp_path / "one.parquet")
    assert (
        ExampleSet(str(tmp_path / "one.parquet")).digest == ExampleSet("file://" + str(tmp_path / "one.parquet")).digest
    )
    (tmp_path / "one.parquet").rename(tmp_path / "one")
    assert ExampleSet(str(tmp_path / "one")).digest == examples.digest
    rows[555] |= {"image": b"other"}
    pq.write_table(table(rows, schema=EXAMPLE_SCHEMA), tmp_path / "one")
    assert ExampleSet(str(tmp_path / "one")).digest != examples.digest


def test_pictures_of_some_rows_in_their_order(tmp_path):
    """Rows of three row groups, each of several batches."""
    rows = [ROWS[0] | {"image_id": str(row), "image": b"%d" % row} for row in range(2100)]
    pq.write_table(table(rows, schema=EXAMPLE_SCHEMA), tmp_path / "a.parquet", row_group_size=700)
    examples = ExampleSet(str(tmp_path))
    assert examples.pictures([2099, 0, 1024, 1023, 0]) == [b"2099", b"0", b"1024", b"1023", b"0"]
    assert examples.pictures([]) == []
    assert examples.pictures(range(600, 1500)) == [b"%d" % row for row in range(600, 1500)]


def test_a_row_group_is_read_once_however_many_pages_it_has(tmp_path, monkeypatch):
    rows = [ROWS[0] | {"image_id": str(row), "image": b"%d" % row} for row in range(3000)]
    pq.write_table(table(rows, schema=EXAMPLE_SCHEMA), tmp_path / "a.parquet", row_group_size=3000)
    examples, opened = ExampleSet(str(tmp_path)), []
    _ = examples.labels
    read = ExampleSet._part
    monkeypatch.setattr(ExampleSet, "_part", lambda *part: opened.append(part) or read(*part))
    assert examples.pictures([0, 2999]) == [b"0", b"2999"] and len(opened) == 1
    assert examples.digest and len(opened) == 2
