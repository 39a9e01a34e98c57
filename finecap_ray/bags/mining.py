"""Mining: put images that look alike into bags, so that only a caption that says what is special finds its image.

A bag is a seed and its nearest neighbours (BagCurri of NDLB 2024). Bags are disjoint by default, and a seed that takes
an image takes it from other seeds; so the seeds with the most similar neighbourhoods go first. When earlier bags have
taken some of a seed's neighbours, the next nearest free ones make it less similar than it was, and it goes back into
the queue with its new score. Scores only ever fall, so a seed whose score is up to date and on top of the queue is the
best one there is.

What may share a bag can be restricted: pairs above the ceiling of near duplicates are the same picture and never do, and
of images with labels no two of one label do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from finecap_ray.bags.neighbours import Neighbours, find_neighbours
from finecap_ray.config import BagSettings
from finecap_ray.errors import ConfigError, DataError

_DEFAULTS = BagSettings()
_BLOCK = 2**16  # rows whose scores are computed at a time


def mine_bags(
    embeddings: Float[np.ndarray, "N D"],
    size: int,
    seed: int = 0,
    *,
    max_bags_per_image: int | None = _DEFAULTS.max_bags_per_image,
    neighbours: int = _DEFAULTS.neighbours,
    near_duplicate: float | None = _DEFAULTS.near_duplicate,
    pictures: Float[np.ndarray, "N P"] | None = None,
    labels: Sequence[object] | None = None,
    target_recall: float = _DEFAULTS.target_recall,
) -> list[tuple[int, ...]]:
    """Bags of `size` row numbers each, tightest first; in a bag the seed, then its neighbours from the nearest on.

    embeddings: float32, unit-norm. max_bags_per_image: 1 for disjoint bags, None for one bag per seed. A seed is the
    first image of one bag at most. It looks among its `neighbours` nearest images only: an image that can't fill a bag
    from those, and is in no other, is left over (in no bag).
    near_duplicate: cosine above which two images are one picture, by `pictures` (unit-norm image embeddings; default:
    `embeddings`), and share no bag. labels: one per image; no two of a bag are equal, and images with None are in no bag.
    `seed` decides between seeds of exactly equal score. target_recall: of the search, see `find_neighbours`.

    Raises DataError for fewer images than `size`, a size below 2 or embeddings that are not unit-norm, and ConfigError
    for fewer neighbours than a bag needs.
    """
    _check_size(len(embeddings), size)
    _check_limits(size, neighbours, max_bags_per_image)
    found = find_neighbours(embeddings, neighbours, depth=size - 1, target_recall=target_recall)
    return bags_of_neighbours(
        found,
        size,
        seed,
        max_bags_per_image=max_bags_per_image,
        near_duplicate=near_duplicate,
        pictures=embeddings if pictures is None else pictures,
        labels=labels,
    )


def bags_of_neighbours(
    found: Neighbours,
    size: int,
    seed: int,
    *,
    max_bags_per_image: int | None,
    near_duplicate: float | None,
    pictures: Float[np.ndarray, "N P"],
    labels: Sequence[object] | None,
) -> list[tuple[int, ...]]:
    """`mine_bags` from neighbours that were searched once for all sizes."""
    images = len(found.rows)
    _check_size(images, size)
    _check_limits(size, found.rows.shape[1], max_bags_per_image)
    nearest, similarity = found.rows, found.similarity
    codes = None
    if labels is not None:
        codes = _label_codes(labels, images)
        nearest = np.where((codes[nearest] < 0) | (codes[:, None] < 0), -1, nearest)
    rules = None if near_duplicate is None and codes is None else _Rules(near_duplicate, pictures, codes)

    limit = math.inf if max_bags_per_image is None else max_bags_per_image
    uses = np.zeros(images, dtype=np.int32)
    tie_break = np.random.default_rng(seed).permutation(images)

    def best_bag(row: int) -> tuple[float, tuple[int, ...]] | None:
        """Mean similarity of the seed to its nearest free neighbours, and the bag of them; None where they run out."""
        own = nearest[row]
        free = np.flatnonzero((own >= 0) & (uses[own] < limit))
        if rules is not None and len(free) >= size - 1:
            free = rules.allowed(row, own, free, size - 1)
        if len(free) < size - 1:
            return None
        free = free[: size - 1]
        return float(similarity[row, free].mean(dtype=np.float64)), (row, *own[free].tolist())

    scores = _first_scores(similarity, nearest, size - 1)
    waiting = np.lexsort((tie_break, -scores))  # those who can't fill a bag come last, at -inf
    waiting = waiting[: int(np.isfinite(scores).sum())].tolist()
    fallen: list[tuple[float, int, int]] = []  # seeds whose score has fallen: (-score, tie break, row)
    bags, place = [], 0
    while place < len(waiting) or fallen:
        row = waiting[place] if place < len(waiting) else -1
        if fallen and (row < 0 or fallen[0] < (-scores[row], tie_break[row], row)):
            row = heapq.heappop(fallen)[2]
        else:
            place += 1
        if uses[row] >= limit or (best := best_bag(row)) is None:
            continue
        score, bag = best
        if score < scores[row] - _ROUNDING:
            scores[row] = score
            heapq.heappush(fallen, (-score, int(tie_break[row]), row))
            continue
        bags.append(bag)
        uses[list(bag)] += 1
    return bags


_ROUNDING = 1e-12  # one mean, summed in two orders


class _Rules:
    """Which of a seed's free neighbours may join it: no near duplicate of, nor of one label with, any that did before."""

    def __init__(
        self, ceiling: float | None, pictures: Float[np.ndarray, "N P"], codes: Int[np.ndarray, " N"] | None
    ) -> None:
        self.ceiling, self.pictures, self.codes = ceiling, pictures, codes

    def allowed(self, row: int, own: Int[np.ndarray, " M"], free: Int[np.ndarray, " F"], count: int) -> np.ndarray:
        """Places in `own`, out of `free`, of the first `count` that may join; fewer where there aren't as many."""
        rows = np.concatenate([[row], own[free]])
        apart = np.ones((len(rows), len(rows)), dtype=bool)
        if self.ceiling is not None:
            vectors = self.pictures[rows].astype(np.float32, copy=False)
            apart &= vectors @ vectors.T <= self.ceiling
        if self.codes is not None:
            apart &= self.codes[rows][:, None] != self.codes[rows][None, :]
        chosen, open_ = [], apart[0]
        for place in range(1, len(rows)):
            if open_[place]:
                chosen.append(place - 1)
                if len(chosen) == count:
                    break
                open_ = open_ & apart[place]
        return free[chosen]


def _first_scores(
    similarity: Float[np.ndarray, "N M"], nearest: Int[np.ndarray, "N M"], count: int
) -> Float[np.ndarray, " N"]:
    """Mean similarity of every seed to its first `count` neighbours, all being free; -inf where it has fewer."""
    scores = np.empty(len(nearest), dtype=np.float64)
    for start in range(0, len(nearest), _BLOCK):
        there = nearest[start : start + _BLOCK] >= 0
        first = there & (np.cumsum(there, axis=1) <= count)
        sums = np.where(first, similarity[start : start + _BLOCK], 0.0).sum(axis=1, dtype=np.float64)
        scores[start : start + _BLOCK] = np.where(first.sum(axis=1) == count, sums / count, -np.inf)
    return scores


def random_bags(images: int, size: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Disjoint bags of `size` rows drawn at random, the control for mined ones; images mod size are left over."""
    _check_size(images, size)
    order = np.random.default_rng(seed).permutation(images).tolist()
    return [tuple(order[start : start + size]) for start in range(0, images - size + 1, size)]


def bag_similarity(embeddings: Float[np.ndarray, "N D"], bag: Sequence[int]) -> float:
    """Mean cosine over the pairs of a bag: (|sum of v|^2 - sum of |v|^2) / (K (K - 1))."""
    return float(bag_similarities(embeddings, [bag])[0])


def bag_similarities(embeddings: Float[np.ndarray, "N D"], bags: Sequence[Sequence[int]]) -> Float[np.ndarray, " B"]:
    """`bag_similarity` of each of some bags of one size."""
    size = len(bags[0])
    result = np.empty(len(bags), dtype=np.float64)
    for start in range(0, len(bags), _BLOCK // size):
        rows = embeddings[np.asarray(bags[start : start + _BLOCK // size])].astype(np.float64)
        total = rows.sum(axis=1)
        pairs = np.einsum("bd,bd->b", total, total) - np.einsum("bkd,bkd->b", rows, rows)
        result[start : start + len(rows)] = pairs / (size * (size - 1))
    return result


def joint_embeddings(images: Float[np.ndarray, "N D"], captions: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Image embedding + mean caption embedding, L2-normalised: what NDLB's miner compares (its code).

    images unit-norm; captions: mean over the captions of an image, 0 where it has none.
    """
    joint = images + captions
    return (joint / np.linalg.norm(joint, axis=1, keepdims=True)).astype(np.float32)


def _label_codes(labels: Sequence[object], images: int) -> Int[np.ndarray, " N"]:
    """Labels as numbers from 0 on, -1 for None."""
    if len(labels) != images:
        raise DataError(f"{len(labels)} labels for {images} images: give one for each, None for those without")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(x for x in labels if x is not None))}
    return np.array([-1 if label is None else numbers[label] for label in labels], dtype=np.int32)


def _check_size(images: int, size: int) -> None:
    if size < 2:
        raise DataError(f"bags of {size} images: a bag needs 2 or more to tell apart")
    if images < size:
        raise DataError(f"{images} images can't fill a bag of {size}: bring more images or ask for smaller bags")


def _check_limits(size: int, neighbours: int, max_bags_per_image: int | None) -> None:
    if neighbours < size - 1:
        raise ConfigError(
            f"bags of {size} need {size - 1} neighbours, only {neighbours} are searched: raise neighbours"
        )
    if max_bags_per_image is not None and max_bags_per_image < 1:
        raise ConfigError(f"max_bags_per_image is {max_bags_per_image}: give 1 or more, or None for one bag per seed")
