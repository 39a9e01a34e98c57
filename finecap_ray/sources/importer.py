"""`finecap import`: images and captions from outside -> examples, every image decoded once to know that it can be.

    tasks ──> workers: read, decode, re-encode ──> duplicates (here, by id and hash) ──> examples/part-*.parquet
              (Ray Data; rows stay in the object store)                                   manifest.json

A bad row becomes a row with a reason, in the workers as here; nothing it holds can stop the job. What is left out is
counted by reason in the manifest. The manifest is written last: a folder without one is an import that didn't end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.sources.coco import coco_source
from finecap_ray.sources.examples import MANIFEST_FILE
from finecap_ray.sources.files import kind_of, list_files, locate
from finecap_ray.sources.folder import folder_source
from finecap_ray.sources.found import MISSING_FILE, NO_IMAGE, UNREADABLE_FILE, Found, Source
from finecap_ray.sources.hf_datasets import hf_datasets_source, is_hf_dataset
from finecap_ray.sources.images import BadImageError, usable_image
from finecap_ray.sources.parquet import parquet_source
from finecap_ray.sources.urls import NOT_FETCHED, Fetching, fetch
from finecap_ray.sources.webdataset import SHARD_SUFFIXES, webdataset_source

DUPLICATE_ID, DUPLICATE_IMAGE = "duplicate image id", "duplicate image"
_FURTHER = (
    "further captions of an image"  # of a table with a row for each caption; not left out: they go to the first row
)
TASKS_AT_MOST = 1000  # Ray tasks; one does several of a large source's own
ROWS_PER_BLOCK, BYTES_PER_BLOCK = 64, 16 * 2**20
ROWS_PER_FILE, ROWS_PER_GROUP = 1000, 100
LISTED = 10  # images that a message names
_FETCHED_FOR = (None, NO_IMAGE, MISSING_FILE, UNREADABLE_FILE)  # problems that a URL may mend

Check = Callable[[Found], dict[str, Any]]  # -> a row of CHECKED_SCHEMA, but for its number

CHECKED_SCHEMA = pa.schema(
    [
        *EXAMPLE_SCHEMA,
        pa.field("number", pa.int64()),  # place in the source: the first of two duplicates is kept
        pa.field("digest", pa.binary()),  # of the bytes in the source
        pa.field("problem", pa.string()),
        pa.field("reencoded", pa.bool_()),
        pa.field("empty_captions", pa.int32()),
        pa.field("captions_not_text", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What went in and what came out; the manifest holds the same."""

    source: str
    format: str
    found: int  # images in the source
    examples: int
    splits: dict[str, int]  # examples of each
    left_out: dict[str, int]  # images, by reason
    without_captions: int  # of the examples: fine for bags and RL, not for MLE
    captions: int
    captions_left_out: dict[str, int]  # by reason
    reencoded: int


def import_examples(
    source: str,
    out: str,
    *,
    format: str,
    longest_side: int | None,
    jpeg_quality: int,
    split: str,
    max_bad_fraction: float,
    fetching: Fetching | None = None,
    images: str | None = None,
) -> ImportReport:
    """Imports `source` into the new folder `out` (paths or URIs). Ray must be running.

    format: "folder", "coco", "parquet", "hf_datasets", "webdataset", or "auto" to tell by the look of `source`;
    `images`: image root of a COCO file; `fetching`: how images that are named by URL alone are fetched, None for never;
    `split`: of images whose source gives none; `longest_side` (pixels) and `jpeg_quality`: see `usable_image`.
    Raises DataError when `source` isn't there or can't be read, `out` is there, or more than `max_bad_fraction` of the
    images can't be used (duplicates aren't bad).
    """
    if kind_of(source) == fs.FileType.NotFound:
        raise DataError(
            f"nothing at {source}: looked for a folder, a .json file (COCO, Karpathy), a .parquet file or a .tar shard"
        )
    if kind_of(out) != fs.FileType.NotFound:
        raise DataError(f"{out} exists: give a new folder for the examples")
    format = _told_by_look(source) if format == "auto" else format
    if format == "folder":
        plan = folder_source(source, split)
    elif format == "coco":
        plan = coco_source(source, split, images)
    elif format == "parquet":
        plan = parquet_source(source, split)
    elif format == "hf_datasets":
        plan = hf_datasets_source(source, split)
    elif format == "webdataset":
        plan = webdataset_source(source, split)
    else:
        raise DataError(f"no format {format!r}: formats are folder, coco, parquet, hf_datasets, webdataset and auto")

    if not plan.tasks:
        raise DataError(f"{source} has no rows")
    checked = _checked(plan, partial(_check, longest_side=longest_side, jpeg_quality=jpeg_quality, fetching=fetching))
    index = _index(checked)
    reasons, captions = _reasons(index)
    report = _report(source, format, index, reasons)
    _stop_when_too_bad(report, index, max_bad_fraction)
    _write(checked, frozenset(reasons), captions, out)
    _write_manifest(report, out)
    return report


def _told_by_look(source: str) -> str:
    folder = kind_of(source) == fs.FileType.Directory
    if folder and is_hf_dataset(source):
        return "hf_datasets"
    names = list_files(source) if folder else [source]
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if any(name.endswith(SHARD_SUFFIXES) for name in names):
        return "webdataset"
    if folder:
        return "folder"
    if source.endswith(".json"):
        return "coco"
    raise DataError(f"{source} is neither a folder nor a .json, .parquet or .tar file: name its format")


def _checked(plan: Source, check: Check) -> Dataset:
    """One row of CHECKED_SCHEMA for each image found, usable or not."""
    tasks = [{"number": number, "task": json.dumps(task)} for number, task in enumerate(plan.tasks)]
    dataset = ray.data.from_items(tasks, override_num_blocks=min(len(tasks), TASKS_AT_MOST))
    dataset.context.execution_options.preserve_order = True
    check_task = partial(_check_task, read=plan.read, check=check)
    return dataset.map_batches(check_task, batch_size=1, batch_format="pyarrow").materialize()


def _check_task(batch: pa.Table, read: Any, check: Check) -> Iterator[pa.Table]:
    for row in batch.to_pylist():
        rows, size = [], 0
        for place, found in enumerate(read(json.loads(row["task"]))):
            rows.append(check(found) | {"number": (row["number"] << 32) + place})
            size += len(rows[-1]["image"])
            if len(rows) == ROWS_PER_BLOCK or size > BYTES_PER_BLOCK:
                yield pa.Table.from_pylist(rows, schema=CHECKED_SCHEMA)
                rows, size = [], 0
        yield pa.Table.from_pylist(rows, schema=CHECKED_SCHEMA)


def _check(found: Found, longest_side: int | None, jpeg_quality: int, fetching: Fetching | None) -> dict[str, Any]:
    source, image, reencoded, problem = found.image, b"", False, found.problem
    if found.url and not source and problem in _FETCHED_FOR:
        if fetching:
            source, problem = fetch(found.url, fetching)
        elif problem in (None, NO_IMAGE):
            problem = NOT_FETCHED
    if problem is None:
        try:
            image, reencoded = usable_image(source, longest_side, jpeg_quality)
        except BadImageError as error:
            problem = str(error)
    texts = [" ".join(_utf8(caption).split()) for caption in found.captions if isinstance(caption, str)]
    return {
        "image_id": _utf8(found.image_id),
        "image": image,
        "captions": [text for text in texts if text],
        "split": _utf8(found.split),
        "digest": hashlib.sha256(source).digest(),
        "problem": problem,
        "reencoded": reencoded,
        "empty_captions": sum(not text for text in texts),
        "captions_not_text": len(found.captions) - len(texts),
    }


def _utf8(text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no text that Arrow or a tokeniser takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _index(checked: Dataset) -> list[dict[str, Any]]:
    """All that is known of the rows, without the images, in the order of the source."""
    light = checked.drop_columns(["image"])
    rows = [row for table in light.iter_batches(batch_size=None, batch_format="pyarrow") for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["number"])


def _reasons(index: list[dict[str, Any]]) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Why each row that becomes no example doesn't, and the captions of those that later rows have further ones of; by number.

    Appends the further captions to those of the first row in `index`.
    """
    reasons, captions, first, digests = {}, {}, {}, set()
    for row in index:
        known = first.get(row["image_id"])
        if row["problem"] is not None:
            reasons[row["number"]] = row["problem"]
        elif known is not None and _says_more(row, known):
            reasons[row["number"]] = _FURTHER
            known["captions"] += row["captions"]
            captions[known["number"]] = known["captions"]
        elif known is not None:
            reasons[row["number"]] = DUPLICATE_ID
        elif row["digest"] in digests:
            reasons[row["number"]] = DUPLICATE_IMAGE
        else:
            first[row["image_id"]] = row
            digests.add(row["digest"])
    return reasons, captions


def _says_more(row: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether it is the same image of the same split with a caption that isn't there yet: a row that is there twice has none."""
    same = row["digest"] == first["digest"] and row["split"] == first["split"]
    return same and not set(row["captions"]) <= set(first["captions"])


def _report(source: str, format: str, index: list[dict[str, Any]], reasons: dict[int, str]) -> ImportReport:
    kept = [row for row in index if row["number"] not in reasons]
    read = [row for row in index if reasons.get(row["number"], _FURTHER) == _FURTHER]
    captions_left_out = {
        "empty": sum(row["empty_captions"] for row in read),
        "not text": sum(row["captions_not_text"] for row in read),
    }
    return ImportReport(
        source=source,
        format=format,
        found=len(index) - len(read) + len(kept),
        examples=len(kept),
        splits=dict(sorted(Counter(row["split"] for row in kept).items())),
        left_out=dict(sorted(Counter(reason for reason in reasons.values() if reason != _FURTHER).items())),
        without_captions=sum(not row["captions"] for row in kept),
        captions=sum(len(row["captions"]) for row in kept),
        captions_left_out={reason: count for reason, count in captions_left_out.items() if count},
        reencoded=sum(row["reencoded"] for row in kept),
    )


def _stop_when_too_bad(report: ImportReport, index: list[dict[str, Any]], max_bad_fraction: float) -> None:
    bad = [row for row in index if row["problem"] is not None]
    if len(bad) > max_bad_fraction * len(index):
        listed = "\n".join(f"  {row['image_id']}: {row['problem']}" for row in bad[:LISTED])
        more = f"\n  and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise DataError(
            f"{len(bad)} of {len(index)} images can't be used ({len(bad) / len(index):.1%}, allowed are "
            f"{max_bad_fraction:.1%}); repair or remove them, or raise max_bad_fraction:\n{listed}{more}"
        )
    if not report.examples:
        raise DataError(f"no usable image in {report.source}: {report.found} found, left out {report.left_out}")


def _write(checked: Dataset, left_out: frozenset[int], captions: dict[int, list[str]], out: str) -> None:
    filesystem, folder = locate(out)
    filesystem.create_dir(f"{folder}/examples", recursive=True)
    # Ray's own write_parquet lets threads of Arrow shuffle the rows of a file.
    write = partial(_write_part, left_out=left_out, captions=captions, out=out)
    checked.map_batches(write, batch_size=ROWS_PER_FILE, batch_format="pyarrow").materialize()


def _write_part(table: pa.Table, left_out: frozenset[int], captions: dict[int, list[str]], out: str) -> pa.Table:
    """One file, named by the place of its first row in the source: written again, it is the same file.

    captions: by number, of the rows that have others than their own.
    """
    numbers = table["number"].to_pylist()
    kept = table.filter(pa.array([number not in left_out for number in numbers], pa.bool_()))
    if len(kept):
        pairs = zip(kept["number"].to_pylist(), kept["captions"].to_pylist(), strict=True)
        every = pa.array([captions.get(number, own) for number, own in pairs], EXAMPLE_SCHEMA.field("captions").type)
        kept = kept.set_column(kept.schema.get_field_index("captions"), EXAMPLE_SCHEMA.field("captions"), every)
        filesystem, folder = locate(out)
        path = f"{folder}/examples/part-{numbers[0]:016x}.parquet"
        pq.write_table(kept.select(EXAMPLE_SCHEMA.names), path, filesystem=filesystem, row_group_size=ROWS_PER_GROUP)
    return pa.table({"written": [len(kept)]})


def _write_manifest(report: ImportReport, out: str) -> None:
    filesystem, folder = locate(out)
    written = ds.dataset(f"{folder}/examples", filesystem=filesystem, format="parquet").count_rows()
    if written != report.examples:
        raise DataError(
            f"{written} of {report.examples} examples are in {out}: give a place that all nodes of the cluster see"
        )
    with filesystem.open_output_stream(f"{folder}/{MANIFEST_FILE}") as stream:
        stream.write(json.dumps(asdict(report), indent=2, ensure_ascii=False).encode())
