"""WebDataset: tar shards in which files of one name, but for what follows its first dot, are one sample.

    00017.jpg      the image
    00017.txt      captions, one a line, or
    00017.json     {"caption": "..."} or {"captions": ["...", ...]}; a .txt goes before it

The id of an image is shard/name, the shard as it lies in the folder: many sets count anew in every shard.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from finecap_ray.errors import DataError
from finecap_ray.sources.files import list_files, locate
from finecap_ray.sources.folder import IMAGE_SUFFIXES
from finecap_ray.sources.found import Found, Source

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header, past the first, for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def webdataset_source(path: str, split: str) -> Source:
    """Plan of reading one shard, or all of a folder, a shard a task; every image gets `split`."""
    shards = [name for name in list_files(path) if not name or name.endswith(SHARD_SUFFIXES)]
    if not shards:
        raise DataError(f"no shard in {path} or its subfolders: looked for {', '.join(SHARD_SUFFIXES)}")
    return Source([{"root": path, "name": name, "split": split} for name in shards], read_shard)


def read_shard(task: dict[str, Any]) -> Iterator[Found]:
    filesystem, root = locate(task["root"])
    file = f"{root.rstrip('/')}/{task['name']}" if task["name"] else root
    whole = task["name"] or PurePosixPath(root).name
    shard = next((whole.removesuffix(suffix) for suffix in SHARD_SUFFIXES if whole.endswith(suffix)), whole)
    try:
        # As a stream: a shard is never held as a whole.
        with (
            filesystem.open_input_stream(file, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar,
        ):
            for name, sample in _samples(tar):
                yield _found(f"{shard}/{name}", sample, task["split"])
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield Found(f"{file} ({error})", task["split"], problem="rest of a shard that can't be read")


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and files by suffix, of each run of files with the same name."""
    name, sample = None, {}
    for member in tar:
        path = PurePosixPath(member.name)
        if not member.isfile() or path.name.startswith("."):
            continue
        stem, _, suffix = path.name.partition(".")
        key = str(path.with_name(stem))
        if key != name and sample:
            yield name, sample
            sample = {}
        name = key
        sample[suffix.lower()] = tar.extractfile(member).read()
    if sample:
        yield name, sample


def _found(image_id: str, sample: dict[str, bytes], split: str) -> Found:
    images = [suffix for suffix in sample if suffix in IMAGE_SUFFIXES]
    if not images:
        return Found(image_id, split, problem="sample without an image")
    return Found(image_id, split, _captions(sample), sample[images[0]])


def _captions(sample: dict[str, bytes]) -> tuple[Any, ...]:
    try:
        if "txt" in sample:
            return tuple(line for line in sample["txt"].decode("utf-8-sig").splitlines() if line.strip())
        described = json.loads(sample["json"]) if "json" in sample else {}
    except ValueError:
        return (None,)  # counted as a caption that isn't text
    if not isinstance(described, dict):
        return ()
    captions = described.get("captions", described.get("caption", []))
    return tuple(captions) if isinstance(captions, list) else (captions,)
