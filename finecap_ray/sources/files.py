"""Where a path or URI leads: a pyarrow filesystem and the path on it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from finecap_ray.errors import DataError


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """Filesystem and path of a local path or of a URI (`s3://`, `gs://`, `hdfs://`, or any that fsspec knows)."""
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass  # not one of pyarrow's own schemes
    import fsspec

    try:
        filesystem, inner = fsspec.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(f"can't open {path}: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), inner
