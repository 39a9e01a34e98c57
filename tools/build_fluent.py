"""Build the embedded data set, `finecap_ray/sources/fluent.parquet`, from two npm packages.

    python tools/build_fluent.py                            # fetches both packages with `npm pack`
    python tools/build_fluent.py EMOJI_FOLDER NAMES_FOLDER  # uses the unpacked `package` folders

@lobehub/fluent-emoji-3d has the pictures (Microsoft's Fluent Emoji, 256 px WebP with transparency), emojibase-data the
name, tags, gender and skin tone of every emoji. They are joined on the code points in the file name, without variation
selectors (fe0f), which the two packages place differently. Some pictures lie under another variant's name: see `shown_by`.
What `finecap_ray/sources/fluent.py` says of captions and
splits is decided here. Every choice is a hash of names, so a rebuild gives the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from finecap_ray.records import EXAMPLE_SCHEMA

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
OUT = Path(__file__).parent.parent / "finecap_ray" / "sources" / "fluent.parquet"
SIDE = 128  # pixels
QUALITY = 80
TAGS = 5  # tags in the caption made of tags

HELD_OUT = {  # split: images at least, in large, in small and in single-member families
    "test_unseen": (170, 140, 50),
    "dev_unseen": (100, 70, 30),
}
LARGE_FAMILY = 12  # images
LARGEST_HELD_OUT = 36  # images; the few larger families would fill a held-out split by themselves
SEEN_SHARE = 0.37  # of the images in the large families that aren't held out
NEIGHBOURHOOD = 5  # images of one family that go to the same seen split together
DEV_SEEN_SHARE = 1 / 3  # of the neighbourhoods; the rest is test_seen

TONES = r"(?:medium-light|medium-dark|light|medium|dark) skin tone"
TONE_POINT = "1f3f[b-f]"  # light to dark
COUPLE = "1f46[bcd]|1f48f|1f491"
TECHNOLOGIST, DEAF_PERSON, MOUNTAIN_BIKER = "1f4bb", "1f9cf", "1f6b5"
PEOPLE = 1  # emojibase's group "people & body": only there is a gender a property of the picture
NEUTRAL = [  # pattern in a name -> the same without gender
    (r"\bfamily\b(.*)", lambda m: "family" + re.sub(r"\b(?:wo)?man\b", "adult", m[1])),
    (r"\bold (?:wo)?man\b", "older person"),
    (r"\bwoman and man\b", "people"),
    (r"\b(?:wo)?man\b", "person"),
    (r"\b(?:wo)?men\b", "people"),
    (r"\b(?:boy|girl)\b", "child"),
    (r"\bmer(?:man|maid)\b", "merperson"),
    (r"\b(?:prince|princess)\b", "person with crown"),
    (r"\b(?:mrs|santa) claus\b", "mx claus"),
]
GENDER_TAGS = {
    "man",
    "men",
    "male",
    "woman",
    "women",
    "female",
    "boy",
    "boys",
    "girl",
    "girls",
    "person",
    "people",
    "adult",
    "child",
}
PAIRS = ("people holding hands", "kiss", "couple with heart", "family")  # named with who takes part


@dataclass(frozen=True)
class Emoji:
    key: str  # code points, without variation selectors
    name: str
    bare_name: str  # without skin tone
    neutral_name: str  # without gender
    bare_neutral_name: str  # without both
    tags: tuple[str, ...]
    family: str
    group: int | None

    @property
    def captions(self) -> list[str]:
        names = [self.name, self.bare_name, self.neutral_name, self.bare_neutral_name]
        chosen = sorted(self.tags, key=lambda tag: order(self.family, tag))[:TAGS]
        return list(dict.fromkeys(caption for caption in [*names, " ".join(sorted(chosen))] if caption))

    @property
    def image_id(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name).strip('-')}-{self.key}"


def main(folders: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pictures, names = (Path(folder) for folder in folders or fetch(scratch))
        files = {}
        for path in sorted((pictures / "assets").glob("*.webp")):
            files.setdefault(code_points(path.stem), path)
        emoji, images, seen = [], [], {}
        for one in read_names(names / "en" / "data.json"):
            if one.key not in files:
                continue
            image = shrink(files[shown_by(one.key)])
            if image in seen:
                print(f"left out {one.name!r}: the same picture as {seen[image]!r}")
                continue
            seen[image] = one.name
            emoji.append(one)
            images.append(image)
    splits = assign_splits(emoji)
    rows = [
        {"image_id": one.image_id, "image": image, "captions": one.captions, "split": splits[one.key]}
        for one, image in zip(emoji, images, strict=True)
    ]
    rows.sort(key=lambda row: order("row", row["image_id"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA), OUT, compression="zstd", row_group_size=500)
    counts = Counter(row["split"] for row in rows)
    print(f"{OUT.name}: {len(rows)} images, {OUT.stat().st_size / 1e6:.1f} MB, {dict(counts)}")


def fetch(scratch: str) -> list[Path]:
    folders = []
    for package in PACKAGES:
        command = ["npm", "pack", "--silent", package]
        packed = subprocess.run(command, cwd=scratch, check=True, text=True, capture_output=True)
        folder = Path(scratch) / package.strip("@").replace("/", "-")
        with tarfile.open(Path(scratch) / packed.stdout.strip()) as archive:
            archive.extractall(folder, filter="data")
        folders.append(folder / "package")
    return folders


def code_points(hexcode: str) -> str:
    """`1F3C3-1F3FC-200D-2640-FE0F` -> `1f3c3-1f3fc-200d-2640`."""
    return "-".join(point.zfill(4) for point in hexcode.lower().split("-") if point != "fe0f")


def shown_by(key: str) -> str:
    """Code points in the name of the file that shows the emoji `key`.

    Seen on a sheet of all variants (package 1.1.0): medium-light and medium skin are exchanged everywhere but in couples
    and technologists, the tones of "person mountain biking" run the other way, and
    the deaf man and woman are exchanged. Medium-light is the one with blond hair.
    """
    if key.startswith(DEAF_PERSON):
        key = key.replace("2640", "?").replace("2642", "2640").replace("?", "2642")
    if len(re.findall(TONE_POINT, key)) > 1 or re.match(COUPLE, key) or TECHNOLOGIST in key:
        return key
    files = "fecdb" if re.fullmatch(f"{MOUNTAIN_BIKER}-{TONE_POINT}", key) else "bdcef"
    return re.sub(TONE_POINT, lambda tone: "1f3f" + files["bcdef".index(tone[0][-1])], key)


def read_names(path: Path) -> Iterator[Emoji]:
    entries = json.loads(path.read_text(encoding="utf-8"))
    bases = {plain(entry["label"]) for entry in entries if entry.get("group") == PEOPLE}
    for entry in entries:
        people = entry.get("group") == PEOPLE
        # Tags of two letters or with digits are country codes and times of day.
        tags = [tag for tag in map(plain, entry.get("tags", [])) if re.fullmatch("[^0-9]{3,}", tag)]
        for variant in [entry, *entry.get("skins", [])]:
            name = plain(variant["label"])
            neutral = without_gender(name, bases) if people else name
            bare_neutral = without_tone(neutral)
            yield Emoji(
                key=code_points(variant["hexcode"]),
                name=name,
                bare_name=without_tone(name),
                neutral_name=neutral,
                bare_neutral_name=bare_neutral,
                tags=tuple(tag for tag in tags if tag not in GENDER_TAGS),
                family=family(bare_neutral, people),
                group=entry.get("group"),
            )


def plain(label: str) -> str:
    """Lower-case words of ASCII letters, digits, hyphens and apostrophes."""
    for sign, word in (("’", "'"), ("#", " number sign"), ("*", " asterisk"), ("&", " and ")):
        label = label.replace(sign, word)
    folded = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9'-]+", " ", folded).split())


def without_tone(name: str) -> str:
    return " ".join(re.sub(TONES, "", name).split())


def without_gender(name: str, bases: set[str]) -> str:
    """`man running` -> `person running`, but `man artist` -> `artist`, where that is the name of an emoji (in `bases`)."""
    profession = re.sub(r"^(?:wo)?man ", "", name)
    if profession != name and without_tone(profession) in bases:
        return profession
    for pattern, neutral in NEUTRAL:
        name = re.sub(pattern, neutral, name)
    return name


def family(bare_neutral_name: str, people: bool) -> str:
    """The base emoji: the name without tone, gender, hair and, for couples and families, who takes part."""
    if bare_neutral_name.startswith("keycap"):
        return "keycap"
    if re.search(r"o'clock$|^[a-z]+-thirty$", bare_neutral_name):
        return "clock"
    if not people:
        return bare_neutral_name
    for base in PAIRS:
        if bare_neutral_name.startswith(base):
            return base
    return re.sub(r"^person (?:(?:red|curly|white|blond) hair|bald|beard)$", "person", bare_neutral_name)


def shrink(path: Path) -> bytes:
    """[SIDE, SIDE] RGB WebP, on white, the whole picture kept."""
    with Image.open(path) as picture:
        picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", (max(picture.size),) * 2, "white")
    canvas.alpha_composite(picture, tuple((canvas.width - side) // 2 for side in picture.size))
    out = io.BytesIO()
    canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def order(*names: str) -> str:
    return hashlib.sha256("|".join(names).encode()).hexdigest()


def assign_splits(emoji: list[Emoji]) -> dict[str, str]:
    """Split of each emoji by its code points; every one that no rule takes is in `train`."""
    members = defaultdict(list)
    for one in emoji:
        members[one.family].append(one)
    families = sorted(members, key=lambda name: order("family", name))
    # The name of a flag can't be told from its picture by someone who hasn't seen it: no flag is held out.
    pools = (
        [name for name in families if LARGE_FAMILY <= len(members[name]) <= LARGEST_HELD_OUT],
        [name for name in families if NEIGHBOURHOOD <= len(members[name]) < LARGE_FAMILY],
        [name for name in families if len(members[name]) == 1 and not name.startswith("flag ")],
    )
    splits = {one.key: "train" for one in emoji}
    for split, quotas in HELD_OUT.items():
        for quota, pool in zip(quotas, pools, strict=True):
            while quota > 0:
                held_out = members.pop(pool.pop(0))
                quota -= len(held_out)
                splits.update({one.key: split for one in held_out})

    neighbourhoods, dev, owed = 0, 0, 0.0
    for name in families:
        if len(members.get(name, ())) < LARGE_FAMILY:
            continue
        ranked = sorted(members[name], key=lambda one: order("member", one.key))
        owed += SEEN_SHARE * len(ranked)
        while owed >= NEIGHBOURHOOD:
            owed -= NEIGHBOURHOOD
            neighbourhoods += 1
            split = "dev_seen" if dev < round(DEV_SEEN_SHARE * neighbourhoods) else "test_seen"
            dev += split == "dev_seen"
            splits.update({one.key: split for one in ranked[:NEIGHBOURHOOD]})
            ranked = ranked[NEIGHBOURHOOD:]
    return splits


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: build_fluent.py [EMOJI_FOLDER NAMES_FOLDER]")
    main(sys.argv[1:])
