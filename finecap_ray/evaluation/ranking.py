"""Ranks of images by their captions in pools, and R@k, mean and median rank with bootstrap intervals.

Ties are shared: with b images better than the own one and t equal to it (itself included), it stands on each of the
places b + 1 to b + t with probability 1 / t. So R@k is min(max((k - b) / t, 0), 1) and the rank b + (t + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finecap_ray.errors import DataError
from finecap_ray.evaluation.pools import Pool, PoolSet
from finecap_ray.rewards.self_retrieval import better_and_tied

CUTS = (1, 5, 10)
_CHUNK = 1024  # captions ranked at a time: 1,024 x 5,000 cosines are 20 MB
_BLOCK = 4_000_000  # numbers of bootstrap draws held at a time


@dataclass(frozen=True, slots=True)
class Places:
    """Per question (a caption asked about in a pool): how many images are better, how many equal, its pool and its image."""

    better: Float[np.ndarray, " Q"]
    tied: Float[np.ndarray, " Q"]  # the own image included
    pool: Float[np.ndarray, " Q"]  # int: row of the pool
    image: Float[np.ndarray, " Q"]  # int: row of the image asked about

    @property
    def rank(self) -> Float[np.ndarray, " Q"]:
        """Expected rank, from 1."""
        return self.better + (self.tied + 1) / 2

    def found_within(self, k: int) -> Float[np.ndarray, " Q"]:
        """Probability that the own image is among the first k."""
        return np.clip((k - self.better) / self.tied, 0, 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    low: float  # of the 95 % bootstrap interval
    high: float


def place_captions(
    pools: Sequence[Pool],
    images: Mapping[str, int],
    image_embeddings: Float[Tensor, "N D"],
    texts: Mapping[str, Sequence[int]],
    text_embeddings: Float[Tensor, "C D"],
) -> Places:
    """Ranks the images of each pool by every caption of the images asked about.

    images: image id -> row of `image_embeddings`; texts: image id -> rows of `text_embeddings`, its captions. An image
    without a caption is not asked about. Raises DataError when no caption is left, RewardError for a similarity that is no number.
    """
    better, tied, owners, asked = [], [], [], []
    for row, pool in enumerate(pools):
        competing = image_embeddings[[images[image_id] for image_id in pool.image_ids]]
        questions = [(place, text) for place in pool.asked for text in texts.get(pool.image_ids[place], ())]
        for start in range(0, len(questions), _CHUNK):
            part = questions[start : start + _CHUNK]
            target = torch.tensor([place for place, _ in part])
            scope = torch.ones(len(part), len(competing), dtype=torch.bool)
            counts = better_and_tied(text_embeddings[[text for _, text in part]], competing, target, scope)
            better.append(counts[0].double().numpy())
            tied.append(counts[1].double().numpy())
            owners.append(np.full(len(part), row))
            asked.append([images[pool.image_ids[place]] for place, _ in part])
    if not better:
        raise DataError(f"none of the images of {len(pools)} pools has a caption")
    return Places(*(np.concatenate(part) for part in (better, tied, owners, asked)))


def retrieval_numbers(pools: PoolSet, places: Places, samples: int, seed: int) -> dict[str, Any]:
    """n, R@1, R@5, R@10 (those smaller than a pool), mean and median rank, each {value, low, high}.

    n is the number of captions; an image with several counts with their mean.

    The interval is a percentile bootstrap of 95 %: over pools where captions of a pool are alike in difficulty (bags),
    else over images, with all captions of an image together.
    """
    draws = _Bootstrap(places, places.pool if pools.dependent else places.image, samples, seed)
    numbers: dict[str, Any] = {
        "against": pools.name,
        "pool_size": pools.size,
        "pools": len(pools.pools),
        "n": len(places.pool),
        "chance": 1 / pools.size,
    }
    for k in CUTS:
        if k < pools.size:
            numbers[f"recall_at_{k}"] = asdict(draws.mean(draws.items.found_within(k)))
    numbers["mean_rank"] = asdict(draws.mean(draws.items.rank))
    numbers["median_rank"] = asdict(draws.median(draws.items.rank))
    return numbers


class _Bootstrap:
    """Draws of as many units (pools, or images) with replacement (Efron 1979), as weights of the outcomes that differ.

    Few outcomes do: a draw of 5,000 images in pools of 100 is a draw of how often each of some 100 outcomes occurs.
    """

    def __init__(self, places: Places, unit: Float[np.ndarray, " Q"], samples: int, seed: int) -> None:
        outcomes, item = np.unique(np.stack([places.better, places.tied], axis=1), axis=0, return_inverse=True)
        item = item.ravel()
        none = np.zeros(len(outcomes))
        self.items = Places(outcomes[:, 0], outcomes[:, 1], none, none)
        weight = _weights(places)
        self.observed = np.bincount(item, weights=weight)
        rng = np.random.default_rng(seed)
        unit = np.unique(unit, return_inverse=True)[1].ravel()
        units = int(unit.max()) + 1
        if units == len(unit):  # one caption each: a unit is its outcome
            self.weights = rng.multinomial(units, self.observed / units, size=samples).astype(np.float64)
            return
        counts = np.zeros((units, len(outcomes)), dtype=np.float32)
        np.add.at(counts, (unit, item), weight)
        block = max(1, _BLOCK // units)
        drawn = [
            rng.multinomial(units, np.full(units, 1 / units), size=min(block, samples - start)).astype(np.float32)
            for start in range(0, samples, block)
        ]
        self.weights = np.concatenate([part @ counts for part in drawn]).astype(np.float64)

    def mean(self, values: Float[np.ndarray, " items"]) -> Estimate:
        """Mean over images; a unit weighs by how many it has."""
        return _estimate(
            float(self.observed @ values / self.observed.sum()), self.weights @ values / self.weights.sum(axis=1)
        )

    def median(self, values: Float[np.ndarray, " items"]) -> Estimate:
        """Median over images: the lower of the two in the middle."""
        order = np.argsort(values, kind="stable")

        def middle(weights: Float[np.ndarray, "s items"]) -> Float[np.ndarray, " s"]:
            reached = weights[:, order].cumsum(axis=1) >= weights.sum(axis=1, keepdims=True) / 2
            return values[order][reached.argmax(axis=1)]

        return _estimate(float(middle(self.observed[None])[0]), middle(self.weights))


def _weights(places: Places) -> Float[np.ndarray, " Q"]:
    """1 over the number of captions that the image has in its pool."""
    asked = np.unique(np.stack([places.pool, places.image], axis=1), axis=0, return_inverse=True)[1].ravel()
    return 1 / np.bincount(asked)[asked]


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
