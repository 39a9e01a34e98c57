"""Mining: put images that look alike into bags, so that only a caption that says what is special finds its image.

A bag is a seed and its nearest neighbours (BagCurri of NDLB 2024). Bags are disjoint by default, and a seed that takes
an image takes it from other seeds; so the seeds with the most similar neighbourhoods go first. When earlier bags have
taken some of a seed's neighbours, the next nearest free ones make it less similar than it was, and it goes back into
the queue with its new score. Scores only ever fall, so a seed whose score is up to date and on top of the queue is the
best one there is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from finecap_ray.errors import ConfigError, DataError

EXACT_UP_TO = 50_000  # images; the exact search of 50,000 x 256 takes 55 s on 2 cores, and grows with N^2
PROBED_SHARE = 1 / 16  # of the cells of an inverted file: finds 99.5 % of the 4 nearest of 50,000, in half the time


def mine_bags(
    embeddings: Float[np.ndarray, "N D"],
    size: int,
    seed: int = 0,
    *,
    max_bags_per_image: int | None = 1,
    neighbours: int = 64,
) -> list[tuple[int, ...]]:
    """Bags of `size` row numbers each, tightest first; in a bag the seed, then its neighbours from the nearest on.

    embeddings: float32, unit-norm. max_bags_per_image: 1 for disjoint bags, None for one bag per seed. A seed is the
    first image of one bag at most. It looks among its `neighbours` nearest images only: an image that can't fill a bag
    from those, and is in no other, is left over (in no bag). `seed` decides between seeds of exactly equal score.

    Raises DataError for fewer images than `size`, a size below 2 or embeddings that are not unit-norm, and ConfigError
    for fewer neighbours than a bag needs.
    """
    _check_size(len(embeddings), size)
    if neighbours < size - 1:
        raise ConfigError(
            f"bags of {size} need {size - 1} neighbours, only {neighbours} are searched: raise neighbours"
        )
    if max_bags_per_image is not None and max_bags_per_image < 1:
        raise ConfigError(f"max_bags_per_image is {max_bags_per_image}: give 1 or more, or None for one bag per seed")
    similarity, nearest = _nearest(_checked(embeddings), min(neighbours, len(embeddings) - 1))

    limit = math.inf if max_bags_per_image is None else max_bags_per_image
    uses = np.zeros(len(embeddings), dtype=np.int64)
    tie_break = np.random.default_rng(seed).permutation(len(embeddings)).tolist()

    def best_bag(row: int) -> tuple[float, tuple[int, ...]] | None:
        """Mean similarity of the seed to its nearest free neighbours, and the bag of them; None where they run out."""
        free = np.flatnonzero((nearest[row] >= 0) & (uses[nearest[row]] < limit))[: size - 1]
        if len(free) < size - 1:
            return None
        return float(similarity[row, free].mean(dtype=np.float64)), (row, *nearest[row, free].tolist())

    queue = []
    for row in range(len(embeddings)):
        if (best := best_bag(row)) is not None:
            queue.append((-best[0], tie_break[row], row))
    heapq.heapify(queue)

    bags = []
    while queue:
        negative_score, order, row = heapq.heappop(queue)
        if uses[row] >= limit or (best := best_bag(row)) is None:
            continue
        score, bag = best
        if score < -negative_score:
            heapq.heappush(queue, (-score, order, row))
            continue
        bags.append(bag)
        uses[list(bag)] += 1
    return bags


def random_bags(images: int, size: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Disjoint bags of `size` rows drawn at random, the control for mined ones; images mod size are left over."""
    _check_size(images, size)
    order = np.random.default_rng(seed).permutation(images).tolist()
    return [tuple(order[start : start + size]) for start in range(0, images - size + 1, size)]


def bag_similarity(embeddings: Float[np.ndarray, "N D"], bag: tuple[int, ...]) -> float:
    """Mean cosine over the pairs of a bag: (|sum of v|^2 - sum of |v|^2) / (K (K - 1))."""
    rows = np.asarray(embeddings[list(bag)], dtype=np.float64)
    total = rows.sum(axis=0)
    return float((total @ total - (rows * rows).sum()) / (len(bag) * (len(bag) - 1)))


def _check_size(images: int, size: int) -> None:
    if size < 2:
        raise DataError(f"bags of {size} images: a bag needs 2 or more to tell apart")
    if images < size:
        raise DataError(f"{images} images can't fill a bag of {size}: bring more images or ask for smaller bags")


def _checked(embeddings: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    norms = np.linalg.norm(embeddings, axis=1)
    off = int((~(np.abs(norms - 1) < 1e-2)).sum())  # 1e-2: what is left after a way through float16; NaN counts as off
    if off:
        raise DataError(
            f"{off} of {len(embeddings)} embeddings are not unit-norm (norms {norms.min():.3g} to {norms.max():.3g})"
        )
    return embeddings


def _nearest(
    embeddings: Float[np.ndarray, "N D"], count: int
) -> tuple[Float[np.ndarray, "N M"], Int[np.ndarray, "N M"]]:
    """Cosines and rows of the `count` nearest other images, nearest first; -1 where an inverted file finds fewer."""
    similarity = np.empty((len(embeddings), count), dtype=np.float32)
    nearest = np.empty((len(embeddings), count), dtype=np.int64)
    for start, found_similarity, found in _search(embeddings, count + 1):
        rows = np.arange(start, start + len(found))
        # The image itself is among its neighbours, but behind its exact copies; with many copies it isn't found at all,
        # and then the last of them goes.
        own = found == rows[:, None]
        own[~own.any(axis=1), -1] = True
        similarity[rows] = found_similarity[~own].reshape(len(found), count)
        nearest[rows] = found[~own].reshape(len(found), count)
    return similarity, nearest


def _search(
    embeddings: Float[np.ndarray, "N D"], count: int
) -> Iterator[tuple[int, Float[np.ndarray, "n M"], Int[np.ndarray, "n M"]]]:
    """(first row, cosines, rows) of the nearest images by inner product, a block of queries at a time."""
    import faiss  # here: 0.25 s, 13 MB and an OpenMP and BLAS of its own, for mining alone

    index = faiss.IndexFlatIP(embeddings.shape[1])
    if len(embeddings) > EXACT_UP_TO:
        cells = int(4 * math.sqrt(len(embeddings)))
        index = faiss.IndexIVFFlat(index, embeddings.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = math.ceil(cells * PROBED_SHARE)
        index.train(embeddings)  # k-means from a fixed seed: the same cells every time
    index.add(embeddings)
    block = 4096
    for start in range(0, len(embeddings), block):
        yield start, *index.search(embeddings[start : start + block], count)
