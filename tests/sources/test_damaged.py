"""200 damaged inputs among 1,000 good ones: every good one comes through, every bad one is counted under its reason."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from finecap_ray.sources import read_examples
from finecap_ray.sources.importer import import_examples


def picture(seed, format="JPEG", mode="RGB", size=(24, 16), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(out, format, **options)
    return out.getvalue()


def bomb():
    """A PNG of a few bytes that says that it is 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def odd_but_whole(number):
    """CMYK, 16 bits, animated, huge, a wrong extension: they come through, encoded anew where need be."""
    seed = 5000 + number
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "lime")]
    sixteen, animated = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * number, dtype=np.uint16)).save(sixteen, "PNG")
    base = Image.open(io.BytesIO(picture(seed)))
    base.save(animated, "GIF", save_all=True, append_images=frames)
    kinds = [
        ("jpg", picture(seed, mode="CMYK")),
        ("png", sixteen.getvalue()),
        ("gif", animated.getvalue()),
        ("jpg", picture(seed, size=(900, 700))),
        ("png", picture(seed, "WEBP")),
    ]
    return kinds[number % 5]


def test_200_damaged_inputs_among_1000_good_ones(ray_session, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    entries, annotations, good, bad = [], [], set(), {}

    def add(image_id, name, data=None, caption="a caption", **entry):
        if data is not None:
            (root / name).write_bytes(data)
        entries.append({"id": image_id, "file_name": name} | entry)
        annotations.append({"image_id": image_id, "caption": caption})

    for number in range(1000):
        suffix, data = odd_but_whole(number // 10) if number % 10 == 0 else ("jpg", picture(number))
        caption = "half a pair \ud800" if number % 50 == 0 else f"caption {number}"  # no UTF-8 has it
        add(number, f"good-{number}.{suffix}", data, caption)
        good.add(str(number))
    damaged = [
        ("truncated or damaged image", lambda n: picture(n)[:-60]),
        ("truncated or damaged image", lambda n: picture(n, "PNG")[:-50]),
        ("empty file", lambda n: b""),
        ("can't be opened as an image", lambda n: f"no image {n}".encode()),
        ("can't be opened as an image", lambda n: b"\0" * (100 + n)),
        ("can't be opened as an image", lambda n: f"%PDF-1.4 {n}".encode()),
        ("missing file", lambda n: None),
        (f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels", lambda n: bomb()),
    ]
    for number in range(160):  # 20 of each kind
        reason, make = damaged[number % 8]
        add(10_000 + number, f"bad-{number}.jpg", make(20_000 + number))
        bad[reason] = bad.get(reason, 0) + 1
    for number in range(20):  # the id of one that came before
        add(number, f"again-{number}.jpg", picture(30_000 + number))
    for number in range(10):  # the bytes of one that came before
        add(40_000 + number, f"copy-{number}.jpg", (root / entries[number]["file_name"]).read_bytes())
    for number in range(10):  # missing keys
        entries.append({"id": 50_000 + number} if number % 2 else {"file_name": 7})
    bad |= {"duplicate image id": 20, "duplicate image": 10, "entry without a file name": 10}
    annotations += [{}, {"image_id": 1}, {"caption": "of nothing"}, None, 3]
    (root / "captions.json").write_text(json.dumps({"images": entries, "annotations": annotations}))
    assert sum(bad.values()) == 200 and len(entries) == 1200

    report = import_examples(
        str(root / "captions.json"),
        str(tmp_path / "out"),
        format="auto",
        longest_side=512,
        jpeg_quality=90,
        split="train",
        max_bad_fraction=0.2,
    )
    rows = {row["image_id"]: row for row in read_examples(str(tmp_path / "out")).to_pylist()}
    assert set(rows) == good
    assert report.left_out == dict(sorted(bad.items()))
    assert report.reencoded == 80  # 20 each of CMYK, 16 bits, animated, huge; WebP is kept
    assert rows["50"]["captions"] == ["half a pair ?"]
    for row in rows.values():
        image = Image.open(io.BytesIO(row["image"]))
        image.load()
        assert max(image.size) <= 512
