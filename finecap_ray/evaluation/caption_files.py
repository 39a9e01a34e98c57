"""Captions and references from files, in the forms that other captioners' outputs and data sets come in.

    JSON       {image id: caption}  or  {image id: [captions]}
               [{"image_id": id, "caption": text}, ...]                 COCO's results
               {"annotations": [{"image_id": id, "caption": text}]}     COCO's captions
    parquet    image_id, and caption or captions (references: also references), a text or a list of them

Ids are compared as text, so that COCO's 391895 is "391895". An image that a list names several times has several captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.errors import DataError
from finecap_ray.sources.files import read_json

FORMS = (
    '{"391895": "a man on a bike"}, {"391895": ["a man", "a bike"]}, [{"image_id": 391895, "caption": "a man on a bike"}], '
    "or parquet with image_id and caption"
)
_CAPTION_COLUMNS = ("caption", "captions")
_REFERENCE_COLUMNS = ("references", "captions", "caption")


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Candidates by image id, one or more each, in the order of the file. Raises DataError for another form."""
    captions = _read(str(path), _CAPTION_COLUMNS)
    bare = [image_id for image_id, own in captions.items() if not own]
    if bare:
        raise DataError(
            f"{path}: {len(bare)} of {len(captions)} images have an empty list of captions, such as {bare[0]!r}; "
            'a caption without words is ""'
        )
    return captions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Human captions by image id; images without any are left out. Raises DataError for another form."""
    found = {image_id: own for image_id, own in _read(str(path), _REFERENCE_COLUMNS).items() if own}
    if not found:
        raise DataError(f"{path} holds no reference")
    return found


def _read(path: str, columns: Sequence[str]) -> dict[str, list[str]]:
    entries = _parquet_rows(path, columns) if path.endswith(".parquet") else _json_entries(path)
    captions: dict[str, list[str]] = {}
    wrong = []
    for key, own in entries:
        texts = [own] if isinstance(own, str) else own
        # A bool is an int, and no id.
        named = isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool))
        if named and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            captions.setdefault(str(key), []).extend(texts)
        else:
            wrong.append((key, own))
    if wrong:
        shown = str(wrong[0])[:80]
        raise DataError(
            f"{path}: {len(wrong)} of {len(entries)} entries have no id, or no caption or list of captions, such as {shown}"
        )
    return captions


def _json_entries(path: str) -> list[tuple[Any, Any]]:
    """Pairs of image id and what stands for its captions."""
    tree = read_json(path)
    if isinstance(tree, Mapping) and isinstance(tree.get("annotations"), list):
        tree = tree["annotations"]
    if isinstance(tree, list):
        rows = [row if isinstance(row, Mapping) else {} for row in tree]
        entries = [(row.get("image_id"), row.get("caption")) for row in rows]
    else:
        entries = list(tree.items()) if isinstance(tree, Mapping) else []
    if not entries:
        raise DataError(f"{path} holds no captions by image id, such as {FORMS}")
    return entries


def _parquet_rows(path: str, columns: Sequence[str]) -> list[tuple[Any, Any]]:
    try:
        names = pq.read_schema(path).names
        column = next((name for name in columns if name in names), None)
        if "image_id" not in names or column is None:
            raise DataError(
                f"{path} has the columns {', '.join(names)}: image_id and {' or '.join(columns)} are needed"
            )
        table = pq.read_table(path, columns=["image_id", column])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read as parquet: {error}") from None
    if not table.num_rows:
        raise DataError(f"{path} has no rows")
    return list(zip(table["image_id"].to_pylist(), table[column].to_pylist(), strict=True))
