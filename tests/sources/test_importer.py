"""`finecap import` on real Ray: good and damaged inputs of every kind, and what the manifest says of them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finecap_ray.errors import DataError
from finecap_ray.sources import read_examples
from finecap_ray.sources.importer import import_examples

pytestmark = pytest.mark.usefixtures("ray_session")

OPTIONS = {"format": "auto", "longest_side": 64, "jpeg_quality": 90, "split": "train", "max_bad_fraction": 1.0}


def picture(seed, format="JPEG", mode="RGB", size=(48, 32), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(out, format, **options)
    return out.getvalue()


def run(source, out, **options):
    report = import_examples(str(source), str(out), **(OPTIONS | options))
    return report, {row["image_id"]: row for row in read_examples(str(out)).to_pylist()}


@pytest.fixture
def folder(tmp_path):
    """20 good images, 15 bad ones, 2 duplicates, and files that are none of the importer's business."""
    root = tmp_path / "images"
    for name in ("a/b", "good", "bad", ".hidden"):
        (root / name).mkdir(parents=True)
    good = {f"good/{number:02d}.jpg": picture(number) for number in range(12)}
    good |= {
        "a/b/deep.PNG": picture(20, "PNG"),
        "a/deep.webp": picture(21, "WEBP"),
        "good/cmyk.jpg": picture(22, mode="CMYK"),
        "good/palette.gif": picture(23, "GIF", mode="P"),
        "good/alpha.png": picture(24, "PNG", mode="RGBA"),
        "good/large.jpg": picture(25, size=(640, 480)),
        "good/bitmap.bmp": picture(26, "BMP"),
        "good/wrong name.png": picture(27, "JPEG"),
    }
    bad = {
        "bad/empty.jpg": b"",
        "bad/empty.png": b"",
        "bad/text.jpg": b"this is no image",
        "bad/zeros.jpg": b"\0" * 5000,
        "bad/page.png": b"<html>404 not found</html>",
        "bad/vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bad/head.jpg": picture(1)[:16],
        "bad/head.png": picture(1, "PNG")[:12],
        "bad/cut.jpg": picture(2)[:-200],
        "bad/cut.png": picture(2, "PNG")[:-400],
        "bad/cut.webp": picture(2, "WEBP")[:-100],
        "bad/cut.gif": picture(2, "GIF")[:-300],
        "bad/float.tif": picture(3, "TIFF", mode="F"),
        "bad/phone.heic": b"\0\0\0\x18ftypheic" + b"\0" * 200,
    }
    copies = {"z/copy.jpg": good["good/03.jpg"], "z/again.png": good["a/b/deep.PNG"]}
    (root / "z").mkdir()
    for name, data in (good | bad | copies).items():
        (root / name).write_bytes(data)
    (root / "bad" / "link.jpg").symlink_to(root / "nowhere.jpg")
    (root / ".hidden" / "x.jpg").write_bytes(b"")
    (root / "good" / "._00.jpg").write_bytes(b"resource fork")
    (root / "README.md").write_text("no image")
    (root / "folder.jpg").mkdir()
    (root / "good" / "00.txt").write_text("a  red patch \n\n a blue patch\n", encoding="utf-8-sig")
    (root / "good" / "01.txt").write_text(" \n")
    (root / "good" / "02.txt").write_bytes(b"caf\xe9 in Latin-1")
    return root


def test_a_folder_with_good_and_bad_images(folder, tmp_path):
    report, rows = run(folder, tmp_path / "out")
    assert (report.found, report.examples, len(rows)) == (37, 20, 20)
    assert report.left_out == {
        "duplicate image": 2,
        "empty file": 2,
        "missing file": 1,
        "can't be opened as an image": 8,
        "pixels are floating-point numbers of unknown range": 1,
        "truncated or damaged image": 3,
    }
    assert report.splits == {"train": 20}
    assert (report.captions, report.without_captions, report.captions_left_out) == (2, 19, {"not text": 1})
    assert report.reencoded == 5  # CMYK, GIF, transparent, too large, BMP
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["left_out"] == report.left_out
    assert rows["good/00.jpg"]["captions"] == ["a red patch", "a blue patch"]
    assert rows["good/05.jpg"]["image"] == (folder / "good" / "05.jpg").read_bytes()
    assert list(rows) == sorted(rows)  # the order of the source
    for row in rows.values():
        image = Image.open(io.BytesIO(row["image"]))
        image.load()
        assert image.format in ("JPEG", "PNG", "WEBP") and max(image.size) <= 64


def test_too_many_bad_images_stop_the_job_and_leave_nothing_behind(folder, tmp_path):
    with pytest.raises(DataError) as error:
        run(folder, tmp_path / "out", max_bad_fraction=0.4)
    assert "15 of 37 images can't be used (40.5%, allowed are 40.0%)" in str(error.value)
    assert "bad/cut.gif: truncated or damaged image" in str(error.value)
    assert "and 5 more" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["json", "csv"])
def test_captions_of_a_folder_in_one_file(folder, tmp_path, form):
    if form == "json":
        captions = {
            "good/00.jpg": ["one", "  "],
            "good/01.jpg": "alone",
            "good/gone.jpg": ["x"],
            "good/02.jpg": [None, 5],
            "": "of nothing",
        }
        (folder / "captions.json").write_text(json.dumps(captions))
    else:
        lines = [
            "file,caption",
            "good/00.jpg,one",
            "good/00.jpg,",
            "good/01.jpg,alone",
            "good/gone.jpg,x",
            "good/02.jpg",
            ",of nothing",
        ]
        (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    report, rows = run(folder, tmp_path / "out")
    assert rows["good/00.jpg"]["captions"] == ["one"]  # the .txt files no longer count
    assert rows["good/01.jpg"]["captions"] == ["alone"]
    assert report.captions_left_out == {"empty": 1, "not text": {"json": 2, "csv": 1}[form]}
    assert report.left_out["missing file"] == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", "{", r"captions\.json isn't valid JSON"),
        ("captions.json", "[]", "must be .*found a list"),
        ("captions.csv", "a,b\n1,2\n", "must start with the line file,caption"),
    ],
)
def test_caption_files_that_are_none(folder, tmp_path, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        run(folder, tmp_path / "out")


def test_coco_captions(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    entries = [{"id": 10 + number, "file_name": f"{number}.jpg"} for number in range(4)]
    entries += [{"id": 10, "file_name": "2.jpg"}, {"id": 99}, "nonsense"]
    captions = [(10, "a"), (10, "b"), (11, ""), (11, None), (77, "of no image")]
    annotations = [{"image_id": image_id, "caption": caption} for image_id, caption in captions] + [None]
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations}))
    report, rows = run(path, tmp_path / "out", images=str(tmp_path / "images"), split="val")
    assert {image_id: row["captions"] for image_id, row in rows.items()} == {"10": ["a", "b"], "11": [], "12": []}
    assert report.left_out == {"duplicate image id": 1, "entry without a file name": 2, "missing file": 1}
    assert report.splits == {"val": 3}
    assert report.captions_left_out == {"empty": 1, "not text": 1}


def test_karpathy_splits(tmp_path):
    (tmp_path / "val2014").mkdir()
    entries = []
    for number, split in enumerate(["train", "restval", "test", None]):
        (tmp_path / "val2014" / f"{number}.jpg").write_bytes(picture(number))
        sentences = [{"raw": f"Picture {number}.", "tokens": ["picture"]}]
        entry = {"filepath": "val2014", "filename": f"{number}.jpg", "sentences": sentences, "split": split}
        entries.append(entry | ({"cocoid": 500 + number} if number else {"imgid": 0}))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    report, rows = run(tmp_path / "dataset_coco.json", tmp_path / "out", split="rest")
    assert {image_id: (row["captions"][0], row["split"]) for image_id, row in rows.items()} == {
        "0": ("Picture 0.", "train"),
        "501": ("Picture 1.", "restval"),
        "502": ("Picture 2.", "test"),
        "503": ("Picture 3.", "rest"),
    }
    assert report.format == "coco" and not report.left_out


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([1], 'has no list "images"'),
        ({"images": []}, 'has no list "images"'),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, 'neither "annotations"'),
    ],
)
def test_json_that_is_neither(tmp_path, tree, message):
    (tmp_path / "a.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.json", tmp_path / "out")


def test_parquet_with_gaps_and_without_captions(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [
        {"image_id": "a", "image": picture(0), "captions": ["x", " ", None], "split": "val"},
        {"image_id": "b", "image": picture(1), "captions": None, "split": None},
        {"image_id": None, "image": picture(2), "captions": [], "split": "val"},
        {"image_id": "c", "image": None, "captions": [], "split": "val"},
        {"image_id": "d", "image": b"", "captions": [], "split": "val"},
        {"image_id": "e", "image": picture(0), "captions": [], "split": "val"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "0.parquet", row_group_size=2)
    pq.write_table(pa.table({"image_id": ["a", "z"], "image": [picture(3), picture(4)]}), tmp_path / "in" / "1.parquet")
    # As Hugging Face datasets have it.
    pq.write_table(
        pa.table({"image_id": [7], "image": [{"bytes": picture(5), "path": None}]}), tmp_path / "in" / "2.parquet"
    )
    report, found = run(tmp_path / "in", tmp_path / "out")
    assert {image_id: (row["captions"], row["split"]) for image_id, row in found.items()} == {
        "a": (["x"], "val"),
        "b": ([], "train"),
        "z": ([], "train"),
        "7": ([], "train"),
    }
    assert report.left_out == {
        "duplicate image": 1,
        "duplicate image id": 1,
        "empty file": 1,
        "row without an image": 1,
        "row without an image_id": 1,
    }
    assert report.captions_left_out == {"empty": 1, "not text": 1}


def test_a_table_with_a_row_for_each_caption(tmp_path):
    """Over row groups; what is twice there is still a duplicate, and no caption goes from one split to another."""
    rows = [
        ("a", 0, "one", "train"),
        ("b", 1, None, "train"),
        ("a", 0, "two", "train"),
        ("a", 0, "one", "train"),
        ("b", 1, "three", "train"),
        ("a", 0, " ", "train"),
        ("a", 2, "other bytes", "train"),
        ("a", 0, "other split", "val"),
    ]
    ids, seeds, captions, splits = zip(*rows, strict=True)
    columns = {"image_id": ids, "image": [picture(seed) for seed in seeds], "caption": captions, "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=3)
    report, found = run(tmp_path / "in.parquet", tmp_path / "out")
    assert {image_id: row["captions"] for image_id, row in found.items()} == {"a": ["one", "two"], "b": ["three"]}
    assert report.left_out == {"duplicate image id": 4}
    assert (report.found, report.examples, report.captions, report.without_captions) == (6, 2, 3, 0)


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    rows = [{"image_id": str(number), "image": picture(number)} for number in range(6)]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size // 2] = b"\xff" * (column.total_compressed_size // 2)
    path.write_bytes(data)
    report, found = run(path, tmp_path / "out")
    assert report.left_out == {"unreadable row group": 3}
    assert list(found) == ["3", "4", "5"]


def test_webdataset_shards(tmp_path):
    (tmp_path / "in").mkdir()
    described = json.dumps({"caption": "told in json"}).encode()
    (tmp_path / "in" / "more").mkdir()
    shards = {
        "more/a.v1.0.tar": {"0.jpg": picture(6)},
        "more/a.v1.1.tar": {"0.jpg": picture(7)},
        "a.tar": {"0.jpg": picture(0), "0.txt": b"one\ntwo\n", "0.json": described, "1.png": picture(1, "PNG")},
        "b.tar.gz": {
            "0.jpg": picture(2),
            "0.json": described,
            "1.json": b"{}",
            "2.jpg": b"",
            "3.jpg": picture(3),
            "3.json": b"[",
        },
        "cut.tar": {"sub/0.jpg": picture(4), "sub/1.jpg": picture(5)},
    }
    for shard, files in shards.items():
        with tarfile.open(tmp_path / "in" / shard, "w:gz" if shard.endswith("gz") else "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    whole = (tmp_path / "in" / "cut.tar").read_bytes()
    second = whole.index(b"sub/1.jpg")
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: second + 600])  # in the pixels
    (tmp_path / "in" / "cut-header.tar").write_bytes(whole[: second + 100])
    (tmp_path / "in" / "damaged-header.tar").write_bytes(whole[:second] + b"?" * 512 + whole[second + 512 :])
    (tmp_path / "in" / "none.tar").write_bytes(b"no tar at all")
    report, rows = run(tmp_path / "in", tmp_path / "out")
    assert {image_id: row["captions"] for image_id, row in rows.items()} == {
        "a/0": ["one", "two"],
        "a/1": [],
        "b/0": ["told in json"],
        "b/3": [],
        "more/a.v1.0/0": [],
        "more/a.v1.1/0": [],
        "cut/sub/0": [],  # of the other cut shards nothing: a sample is whole when the next one begins
    }
    assert report.left_out == {
        "empty file": 1,
        "rest of a shard that can't be read": 4,
        "sample without an image": 1,
    }
    assert report.captions_left_out == {"not text": 1}
    assert run(tmp_path / "in" / "a.tar", tmp_path / "one")[0].examples == 2
    (tmp_path / "in" / "a.tar").rename(tmp_path / "a.shard")
    assert list(run(tmp_path / "a.shard", tmp_path / "other", format="webdataset")[1]) == ["a.shard/0", "a.shard/1"]


def test_imports_are_readable_sources_and_repeat_themselves(folder, tmp_path):
    first, rows = run(folder, tmp_path / "out")
    second, again = run(tmp_path / "out" / "examples", tmp_path / "again")
    assert rows == again and second.examples == first.examples and not second.left_out


def test_more_tasks_than_images_of_one_block(tmp_path):
    """300 images are 5 tasks; nothing is lost or doubled between them."""
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / "in" / f"{number:03d}.png").write_bytes(picture(number, "PNG", size=(9, 9)))
    report, rows = run(tmp_path / "in", tmp_path / "out")
    assert report.examples == 300
    assert list(rows) == [f"{number:03d}.png" for number in range(300)]


def test_nothing_usable_and_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"nothing at .*: looked for a folder, a .json file"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"no image in .*: looked for avif, bmp"):
        run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"no \.parquet file in"):
        run(tmp_path / "in", tmp_path / "out", format="parquet")
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"no usable image in .*: 1 found, left out {'empty file': 1}"):
        run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="neither a folder nor"):
        run(tmp_path / "in" / "a.jpg", tmp_path / "out")
    with pytest.raises(DataError, match="no format 'tfrecord'"):
        run(tmp_path / "in", tmp_path / "out", format="tfrecord")
    with pytest.raises(DataError, match="exists: give a new folder"):
        run(tmp_path / "in", tmp_path)
    pq.write_table(pa.table({"image_id": ["a"], "picture": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column image, nor url: found image_id, picture"):
        run(tmp_path / "a.parquet", tmp_path / "out")


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    with open(bytes(tmp_path / "in") + b"/caf\xe9.jpg", "wb") as file:
        file.write(picture(0))
    with pytest.raises(DataError, match="whose name isn't UTF-8"):
        run(tmp_path / "in", tmp_path / "out")


def test_an_import_that_did_not_end_is_no_examples(folder, tmp_path):
    run(folder, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="didn't end"):
        read_examples(str(tmp_path / "out"))


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for number, split in enumerate(["train", "val", "test"]):
        (tmp_path / "in" / split).mkdir(parents=True)
        (tmp_path / "in" / split / "a.png").write_bytes(picture(number))
    report, rows = run(tmp_path / "in", tmp_path / "out")
    assert report.splits == {"test": 1, "train": 1, "val": 1}
    assert rows["val/a.png"]["split"] == "val"
    (tmp_path / "in" / "captions.json").write_text('{"train/a.png": "a cat", "gone.png": "nothing"}')
    report = run(tmp_path / "in", tmp_path / "with a missing file", max_bad_fraction=0.5)[0]
    assert report.splits == {"test": 1, "train": 1, "val": 1} and report.left_out == {"missing file": 1}
    (tmp_path / "in" / "captions.json").unlink()
    (tmp_path / "in" / "b.png").write_bytes(picture(3))  # in none of them
    assert run(tmp_path / "in", tmp_path / "again")[0].splits == {"train": 4}


def test_parquet_whose_captions_are_called_caption(tmp_path):
    rows = pa.table({"image_id": ["a", "b"], "image": [picture(0), picture(1)], "caption": ["a patch", None]})
    pq.write_table(rows, tmp_path / "in.parquet")
    report, found = run(tmp_path / "in.parquet", tmp_path / "out")
    assert {image_id: row["captions"] for image_id, row in found.items()} == {"a": ["a patch"], "b": []}
    assert report.without_captions == 1
