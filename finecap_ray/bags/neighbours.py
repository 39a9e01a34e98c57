"""The nearest images of every image, by cosine: exactly for small sets, by an inverted file of compressed vectors above.

Look-alikes are a few dense spots in a space that is otherwise all equally far. There a search that walks a graph has
nothing to follow, and an inverted file has to look into many cells; so what counts is that looking is cheap. Vectors are
held as 4-bit product codes (half a bit a number), which faiss scans from registers, some 20 times as fast as the vectors
themselves; the best of them are then ordered anew by their exact cosines.

The number of cells probed is doubled until a sample of images finds enough of its true neighbours, as an exact search
tells them. That recall is part of the result, for whoever writes it down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from finecap_ray.errors import DataError

EXACT_UP_TO = 20_000  # images; the exact search of so many x 512 takes 8 s on 2 cores, and grows with N^2
QUERIES = 1000  # images that recall is measured on
_BLOCK = 4096  # queries searched at a time
_NUMBERS_PER_CODE, _FEWEST_CODES = 8, 32  # of a vector, that share a code of 4 bits; fewer where vectors are narrow
_CELLS_PER_ROOT = 4  # cells = 4 sqrt(N), as faiss advises
_TRAINED_ON = 40  # vectors per cell for the k-means
_FIRST_PROBES = 8


@dataclass(frozen=True, slots=True)
class Search:
    """How neighbours were searched, and how many of the true ones were found."""

    kind: Literal["exact", "inverted_file"]
    recall: float  # share of the `depth` true neighbours that were found, over the images tried
    depth: int
    queries: int  # images tried; 0 for an exact search
    cells: int
    probed: int  # cells looked into per image


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The other images nearest to each one, from the nearest on."""

    similarity: Float[np.ndarray, "N M"]  # float32 cosines
    rows: Int[np.ndarray, "N M"]  # int32; -1 where the search found fewer
    search: Search


def find_neighbours(
    embeddings: Float[np.ndarray, "N D"], count: int, *, depth: int, target_recall: float
) -> Neighbours:
    """The `count` nearest others of every image (N - 1, where there are fewer).

    embeddings: unit-norm; float32 isn't copied. depth: how many of the nearest ones recall is measured for. target_recall
    is what the approximate search tries to reach; it gives up at a quarter of its cells. Equal input gives equal output.
    Raises DataError for embeddings that are not unit-norm.
    """
    embeddings = _checked(embeddings)
    count = min(count, len(embeddings) - 1)
    depth = min(depth, count)
    similarity = np.empty((len(embeddings), count), dtype=np.float32)
    rows = np.empty((len(embeddings), count), dtype=np.int32)
    index, search = None, Search("exact", 1.0, depth, 0, 0, 0)
    if len(embeddings) > EXACT_UP_TO:
        index, search = _inverted_file(embeddings, count, depth, target_recall)
    for start in range(0, len(embeddings), _BLOCK):
        queries = np.arange(start, min(start + _BLOCK, len(embeddings)))
        if index is None:
            found_similarity, found = _exact(embeddings, queries, count + 1)
        else:
            found_similarity, found = _compressed(index, embeddings, queries, count + 1)
        # The image itself is among its neighbours, but behind its exact copies; with many copies it isn't found at all,
        # and then the last of them goes.
        own = found == queries[:, None]
        own[~own.any(axis=1), -1] = True
        similarity[queries] = found_similarity[~own].reshape(len(queries), count)
        rows[queries] = found[~own].reshape(len(queries), count)
    return Neighbours(similarity, rows, search)


def _checked(embeddings: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    off = int((~(np.abs(norms - 1) < 1e-2)).sum())  # 1e-2: what is left after a way through float16; NaN counts as off
    if off:
        raise DataError(
            f"{off} of {len(embeddings)} embeddings are not unit-norm (norms {norms.min():.3g} to {norms.max():.3g})"
        )
    return embeddings


def _exact(
    embeddings: Float[np.ndarray, "N D"], queries: Int[np.ndarray, " Q"], count: int
) -> tuple[Float[np.ndarray, "Q M"], Int[np.ndarray, "Q M"]]:
    """Cosines and rows of the nearest, the query itself among them; faiss's flat index would copy the vectors."""
    import faiss  # here: 0.25 s, 13 MB and an OpenMP and BLAS of its own, for mining alone

    return faiss.knn(embeddings[queries], embeddings, count, metric=faiss.METRIC_INNER_PRODUCT)


def _inverted_file(
    embeddings: Float[np.ndarray, "N D"], count: int, depth: int, target_recall: float
) -> tuple[object, Search]:
    """The index with as many probes as the target takes, and what was measured on the way."""
    import faiss

    images, width = embeddings.shape
    cells = int(_CELLS_PER_ROOT * math.sqrt(images))
    numbers = math.gcd(width, _NUMBERS_PER_CODE)
    while numbers % 2 == 0 and width // numbers < _FEWEST_CODES:
        numbers //= 2
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(width), width, cells, width // numbers, 4, faiss.METRIC_INNER_PRODUCT
    )
    index.by_residual = False  # one table of products per query, not one per query and cell
    index.cp.spherical, index.cp.niter = True, 5  # k-means from faiss's fixed seed: the same cells every time
    sample = np.random.default_rng(0).permutation(images)[: cells * _TRAINED_ON]
    index.train(embeddings[np.sort(sample)])
    for block in _blocks(embeddings):
        index.add(block)

    tried = np.sort(np.random.default_rng(1).permutation(images)[:QUERIES])
    truth = _exact(embeddings, tried, depth + 1)[1]
    index.nprobe = min(_FIRST_PROBES, cells)
    while True:
        found = _compressed(index, embeddings, tried, count + 1)[1][:, : depth + 1]
        recall = float(np.mean([_share_found(*rows) for rows in zip(tried, truth, found, strict=True)]))
        if recall >= target_recall or index.nprobe * 2 > cells // 4:
            return index, Search("inverted_file", recall, depth, len(tried), cells, index.nprobe)
        index.nprobe *= 2


def _blocks(embeddings: Float[np.ndarray, "N D"], size: int = 2**16) -> Iterator[Float[np.ndarray, "n D"]]:
    for start in range(0, len(embeddings), size):
        yield embeddings[start : start + size]


def _share_found(own: int, truth: Int[np.ndarray, " M"], found: Int[np.ndarray, " M"]) -> float:
    wanted = set(truth.tolist()) - {own}
    return len(wanted & set(found.tolist())) / len(wanted)


def _compressed(
    index, embeddings: Float[np.ndarray, "N D"], queries: Int[np.ndarray, " Q"], count: int
) -> tuple[Float[np.ndarray, "Q M"], Int[np.ndarray, "Q M"]]:
    """Exact cosines and rows of the nearest by their codes, the query itself among them; -1 goes last."""
    import faiss

    wanted = embeddings[queries]
    rows = index.search(wanted, count)[1]
    similarity = np.empty(rows.shape, dtype=np.float32)  # -inf where a row is -1
    faiss.fvec_inner_products_by_idx(
        *(faiss.swig_ptr(array) for array in (similarity, wanted, embeddings, rows)), embeddings.shape[1], *rows.shape
    )
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(rows, order, axis=1)
