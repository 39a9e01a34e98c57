"""Which bags make which step, on which worker.

The order of an epoch is a pure function of (seed, epoch, bag size), and the division of a step over the workers of
their number as well: any worker can work out the whole plan, and a resumed run goes on in the middle of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finecap_ray.config import Stage
from finecap_ray.errors import ConfigError

BagRows = tuple[int, ...]  # row numbers of bags in the bag set of one size


class Curriculum:
    """Bag size per epoch: stages one after the other, such as 3 epochs of bags of 2, 5 of 3 (BagCurri, NDLB 2024)."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ConfigError("the curriculum has no stage: give at least one, such as {bag_size: 5, epochs: 1}")
        self._bag_sizes = [stage.bag_size for stage in stages for _ in range(stage.epochs)]

    @property
    def epochs(self) -> int:
        return len(self._bag_sizes)

    def bag_size(self, epoch: int) -> int:
        """Images per bag in an epoch, counted from 0. Raises ConfigError past the last one."""
        if not 0 <= epoch < self.epochs:
            raise ConfigError(
                f"epoch {epoch} is not in the curriculum: its {self.epochs} epochs are 0 to {self.epochs - 1}"
            )
        return self._bag_sizes[epoch]


def bags_per_step(bag_size: int, images_per_step: int, num_workers: int) -> int:
    """Whole bags in a full step. Raises ConfigError where a worker would get none."""
    bags = images_per_step // bag_size
    if bags < num_workers:
        raise ConfigError(
            f"{images_per_step} images per step // {bag_size} images per bag = {bags} bags per step, and each of "
            f"{num_workers} workers needs one: set images_per_step to {bag_size * num_workers} or more, or use fewer"
        )
    return bags


def steps_per_epoch(bags: int, bag_size: int, images_per_step: int, num_workers: int) -> int:
    """Steps that consume `bags` bags once. Raises ConfigError where a step can't give every worker a bag."""
    return len(_step_sizes(bags, bag_size, images_per_step, num_workers))


def step_plan(
    bags: int, bag_size: int, images_per_step: int, num_workers: int, seed: int, epoch: int
) -> list[list[BagRows]]:
    """The steps of an epoch; each has one tuple of bag row numbers per worker, none of them empty.

    Every bag is in one step, on one worker. The workers of a step differ by one bag at most, the first ones have more:
    a mean over a worker's captions is to be weighted by its share of them. The last step is shorter; one that had fewer
    bags than workers is added to the step before, one more bag for some of them.
    Raises ConfigError where a step can't give every worker a bag.
    """
    sizes = _step_sizes(bags, bag_size, images_per_step, num_workers)
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, bag_size]))).permutation(bags)
    steps = np.split(order, np.cumsum(sizes)[:-1])
    return [[tuple(share.tolist()) for share in np.array_split(step, num_workers)] for step in steps]


def _step_sizes(bags: int, bag_size: int, images_per_step: int, num_workers: int) -> list[int]:
    """Bags in each step."""
    full = bags_per_step(bag_size, images_per_step, num_workers)
    if bags < num_workers:
        raise ConfigError(
            f"an epoch has {bags} bags of {bag_size}, and each of {num_workers} workers needs one in every step: "
            "mine more bags or use fewer workers"
        )
    steps, tail = divmod(bags, full)
    sizes = [full] * steps
    if tail >= num_workers:
        sizes.append(tail)
    elif tail:
        sizes[-1] += tail
    return sizes
