"""The search for neighbours: exact and by compressed vectors."""

import numpy as np
import pytest

from finecap_ray.bags import neighbours
from finecap_ray.bags.neighbours import find_neighbours
from finecap_ray.errors import DataError


def families(images: int, width: int = 64, seed: int = 0) -> np.ndarray:
    """Tens of images at cosine 0.8 to their centre."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(images // 10, width)), 10, axis=0)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    noise = rng.normal(size=centres.shape)
    noise -= (noise * centres).sum(axis=1, keepdims=True) * centres
    return (0.8 * centres + 0.6 * noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float32)


def test_the_exact_search_finds_the_nearest_others_from_the_nearest_on():
    rows = families(100)
    found = find_neighbours(rows, 5, depth=5, target_recall=1.0)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(found.rows, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_allclose(found.similarity, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)
    assert found.search.kind == "exact" and found.search.recall == 1


@pytest.mark.parametrize("width", [64, 60, 35])  # 2, 1 and 1 numbers to a code
def test_the_search_of_compressed_vectors_finds_what_it_says_it_does(monkeypatch, width):
    rows = families(3000, width)
    exact = find_neighbours(rows, 20, depth=9, target_recall=0.97)
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    found = find_neighbours(rows, 20, depth=9, target_recall=0.97)
    shares = [len(set(a[:9]) & set(b[:9])) / 9 for a, b in zip(exact.rows.tolist(), found.rows.tolist(), strict=True)]
    assert found.search.kind == "inverted_file" and found.search.recall >= 0.97
    assert np.mean(shares) == pytest.approx(found.search.recall, abs=0.02)  # of 1000 images out of 3000
    # Cosines are exact, whatever the codes say, and in order.
    there = found.rows >= 0
    cosines = np.einsum("nd,nkd->nk", rows, rows[found.rows])
    np.testing.assert_allclose(found.similarity[there], cosines[there], atol=1e-5)
    assert (np.diff(found.similarity, axis=1) <= 0).all()
    assert not (found.rows == np.arange(3000)[:, None]).any()


def test_more_cells_are_probed_until_enough_is_found(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    rows = families(3000)
    few, many = (find_neighbours(rows, 20, depth=9, target_recall=target).search for target in (0.5, 0.999))
    assert few.probed < many.probed <= many.cells // 4 + 1
    assert few.recall <= many.recall


def test_searching_again_gives_the_same(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    first, second = (find_neighbours(families(2000), 10, depth=4, target_recall=0.9) for _ in range(2))
    np.testing.assert_array_equal(first.rows, second.rows)
    assert first.search == second.search


def test_embeddings_that_are_not_unit_norm_are_refused():
    with pytest.raises(DataError, match="1 of 10 embeddings are not unit-norm"):
        find_neighbours(families(10) * np.array([[2.0]] + [[1.0]] * 9, dtype=np.float32), 2, depth=1, target_recall=1)
