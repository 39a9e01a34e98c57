"""Stream the bags of a run, step by step, through Ray Data.

What a step holds is decided beforehand (`plan_run`, a pure function); Ray Data only reads it, ahead of the training
and in other processes. Its own splitting of a stream among workers drops rows, so each worker streams its own plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from finecap_ray.bags import plan as plans
from finecap_ray.bags.bag_set import Shelf, part_path, read_manifest, shelves
from finecap_ray.bags.order import Layout
from finecap_ray.bags.plan import RunPlan
from finecap_ray.config import RlSettings
from finecap_ray.errors import DataError, DeadlineError
from finecap_ray.records import Bag, ImageBank, bags_from_arrow, vectors

_READS_PER_DATASET = 256  # reads that one Ray Data pipeline is set up for; setting one up takes some 0.1 s
_BYTES_PER_READ = 32 * 2**20  # of a Ray task, which costs some 30 ms beside the reading; a window at least
_READS_AT_ONCE = 2
_ENCODED_IMAGE = "images.list.element.image"
COLUMNS = [
    "bag_id",
    "similarity",
    *(f"images.list.element.{name}" for name in ("image_id", "captions", "embedding", "features")),
]


def plan_run(manifest: dict[str, Any], settings: RlSettings, seed: int, state: dict[str, Any] | None = None) -> RunPlan:
    """The steps of a run on the bag set of this manifest; see `bags.plan.plan_run`."""
    layouts = {size: Layout(shelf.bags, shelf.rows_per_group) for size, shelf in shelves(manifest).items()}
    return plans.plan_run(layouts, settings, seed, state)


class BagStream(Iterator[list[Bag]]):
    """The bags of each step for one worker, in the order of the plan. The encoded images are read only where they are asked for.

    `state_dict` says where it stands, for `plan_run`, between any two steps. Raises DataError when Ray Data doesn't give
    what was planned, DeadlineError when it gives nothing for `timeout_s` seconds.
    """

    def __init__(self, folder: str | Path, plan: RunPlan, rank: int, timeout_s: float, with_images: bool) -> None:
        self.plan, self._steps = plan, 0
        columns = [*COLUMNS, _ENCODED_IMAGE] if with_images else COLUMNS
        self._stream = _stream(folder, plan, shelves(read_manifest(folder)), rank, columns, timeout_s)

    def __next__(self) -> list[Bag]:
        bags = next(self._stream)
        self._steps += 1
        return bags

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict(self._steps)


def stream_bags(folder: str | Path, plan: RunPlan, rank: int, timeout_s: float, with_images: bool = False) -> BagStream:
    return BagStream(folder, plan, rank, timeout_s, with_images)


def read_bags(folder: str | Path, size: int) -> list[Bag]:
    """All bags of a size, with their images. Raises DataError where there are none."""
    path = Path(folder) / f"size={size}"
    if not path.is_dir():
        raise DataError(f"no bags of {size} in {folder}")
    # Part by part: an Arrow array of all their images may pass its 2 GiB.
    parts = sorted(path.glob("*.parquet"))
    return [bag for part in parts for bag in bags_from_arrow(pq.ParquetFile(part).read())]


def read_bank(folder: str | Path) -> ImageBank:
    """Every image that is in a bag of some size, once, with the embedding that the bags carry; in the order of their ids."""
    columns = [f"images.list.element.{name}" for name in ("image_id", "embedding")]
    parts = []
    for size in shelves(read_manifest(folder)):
        for path in sorted((Path(folder) / f"size={size}").glob("part-*.parquet")):
            parts.append(pq.ParquetFile(path).read(columns=columns)["images"].combine_chunks().flatten())
    ids = np.concatenate([part.field("image_id").to_numpy(zero_copy_only=False) for part in parts])
    embeddings = np.concatenate([vectors(part.field("embedding")) for part in parts])
    unique, first = np.unique(ids, return_index=True)
    return ImageBank(unique.tolist(), embeddings[first])


def _stream(
    folder: str | Path, plan: RunPlan, shelves: dict[int, Shelf], rank: int, columns: list[str], timeout_s: float
) -> Iterator[list[Bag]]:
    arriving = _arriving(folder, plan, shelves, rank, columns, timeout_s)
    for step in plan:
        bags = []
        for part in step.parts:
            for row in part.workers[rank]:
                size, found, bag = next(arriving, (0, -1, None))
                if (size, found) != (part.bag_size, row):
                    raise DataError(
                        f"the stream of {folder} lost its order at step {step.step}: bag {row} of size {part.bag_size} was due"
                    )
                bags.append(bag)
        yield bags


def _arriving(
    folder: str | Path, plan: RunPlan, shelves: dict[int, Shelf], rank: int, columns: list[str], timeout_s: float
) -> Iterator[tuple[int, int, Bag]]:
    """Size, row and bag, in the order of the plan."""
    late = f"no bag of {folder} came within {timeout_s:.0f} s: is its file system there, and `ray status` well?"
    bags_per_read = {size: _BYTES_PER_READ // _bytes_per_bag(folder, size, columns) for size in set(plan.bag_sizes)}
    for reads in _batched(_reads(plan, rank, bags_per_read), _READS_PER_DATASET):
        dataset = ray.data.from_items(reads, override_num_blocks=len(reads)).map_batches(
            _read_rows,
            fn_kwargs={"folder": str(folder), "shelves": shelves, "columns": columns},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,  # the trainer, samplers and scorers may hold every CPU, and they wait for this
            concurrency=min(_READS_AT_ONCE, len(reads)),
        )
        dataset.context.execution_options.preserve_order = True
        # Its clock runs on while everything that may be read ahead is read, and a step takes its time.
        dataset.context.execution_no_progress_timeout_s = -1
        blocks = _within(iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow")), timeout_s, late)
        for read in reads:
            # Whole row groups come: picking bags out of them is quick here, and slow in Arrow.
            bags: dict[tuple[int, int], Bag] = {}
            wanted = [(read["size"], row) for row in read["rows"]]
            while not bags.keys() >= set(wanted):
                table = next(blocks, None)
                if table is None:
                    return
                places = zip(table["size"].to_pylist(), table["row"].to_pylist(), strict=True)
                bags.update(zip(places, bags_from_arrow(table), strict=True))
            yield from ((size, row, bags[size, row]) for size, row in wanted)


def _within(blocks: Iterator[pa.Table], timeout_s: float, late: str) -> Iterator[pa.Table]:
    """`blocks`, or DeadlineError(`late`) when the next one isn't there in time."""
    waiting = ThreadPoolExecutor(1)
    try:
        while (block := waiting.submit(next, blocks, None).result(timeout_s)) is not None:
            yield block
    except TimeoutError as error:
        raise DeadlineError(late) from error
    finally:
        waiting.shutdown(wait=False)


def _reads(plan: RunPlan, rank: int, bags_per_read: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """The rows of a worker, one read for those of some windows of an epoch: a Ray task each."""
    due = (
        (part.epoch, window, part.bag_size, row)
        for step in plan
        for part in step.parts
        for row, window in zip(part.workers[rank], part.windows[rank], strict=True)
    )
    epoch, read = None, None
    for (own_epoch, _, size), own in groupby(due, key=itemgetter(0, 1, 2)):
        if read and (own_epoch != epoch or len(read["rows"]) >= bags_per_read[size]):
            yield read
            read = None
        epoch, read = own_epoch, read or {"size": size, "rows": []}
        read["rows"] += [row for *_, row in own]
    if read:
        yield read


def _bytes_per_bag(folder: str | Path, size: int, wanted: list[str]) -> int:
    """Of the columns that are read, in memory."""
    with pq.ParquetFile(part_path(folder, size, 0)) as file:
        group = file.metadata.row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
        read = sum(
            one.total_uncompressed_size
            for one in columns
            if one.path_in_schema != _ENCODED_IMAGE or _ENCODED_IMAGE in wanted
        )
        return max(1, read // group.num_rows)


def _batched(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, count)):
        yield batch


def _read_rows(batch: pa.Table, folder: str, shelves: dict[int, Shelf], columns: list[str]) -> pa.Table:
    """Ray Data batch of one read -> the row groups that hold its bags, each bag with its size and row."""
    (read,) = batch.to_pylist()
    table, rows = _row_groups(folder, read["size"], shelves[read["size"]], read["rows"], columns)
    sizes = pa.array(np.full(len(rows), read["size"]))
    # In one piece: Ray packs and unpacks every chunk of every column on its own.
    return table.append_column("size", sizes).append_column("row", pa.array(rows)).combine_chunks()


def take_bags(folder: str | Path, size: int, shelf: Shelf, rows: Sequence[int], columns: list[str] | None) -> pa.Table:
    """Bags by row number, in that order."""
    table, found = _row_groups(folder, size, shelf, rows, columns)
    return table.take(np.searchsorted(found, rows))


def _row_groups(
    folder: str | Path, size: int, shelf: Shelf, rows: Sequence[int], columns: list[str] | None
) -> tuple[pa.Table, np.ndarray]:
    """The row groups that hold these bags, each read once, and the row numbers of all bags in them, ascending."""
    parts, inside = np.divmod(np.asarray(rows), shelf.rows_per_part)
    tables, numbers = [], []
    for part in np.unique(parts).tolist():
        groups = np.unique(inside[parts == part] // shelf.rows_per_group).tolist()
        with pq.ParquetFile(part_path(folder, size, part)) as file:
            for group in groups:  # one by one: read together they take twice as long
                tables.append(file.read_row_group(group, columns=columns, use_threads=False))
                first = part * shelf.rows_per_part + group * shelf.rows_per_group
                numbers.append(np.arange(first, first + len(tables[-1])))
    return pa.concat_tables(tables), np.concatenate(numbers)
