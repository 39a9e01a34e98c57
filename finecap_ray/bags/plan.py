"""The steps of a run: which bags make which step, on which worker.

A pure function of (seed, epoch, step, number of workers), worked out step by step: any worker can work out the whole
plan, and a resumed run goes on in the middle of it, also with another number of workers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from finecap_ray.bags.curriculum import Curriculum, StepSizes, band_rows, step_sizes
from finecap_ray.bags.order import EpochOrder, Layout
from finecap_ray.config import RlSettings
from finecap_ray.errors import ConfigError, MismatchError

BagRows = tuple[int, ...]  # row numbers of bags in the bag set of one size


@dataclass(frozen=True, slots=True)
class RunStep:
    """One optimizer step of a run."""

    step: int  # from 0, over all epochs
    epoch: int
    bag_size: int
    workers: tuple[BagRows, ...]  # rows of the bags of each worker, in the bag set of this size
    windows: tuple[tuple[int, ...], ...]  # of each of these rows: which window of the epoch's order it is read with
    carried: RunStep | None = None
    """Bags of the epoch before, too few for a share each: only where a run was resumed with more workers just there."""

    @property
    def parts(self) -> tuple[RunStep, ...]:
        return (self,) if self.carried is None else (self.carried, self)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What of an epoch is to come: all of it, but for the one that a run is resumed in."""

    epoch: int
    bag_size: int
    layout: Layout
    done: int  # bags that were consumed before
    steps: StepSizes | None  # None where so few are left that they are carried into the next epoch's first step


@dataclass(frozen=True)
class RunPlan(Sequence[RunStep]):
    """The steps of a run, from its start or from where it is resumed; a slice that begins later is one too."""

    epochs: tuple[Epoch, ...]
    bag_sizes: tuple[int, ...]  # of all epochs of the run
    num_workers: int
    groups_per_window: int
    seed: int
    first_step: int  # the number of the first step
    begin: int  # the steps of this view, counted from the first one
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, item):
        if isinstance(item, slice):
            begin, end, stride = item.indices(len(self))
            if stride != 1:
                raise ValueError("a plan is sliced in strides of 1")
            return replace(self, begin=self.begin + begin, end=self.begin + max(begin, end))
        if not -len(self) <= item < len(self):
            raise IndexError(f"step {item} of a plan of {len(self)}")
        return self._step(self.begin + item % len(self))

    @property
    def total_steps(self) -> int:
        """Of the run, those before this plan included."""
        return self.first_step + self.end

    def from_step(self, step: int) -> RunPlan:
        """The plan from a step on, by its number in the run."""
        return self[step - self.first_step - self.begin :]

    def state_dict(self, steps: int) -> dict[str, Any]:
        """Where the run stands after `steps` steps of this plan, as JSON can hold it; for `plan_run`."""
        index, place = self._place(self.begin + steps)
        if index == len(self.epochs):
            return self._state(steps, len(self.bag_sizes), 0)
        epoch = self.epochs[index]
        if place == 0 and self._carried(index) is not None:
            return self._state(steps, self.epochs[0].epoch, self.epochs[0].done)
        return self._state(steps, epoch.epoch, epoch.done + (epoch.steps.bounds(place)[0] if place else 0))

    def _state(self, steps: int, epoch: int, bags: int) -> dict[str, Any]:
        step = self.first_step + self.begin + steps
        return {"seed": self.seed, "bag_sizes": list(self.bag_sizes), "step": step, "epoch": epoch, "bags": bags}

    @cached_property
    def _ends(self) -> list[int]:
        """Steps of the plan up to the end of each epoch."""
        return list(accumulate(epoch.steps.count if epoch.steps else 0 for epoch in self.epochs))

    def _place(self, step: int) -> tuple[int, int]:
        """Index of the epoch that a step belongs to, and its number there."""
        index = bisect_right(self._ends, step)
        return index, step - (self._ends[index - 1] if index else 0)

    def _carried(self, index: int) -> Epoch | None:
        return self.epochs[0] if index == 1 and self.epochs[0].steps is None else None

    def _step(self, step: int) -> RunStep:
        index, place = self._place(step)
        epoch, number = self.epochs[index], self.first_step + step
        carried = self._carried(index) if place == 0 else None
        if carried is not None:
            bags = carried.layout.bags - carried.done
            carried = self._part(number, carried, 0, bags, reversed(range(self.num_workers)))
        part = self._part(number, epoch, *epoch.steps.bounds(place), range(self.num_workers))
        return part if carried is None else replace(part, carried=carried)

    def _part(self, number: int, epoch: Epoch, start: int, end: int, workers: Any) -> RunStep:
        """Bags from `start` to `end` of what is left of an epoch, in shares that differ by one bag at most.

        Each worker gets bags that lie near each other, so that each reads its part of a window and not all of it. Those
        first in `workers` get the larger shares.
        """
        order = _order(epoch.layout, self.groups_per_window, self.seed, epoch.epoch, epoch.bag_size)
        rows, groups = order.take(epoch.done + start, epoch.done + end)
        by_group = np.argsort(groups, kind="stable")
        shares = dict(zip(workers, np.array_split(by_group, self.num_workers), strict=True))
        mine = [shares[worker] for worker in range(self.num_workers)]
        return RunStep(
            step=number,
            epoch=epoch.epoch,
            bag_size=epoch.bag_size,
            workers=tuple(tuple(rows[share].tolist()) for share in mine),
            windows=tuple(tuple((groups[share] // self.groups_per_window).tolist()) for share in mine),
        )


@lru_cache(maxsize=2)
def _order(layout: Layout, groups_per_window: int, seed: int, epoch: int, bag_size: int) -> EpochOrder:
    return EpochOrder(layout, groups_per_window, seed, epoch, bag_size)


def plan_run(
    layouts: Mapping[int, Layout], settings: RlSettings, seed: int, state: dict[str, Any] | None = None
) -> RunPlan:
    """All steps of a run over its curriculum, or those that come after a saved place (`RunPlan.state_dict`).

    layouts: of the bags of each size. A worker's share of a step is never empty, and the shares differ by one bag at most,
    the first ones have more: a mean over a worker's captions is to be weighted by its share of them.
    Raises ConfigError for impossible arithmetic, MismatchError for a size that isn't there or a place in another run.
    """
    curriculum = Curriculum(settings.curriculum)
    first_step = 0
    if state is not None:
        if state["seed"] != seed:
            raise MismatchError(
                f"the run to resume has seed {state['seed']}, the settings have {seed}: use the run's own"
            )
        curriculum.load_state_dict(state)
        first_step = state["step"]
    epochs = [
        _epoch(curriculum, epoch, layouts, settings, curriculum.bags_done if epoch == curriculum.epoch else 0)
        for epoch in range(curriculum.epoch, curriculum.epochs)
    ]
    if epochs and epochs[-1].steps is None:
        left = epochs[-1].layout.bags - epochs[-1].done
        raise ConfigError(
            f"{left} bags of the last epoch are left, and each of {settings.num_workers} workers needs one: "
            f"resume with rl.num_workers={left}"
        )
    steps = sum(epoch.steps.count for epoch in epochs if epoch.steps)
    if settings.max_steps is not None:
        steps = max(0, min(steps, settings.max_steps - first_step))
    return RunPlan(
        epochs=tuple(epochs),
        bag_sizes=tuple(curriculum.bag_size(epoch) for epoch in range(curriculum.epochs)),
        num_workers=settings.num_workers,
        groups_per_window=settings.groups_per_window,
        seed=seed,
        first_step=first_step,
        begin=0,
        end=steps,
    )


def _epoch(curriculum: Curriculum, epoch: int, layouts: Mapping[int, Layout], settings: RlSettings, done: int) -> Epoch:
    stage = curriculum.stage(epoch)
    if stage.bag_size not in layouts:
        raise MismatchError(
            f"the bag set has bags of {', '.join(map(str, layouts))}, not of {stage.bag_size}: build that size too"
        )
    whole = layouts[stage.bag_size]
    rows = band_rows(whole.bags, stage.band)
    layout = replace(whole, bags=len(rows), first=rows.start)
    arithmetic = (stage.bag_size, settings.images_per_step, settings.num_workers)
    sizes = step_sizes(layout.bags, *arithmetic)
    if done:
        left = layout.bags - done
        sizes = step_sizes(left, *arithmetic) if left >= settings.num_workers else None
    return Epoch(epoch, stage.bag_size, layout, done, sizes)
