"""COCO captions JSON, and the split file of Karpathy & Fei-Fei (CVPR 2015), with the images in a folder.

    COCO        {"images": [{"id", "file_name", "coco_url"}], "annotations": [{"image_id", "caption"}]}
    Karpathy    {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}], "cocoid" or "imgid"}]}

The id of an image is its COCO id, as text. Karpathy's splits are kept (train, restval, val, test).
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from finecap_ray.errors import DataError
from finecap_ray.sources.files import read_text
from finecap_ray.sources.folder import image_files
from finecap_ray.sources.found import Source

NO_FILE_NAME = "entry without a file name"


def coco_source(path: str, split: str, images: str | None) -> Source:
    """Plan of reading the images that the JSON at `path` names, under `images` (None: the folder of the JSON).

    `split` goes to the images of a COCO file, and to those that a Karpathy file gives none. Raises DataError for a file
    that is neither.
    """
    try:
        tree = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} isn't valid JSON: {error}") from None
    entries = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path} has no list "images": a COCO captions or Karpathy split file has one')
    entries = [entry if isinstance(entry, dict) else {} for entry in entries]
    if isinstance(tree.get("annotations"), list):
        items = _coco(entries, tree["annotations"], split)
    elif any("sentences" in entry for entry in entries):
        items = [_karpathy(number, entry, split) for number, entry in enumerate(entries)]
    else:
        raise DataError(
            f'{path} has neither "annotations" (COCO captions) nor "sentences" in its images (Karpathy split)'
        )
    root = images if images is not None else path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    return image_files(root, items)


def _coco(entries: list[dict[str, Any]], annotations: list[Any], split: str) -> list[dict[str, Any]]:
    captions = defaultdict(list)
    for annotation in annotations:
        if isinstance(annotation, dict):
            captions[str(annotation.get("image_id"))].append(annotation.get("caption"))
    return [
        _item(
            str(entry.get("id", f"images[{number}]")),
            entry.get("file_name"),
            captions[str(entry.get("id"))],
            split,
            entry,
        )
        for number, entry in enumerate(entries)
    ]


def _karpathy(number: int, entry: dict[str, Any], split: str) -> dict[str, Any]:
    image_id = entry.get("cocoid", entry.get("imgid", f"images[{number}]"))
    folder, name = entry.get("filepath"), entry.get("filename")
    file = f"{folder}/{name}" if folder and name else name
    sentences = entry.get("sentences")
    captions = [s.get("raw") if isinstance(s, dict) else s for s in sentences] if isinstance(sentences, list) else []
    own_split = entry.get("split")
    return _item(str(image_id), file, captions, own_split if isinstance(own_split, str) else split, entry)


def _item(image_id: str, file: Any, captions: list[Any], split: str, entry: dict[str, Any]) -> dict[str, Any]:
    problem = None if isinstance(file, str) and file else NO_FILE_NAME
    urls = [entry[name] for name in ("coco_url", "url", "flickr_url") if isinstance(entry.get(name), str)]
    return {
        "image_id": image_id,
        "file": file,
        "captions": captions,
        "text": None,
        "split": split,
        "problem": problem,
        "url": urls[0] if urls else None,
    }
