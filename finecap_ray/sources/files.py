"""Where a path or URI leads, and what lies there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def kind_of(path: str) -> fs.FileType:
    filesystem, inner = locate(path)
    try:
        return filesystem.get_file_info(inner).type
    except OSError as error:
        raise DataError(f"{path} can't be reached: {error}") from None


def list_files(path: str) -> list[str]:
    """Names of all files under a folder, relative to it, sorted; of a file, one empty name.

    Local links that lead nowhere are among them, so that what they stand for is counted as missing.
    """
    filesystem, root = locate(path)
    if filesystem.get_file_info(root).type == fs.FileType.File:
        return [""]
    if isinstance(filesystem, fs.LocalFileSystem):  # pyarrow passes over links that lead nowhere
        files = [os.path.join(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    else:
        entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        files = [entry.path for entry in entries if entry.type != fs.FileType.Directory]
    for file in files:
        if file != file.encode("utf-8", "replace").decode():
            raise DataError(f"{path} holds a file whose name isn't UTF-8, {os.fsencode(file)!r}: rename it")
    return sorted(file[len(root.rstrip("/")) + 1 :] for file in files)


def read_file(filesystem: fs.FileSystem, root: str, name: str) -> bytes:
    with filesystem.open_input_stream(f"{root.rstrip('/')}/{name}") as stream:
        return stream.read()


def read_text(path: str) -> str:
    filesystem, inner = locate(path)
    try:
        with filesystem.open_input_stream(inner) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from None


def read_json(path: str | Path) -> Any:
    """Of UTF-8 text, with or without a byte order mark. Raises DataError for anything else, and for a key that comes twice."""
    try:
        return json.loads(read_text(str(path)), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}") from None


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs of a JSON object: of a key that comes twice, json would keep the last without a word."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} comes twice; several captions of an image are a list")
    return tree
