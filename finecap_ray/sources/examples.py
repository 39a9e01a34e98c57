"""Examples that are ready for use, as one table: what every later step starts from."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.sources.files import locate
from finecap_ray.sources.fluent import fluent_table

MANIFEST_FILE = "manifest.json"  # of an import; written last


def read_examples(spec: str) -> pa.Table:
    """Examples in EXAMPLE_SCHEMA: `fluent` (embedded), a parquet file, a folder of them, or what `finecap import` wrote.

    Raises DataError where there is nothing to read, or a column is absent, of another type, or has gaps.
    """
    if spec == "fluent":
        return fluent_table()
    filesystem, path = locate(spec)
    files = _parquet_files(spec, filesystem, path)
    try:
        data = ds.dataset(files, filesystem=filesystem, format="parquet")
        absent = [name for name in EXAMPLE_SCHEMA.names if name not in data.schema.names]
        if absent:
            raise DataError(
                f"{spec} has no column {', '.join(absent)}: found {', '.join(data.schema.names)}; "
                f"examples have {', '.join(EXAMPLE_SCHEMA.names)}. `finecap import` makes them from other forms"
            )
        table = data.to_table(columns=EXAMPLE_SCHEMA.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{spec} can't be read as parquet: {error}") from None
    if not table.num_rows:
        raise DataError(f"{spec} has no examples: its {len(files)} parquet files are empty")
    return pa.table([_as_type(spec, table[field.name], field) for field in EXAMPLE_SCHEMA], schema=EXAMPLE_SCHEMA)


def _parquet_files(spec: str, filesystem: fs.FileSystem, path: str) -> list[str]:
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        return [path]
    if kind == fs.FileType.NotFound:
        raise DataError(f"no examples at {spec}: give `fluent`, a parquet file, or a folder of them")
    imported, finished = (
        filesystem.get_file_info(f"{path.rstrip('/')}/{name}").type for name in ("examples", MANIFEST_FILE)
    )
    if imported == fs.FileType.Directory and finished == fs.FileType.NotFound:
        raise DataError(
            f"the import into {spec} didn't end, it has no {MANIFEST_FILE}: remove the folder and import again"
        )
    # Not recursive: a folder next to the examples may hold bags or features, which are parquet too.
    for folder in (f"{path.rstrip('/')}/examples", path):
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        files = sorted(entry.path for entry in entries if entry.is_file and entry.extension == "parquet")
        if files:
            return files
    raise DataError(f"the folder {spec} has no .parquet file, nor has a folder examples/ in it")


def _as_type(spec: str, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        column = column.cast(field.type)
    except pa.ArrowException:
        raise DataError(f"{spec}: the column {field.name} is {column.type}, an example needs {field.type}") from None
    if column.null_count:
        raise DataError(
            f"{spec}: {column.null_count} of {len(column)} rows have no {field.name}; `finecap import` fills or drops them"
        )
    return column
