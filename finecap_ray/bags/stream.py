"""Stream the bags of a run, step by step, through Ray Data.

What a step holds is decided beforehand (`plan_run`, a pure function); Ray Data only reads it, ahead of the training
and in other processes. Its own splitting of a stream among workers drops rows, so each worker streams its own plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from finecap_ray.bags.build import bag_count
from finecap_ray.bags.curriculum import BagRows, Curriculum, step_plan
from finecap_ray.config import RlSettings
from finecap_ray.errors import DataError
from finecap_ray.records import Bag


@dataclass(frozen=True, slots=True)
class RunStep:
    """One optimizer step of a run."""

    step: int  # from 0, over all epochs
    epoch: int
    bag_size: int
    workers: tuple[BagRows, ...]  # rows of the bags of each worker, in the bag set of this size


def plan_run(manifest: dict[str, Any], settings: RlSettings, seed: int) -> list[RunStep]:
    """All steps of a run, over its curriculum. Raises ConfigError for impossible arithmetic, MismatchError for a missing size."""
    curriculum = Curriculum(settings.curriculum)
    steps: list[RunStep] = []
    for epoch in range(curriculum.epochs):
        size = curriculum.bag_size(epoch)
        plan = step_plan(bag_count(manifest, size), size, settings.images_per_step, settings.num_workers, seed, epoch)
        steps += [RunStep(len(steps) + index, epoch, size, tuple(workers)) for index, workers in enumerate(plan)]
    return steps[: settings.max_steps]


def stream_bags(folder: str | Path, steps: list[RunStep], rank: int) -> Iterator[list[Bag]]:
    """The bags of each step for one worker, in the order of the plan. The encoded images aren't read.

    Raises DataError when the stream doesn't give what was planned.
    """
    wanted = [{"step": step.step, "bag_size": step.bag_size, "rows": list(step.workers[rank])} for step in steps]
    dataset = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
        _read_bags, fn_kwargs={"folder": str(folder)}, batch_size=1, num_cpus=1
    )
    arriving = iter(dataset.iter_rows())
    for step in steps:
        bags = []
        for row in step.workers[rank]:
            found = next(arriving, None)
            if found is None or (found["step"], found["row"]) != (step.step, row):
                raise DataError(f"the stream of {folder} lost its order at step {step.step}: bag {row} was due")
            bags.append(Bag.from_row(found))
        yield bags


def read_bags(folder: str | Path, size: int) -> list[Bag]:
    """All bags of a size, with their images. Raises DataError where there are none."""
    path = Path(folder) / f"size={size}"
    if not path.is_dir():
        raise DataError(f"no bags of {size} in {folder}")
    return [Bag.from_row(row) for row in pq.read_table(path, partitioning=None).to_pylist()]


def _read_bags(batch: dict[str, Any], folder: str) -> pa.Table:
    """Ray Data batch of one step -> its bags, each with the step and row it was asked for under."""
    (step,), (size,), (rows,) = batch["step"], batch["bag_size"], batch["rows"]
    files = [pq.ParquetFile(path) for path in sorted((Path(folder) / f"size={size}").glob("part-*.parquet"))]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    places = []
    start = 0
    for file, group in groups:
        count = file.metadata.row_group(group).num_rows
        places.append((start, start + count, file, group))
        start += count
    found: dict[int, pa.Table] = {}
    for first, end, file, group in places:
        inside = [int(row) for row in rows if first <= row < end]
        if inside:
            table = file.read_row_group(group, columns=_COLUMNS)
            found |= {row: table.slice(row - first, 1) for row in inside}
    table = pa.concat_tables([found[int(row)] for row in rows])
    return table.append_column("step", pa.array([int(step)] * len(rows))).append_column(
        "row", pa.array([int(row) for row in rows])
    )


_COLUMNS = [
    "bag_id",
    "similarity",
    *(f"images.list.element.{name}" for name in ("image_id", "captions", "embedding", "features")),
]
