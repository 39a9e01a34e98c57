"""Which bags an epoch takes, and how many go into each of its steps.

An epoch is one pass over the bags of one size, or over those of a band of difficulty. Stages follow one another, such as
3 epochs of bags of 2, then 5 of 3 (BagCurri, NDLB 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finecap_ray.config import Stage
from finecap_ray.errors import ConfigError, MismatchError


class Curriculum:
    """Stages one after the other, and how far a run has come in them."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ConfigError("the curriculum has no stage: give at least one, such as {bag_size: 5, epochs: 1}")
        self._stages = [stage for stage in stages for _ in range(stage.epochs)]
        self.epoch = 0  # the epoch that is going on
        self.bags_done = 0  # of it

    @property
    def epochs(self) -> int:
        return len(self._stages)

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch, counted from 0. Raises ConfigError past the last one."""
        if not 0 <= epoch < self.epochs:
            raise ConfigError(
                f"epoch {epoch} is not in the curriculum: its {self.epochs} epochs are 0 to {self.epochs - 1}"
            )
        return self._stages[epoch]

    def bag_size(self, epoch: int) -> int:
        """Images per bag in an epoch, counted from 0. Raises ConfigError past the last one."""
        return self.stage(epoch).bag_size

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as JSON can hold it."""
        return {"bag_sizes": [stage.bag_size for stage in self._stages], "epoch": self.epoch, "bags": self.bags_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved place. Raises MismatchError where the epochs up to there had bags of other sizes."""
        done = state["bag_sizes"][: state["epoch"] + (state["bags"] > 0)]
        own = [stage.bag_size for stage in self._stages[: len(done)]]
        if own != done:
            raise MismatchError(
                f"the run has had epochs with bags of {done}, this curriculum begins with {own}: resume with the curriculum "
                "that the run was started with (its later epochs may change)"
            )
        self.epoch, self.bags_done = state["epoch"], state["bags"]


def band_rows(bags: int, band: tuple[float, float]) -> range:
    """Rows of a band of difficulty, in a bag set that begins with the bags most alike.

    band: from and to which quantile of similarity; 0 the least alike, the easiest, and 1 the most alike. So (0, 1) is all,
    and (0.5, 1) the harder half. Bands that meet share no bag. Raises ConfigError for a band that holds none.
    """
    low, high = band
    rows = range(round((1 - high) * bags), round((1 - low) * bags))
    if not rows:
        raise ConfigError(f"the band {low:g} to {high:g} of {bags} bags holds none: make it wider, or mine more bags")
    return rows


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Bags in the steps of an epoch: all are full, but for the last."""

    count: int
    full: int
    last: int

    def bounds(self, step: int) -> tuple[int, int]:
        """The bags of a step, as a range of the epoch's order."""
        start = step * self.full
        return start, start + (self.last if step == self.count - 1 else self.full)


def bags_per_step(bag_size: int, images_per_step: int, num_workers: int) -> int:
    """Whole bags in a full step. Raises ConfigError where a worker would get none."""
    bags = images_per_step // bag_size
    if bags < num_workers:
        raise ConfigError(
            f"{images_per_step} images per step // {bag_size} images per bag = {bags} bags per step, and each of "
            f"{num_workers} workers needs one: set images_per_step to {bag_size * num_workers} or more, or use fewer"
        )
    return bags


def step_sizes(bags: int, bag_size: int, images_per_step: int, num_workers: int) -> StepSizes:
    """Steps that consume `bags` bags once.

    The last step is shorter. A tail of fewer bags than workers is added to the step before, so that no worker goes empty.
    Raises ConfigError where a step can't give every worker a bag.
    """
    full = bags_per_step(bag_size, images_per_step, num_workers)
    if bags < num_workers:
        raise ConfigError(
            f"an epoch has {bags} bags of {bag_size}, and each of {num_workers} workers needs one in every step: "
            "mine more bags or use fewer workers"
        )
    steps, tail = divmod(bags, full)
    if tail >= num_workers:
        return StepSizes(steps + 1, full, tail)
    return StepSizes(steps, full, full + tail)
