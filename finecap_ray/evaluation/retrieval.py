"""Retrieval numbers of an evaluation: R@1 and its interval.

An interval comes from a percentile bootstrap over bags (Efron 1979): the captions of a bag compete with each other, so
bags, not captions, are what is independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finecap_ray.errors import DataError
from finecap_ray.rewards.self_retrieval import self_retrieval_accuracy

_COSINES = 40_000_000  # at a time: 160 MB; those of all captions of 40,000 images are 6.4 GB


def recall_at_1(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"] | None = None,
) -> float:
    """Share of the captions, 0 to 1, that find their own image first; a tie of n at the top counts 1 / n.

    text and images are unit-norm; scope says which images compete, None for all of them.
    Raises DataError without captions, RewardError for a similarity that is no number.
    """
    if not len(text):
        raise DataError("R@1 of 0 captions: give at least one")
    return recall_per_caption(text, images, target, scope).double().mean().item()


def recall_per_caption(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"] | None = None,
) -> Float[Tensor, " C"]:
    """What each caption adds to R@1: 1 if its image is first, 1 / n in a tie of n at the top, else 0."""
    every = torch.ones(1, len(images), dtype=torch.bool, device=text.device)
    found = []
    for rows in torch.arange(len(text), device=text.device).split(max(1, _COSINES // len(images))):
        own = every.expand(len(rows), -1) if scope is None else scope[rows]
        found.append(self_retrieval_accuracy(text[rows], images, target[rows], own))
    return torch.cat(found)


def bootstrap_interval(
    values_per_bag: Sequence[np.ndarray], samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval (low, high) of the mean of all values, over `samples` draws of as many bags with replacement.

    values_per_bag: the values of each bag, such as those of `recall_per_caption`; bags may differ in size.
    Raises DataError for no bags or an empty one.
    """
    sums, counts = _sums_and_counts(values_per_bag)
    return _percentiles([draw @ sums / (draw @ counts) for draw in _draws(len(sums), samples, seed)], level)


def bootstrap_gain_interval(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval (low, high) of mean(after) - mean(before), of two systems on the same bags in the same order.

    Each draw takes the same bags for both; what makes a bag hard for both cancels, and it is narrower than two of them.
    Raises DataError for different numbers of bags, no bags or an empty one.
    """
    if len(before) != len(after):
        raise DataError(
            f"a gain needs the same bags on both sides, there are {len(before)} before and {len(after)} after"
        )
    (sums_before, counts_before), (sums_after, counts_after) = _sums_and_counts(before), _sums_and_counts(after)
    gains = [
        draw @ sums_after / (draw @ counts_after) - draw @ sums_before / (draw @ counts_before)
        for draw in _draws(len(before), samples, seed)
    ]
    return _percentiles(gains, level)


def _sums_and_counts(values_per_bag: Sequence[np.ndarray]) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    bags = [np.asarray(values, dtype=np.float64) for values in values_per_bag]
    empty = sum(not values.size for values in bags)
    if empty or not bags:
        raise DataError(f"{empty} of {len(bags)} bags have no value: an interval needs one or more bags with values")
    return np.array([values.sum() for values in bags]), np.array([float(values.size) for values in bags])


def _draws(bags: int, samples: int, seed: int) -> Iterator[Float[np.ndarray, "s B"]]:
    """How often each bag is drawn, some samples at a time: 2,000 x 100,000 bags at once would be 1.6 GB."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // bags)
    for start in range(0, samples, block):
        count = min(block, samples - start)
        yield rng.multinomial(bags, np.full(bags, 1 / bags), size=count).astype(np.float64)


def _percentiles(blocks: list[Float[np.ndarray, " s"]], level: float) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate(blocks), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
