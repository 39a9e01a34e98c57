"""The workers of a step: the first has the captions of all their images made and scored, and each learns from its own.

    bags of each worker --> worker 0: sync, captions, rewards of the whole step --> each worker: its captions, all rewards

So the weights are published once per step, samplers and scorers see a whole step however many workers share it, and what
looks at the whole step (batch scope, a baseline over all images) looks at all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from finecap_ray.errors import DeadlineError
from finecap_ray.records import Bag

if TYPE_CHECKING:
    from finecap_ray.training.trainer import RolloutFunction, ScoredRollouts

# What worker 0 may wait for, each up to a step's timeout, while the others wait for it: publishing, fingerprints, captions
# and their rewards, greedy captions and theirs. Saving the last checkpoint, which they wait for as well, may take as long.
WAITS = 6


class SharedRollouts:
    """A rollout function that worker 0 calls for all workers of the process group."""

    def __init__(self, rollouts: RolloutFunction, timeout_s: float) -> None:
        """`timeout_s`: of each thing that `rollouts` waits for."""
        self._rollouts = rollouts
        self._timeout_s = WAITS * timeout_s
        self._rank, self._workers = dist.get_rank(), dist.get_world_size()
        # Records go from CPU to CPU, also where the gradients go by NCCL.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))

    def __call__(self, step: int, bags: list[Bag], model: torch.nn.Module) -> ScoredRollouts:
        """This worker's captions, with the rewards of all. Raises DeadlineError where a worker is late or gone."""
        first = self._rank == 0
        shares: list = [None] * self._workers
        with self._deadline("the bags of every other worker" if first else "worker 0 to take its bags", step):
            dist.gather_object(bags, shares if first else None, dst=0, group=self._group)
        parts = [None] * self._workers
        if first:
            parts = divide(self._rollouts(step, [bag for share in shares for bag in share], model), shares)
        own: list = [None]
        with self._deadline("every other worker to take its captions" if first else "captions from worker 0", step):
            dist.scatter_object_list(own, parts if first else None, src=0, group=self._group)
        return own[0]

    @contextmanager
    def _deadline(self, missing: str, step: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's, of a peer that is late or whose connection is closed
            raise DeadlineError(
                f"step {step}: worker {self._rank} of {self._workers} waited up to {self._timeout_s:.0f} s for {missing}, in "
                f"vain ({error}): the logs of the workers, rl-N.log, are in the run folder"
            ) from error


def divide(scored: ScoredRollouts, shares: list[list[Bag]]) -> list[ScoredRollouts]:
    """What each worker takes: its own captions and where they begin among all, and the rewards of all."""
    images = [sum(len(bag.images) for bag in bags) for bags in shares]
    per_image = len(scored.rollouts) // sum(images)
    bounds = pairwise([0, *(per_image * end for end in accumulate(images))])
    return [replace(scored, rollouts=scored.rollouts[start:end], first=start) for start, end in bounds]


def gather_rows(gather: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """The rows of all workers, [n, ...] of each -> [sum of n, ...], with a `gather` that takes as many from each of them."""
    if tensor.ndim == 0:
        return gather(tensor)
    counts = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return torch.cat([rows[:count] for rows, count in zip(gather(padded).split(max(counts)), counts, strict=True)])
