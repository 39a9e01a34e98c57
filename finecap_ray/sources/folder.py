"""A folder of images, in subfolders too, with captions beside them in one of three forms:

    cat.jpg + cat.txt                 one caption a line
    captions.json                     {"sub/cat.jpg": ["a cat", ...], ...}
    captions.csv                      file,caption   (a file may have many lines)

The id of an image is its path in the folder. Names that start with a dot are skipped. Where every image lies in a folder train,
dev, val, validation or test, these are the splits, as in Hugging Face's image folders.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from finecap_ray.errors import DataError
from finecap_ray.sources.files import list_files, locate, read_file, read_text
from finecap_ray.sources.found import IMAGES_PER_TASK, MISSING_FILE, UNREADABLE_FILE, Found, Source

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif"})

SPLIT_FOLDERS = frozenset({"train", "dev", "val", "validation", "test"})


def folder_source(folder: str, split: str) -> Source:
    """Plan of reading `folder`; `split` goes to images that no folder gives one. Raises DataError for no image or an unreadable
    caption file."""
    names = [name for name in list_files(folder) if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    images = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    listed = _caption_file(folder, set(names))
    known = set(images)
    images += [name for name in listed or () if name not in known]  # in the caption file only: counted as missing
    if not images:
        raise DataError(
            f"no image in {folder}: looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its subfolders"
        )
    sidecars = set() if listed is not None else {name for name in names if _suffix(name) == "txt"}
    divided = {_top(name) for name in known} <= SPLIT_FOLDERS
    items = []
    for name in images:
        text = str(PurePosixPath(name).with_suffix(".txt"))
        items.append(
            {
                "image_id": name,
                "file": name,
                "captions": listed.get(name, []) if listed is not None else [],
                "text": text if text in sidecars else None,
                "split": _top(name) if divided else split,
            }
        )
    return image_files(folder, items)


def image_files(root: str, items: list[dict[str, Any]]) -> Source:
    """Source of images that are a file each: items with image_id, file (under `root`), captions, text (or None), split."""
    chunks = [items[start : start + IMAGES_PER_TASK] for start in range(0, len(items), IMAGES_PER_TASK)]
    return Source([{"root": root, "items": chunk} for chunk in chunks], read_image_files)


def read_image_files(task: dict[str, Any]) -> Iterator[Found]:
    filesystem, root = locate(task["root"])
    for item in task["items"]:
        captions = item["captions"]
        if item["text"] is not None:
            captions = _lines(filesystem, root, item["text"])
        image, problem = b"", item.get("problem")
        if problem is None:
            image, problem = _image(filesystem, root, item["file"])
        yield Found(item["image_id"], item["split"], tuple(captions), image, problem, item.get("url"))


def _image(filesystem: fs.FileSystem, root: str, name: str) -> tuple[bytes, str | None]:
    try:
        return read_file(filesystem, root, name), None
    except FileNotFoundError:
        return b"", MISSING_FILE
    except (OSError, ValueError):
        return b"", UNREADABLE_FILE


def _lines(filesystem: fs.FileSystem, root: str, name: str) -> list[str | None]:
    try:
        return [line for line in read_file(filesystem, root, name).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError):
        return [None]  # counted as a caption that isn't text


def _caption_file(folder: str, names: set[str]) -> dict[str, list[Any]] | None:
    found = [name for name in ("captions.json", "captions.csv") if name in names]
    if len(found) > 1:
        raise DataError(f"{folder} has both captions.json and captions.csv: keep one")
    if not found:
        return None
    path = f"{folder.rstrip('/')}/{found[0]}"
    text = read_text(path)
    return _from_json(path, text) if found[0].endswith("json") else _from_csv(path, text)


def _from_json(path: str, text: str) -> dict[str, list[Any]]:
    try:
        captions = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} isn't valid JSON: {error}") from None
    if not isinstance(captions, dict):
        raise DataError(f'{path} must be {{"file": ["caption", ...], ...}}, found a {type(captions).__name__}')
    return {
        file or f"an entry of {path} without a file": value if isinstance(value, list) else [value]
        for file, value in captions.items()
    }


def _from_csv(path: str, text: str) -> dict[str, list[Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not {"file", "caption"} <= set(rows.fieldnames or ()):
        raise DataError(f"{path} must start with the line file,caption; it starts with {rows.fieldnames}")
    captions = defaultdict(list)
    try:
        for row in rows:
            captions[row["file"] or f"line {rows.line_num} of {path}"].append(row["caption"])
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None
    return dict(captions)


def _top(name: str) -> str:
    return PurePosixPath(name).parts[0]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()
