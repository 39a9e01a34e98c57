"""Parquet with the columns image_id and image (or url), and captions and split where they are there.

`image` is binary, or a struct with `bytes` as Hugging Face datasets write it; `captions` is a list of strings, or one, and may be
called `caption`. Rows of one image_id, image and split, as of a table with a row for each caption, become one example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.errors import DataError
from finecap_ray.sources.files import list_files, locate
from finecap_ray.sources.found import NO_IMAGE, Found, Source

COLUMNS = ("image_id", "image", "captions", "caption", "split", "url")
ROWS_AT_A_TIME = 32


def parquet_source(path: str, split: str) -> Source:
    """Plan of reading a parquet file, or all of a folder, a row group a task. `split` goes to rows without one.

    Raises DataError for a file that isn't parquet, or has no image_id or image.
    """
    names = [name for name in list_files(path) if not name or name.endswith(".parquet")]
    if not names:
        raise DataError(f"no .parquet file in {path} or its subfolders")
    filesystem, root = locate(path)
    tasks = []
    for name in names:
        file = f"{root}/{name}" if name else root
        try:
            parquet = pq.ParquetFile(file, filesystem=filesystem)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} can't be read as parquet: {error}") from None
        with parquet:
            _check_columns(file, parquet.schema_arrow)
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                tasks.append({"root": path, "name": name, "group": group, "rows": rows, "split": split})
    return Source(tasks, read_row_group)


def read_row_group(task: dict[str, Any]) -> Iterator[Found]:
    filesystem, root = locate(task["root"])
    file = f"{root}/{task['name']}" if task["name"] else root
    done = 0
    try:
        with pq.ParquetFile(file, filesystem=filesystem) as parquet:
            columns = [name for name in COLUMNS if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=[task["group"]], columns=columns):
                for row in batch.to_pylist():
                    yield _found(row, task["split"], f"{file}, row group {task['group']}, row {done}")
                    done += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        for row in range(done, task["rows"]):
            place = f"{file}, row group {task['group']}, row {row}"
            yield Found(place, task["split"], problem="unreadable row group")


def _found(row: dict[str, Any], split: str, place: str) -> Found:
    image, captions = row.get("image"), row.get("captions")
    if isinstance(image, dict):
        image = image["bytes"]
    if captions is None:
        captions = row.get("caption") or []
    problem = "row without an image_id" if row["image_id"] is None else NO_IMAGE if image is None else None
    return Found(
        image_id=place if row["image_id"] is None else str(row["image_id"]),
        split=row.get("split") or split,
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
        image=image or b"",
        problem=problem,
        url=row.get("url"),
    )


def _check_columns(file: str, schema: pa.Schema) -> None:
    if "image_id" not in schema.names or not {"image", "url"} & set(schema.names):
        absent = "image_id" if "image_id" not in schema.names else "image, nor url"
        raise DataError(f"{file} has no column {absent}: found {', '.join(schema.names)}")
    kinds = {name: schema.field(name).type for name in COLUMNS if name in schema.names}
    image = kinds.get("image", pa.binary())
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise DataError(f"{file}: the column image is {kinds['image']}, not binary (encoded JPEG, PNG, ...)")
    for name in ("captions", "caption", "split", "url"):
        kind = kinds.get(name, pa.null())
        if name.startswith("caption") and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise DataError(f"{file}: the column {name} is {kinds[name]}, not text")
