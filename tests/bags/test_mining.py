import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from finecap_ray.bags import neighbours
from finecap_ray.bags.mining import bag_similarity, joint_embeddings, mine_bags, random_bags
from finecap_ray.errors import ConfigError, DataError


def on_circle(*degrees: float) -> np.ndarray:
    """Unit vectors at these angles: their cosine is that of the difference of the angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def clustered(images: int, width: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, images // 10), width))
    rows = centres[rng.integers(len(centres), size=images)] + 0.7 * rng.normal(size=(images, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_pairs_that_look_alike_are_found_tightest_first():
    # 10 degrees apart: rows 0, 3;  2 degrees: rows 1, 4;  5 degrees: rows 2, 5
    bags = mine_bags(on_circle(0, 90, 180, 10, 92, 185), size=2)
    assert [set(bag) for bag in bags] == [{1, 4}, {2, 5}, {0, 3}]


def test_the_seed_is_first_and_its_neighbours_follow_from_the_nearest_on():
    # row 0 in the middle has the nearest two neighbours: at 2 degrees (row 2) and 3 degrees (row 1)
    assert mine_bags(on_circle(0, 3, -2), size=3) == [(0, 2, 1)]


def test_a_seed_that_lost_its_neighbours_waits_for_better_ones():
    """Seed 2 is second best (2 degrees from row 1), but row 1 goes to row 0. Row 3, at 87 degrees, is what it has left:
    worse than the pair of 3 and 4, which goes first."""
    assert [set(bag) for bag in mine_bags(on_circle(0, 1, 3, 90, 94), size=2)] == [{0, 1}, {3, 4}]


def test_the_next_nearest_free_neighbour_is_taken():
    # 0 and 1 pair up; 2 takes 3, though 1 and 0 were nearer
    assert [set(bag) for bag in mine_bags(on_circle(0, 1, 3, 20), size=2)] == [{0, 1}, {2, 3}]


def test_an_image_whose_listed_neighbours_are_taken_is_left_over():
    # as above, but only the nearest one is searched: row 1 for row 2, row 0 for row 3
    assert [set(bag) for bag in mine_bags(on_circle(0, 1, 3, -20), size=2, neighbours=1)] == [{0, 1}]


@pytest.mark.parametrize("size", [2, 3, 5, 20])
def test_bags_are_disjoint_and_tighter_than_random_ones(size):
    embeddings = clustered(300)
    bags = mine_bags(embeddings, size)
    rows = list(itertools.chain(*bags))
    assert len(rows) == len(set(rows)) == len(bags) * size
    assert len(rows) > 0.8 * 300
    control = random_bags(300, size)
    assert len(control) == 300 // size
    mined_mean = np.mean([bag_similarity(embeddings, bag) for bag in bags])
    assert mined_mean > 0.2 + np.mean([bag_similarity(embeddings, bag) for bag in control])


def test_one_bag_per_seed():
    embeddings = clustered(200)
    bags = mine_bags(embeddings, 5, max_bags_per_image=None)
    assert sorted(bag[0] for bag in bags) == list(range(200))
    assert all(len(set(bag)) == 5 for bag in bags)
    cosines = embeddings @ embeddings.T
    for bag in bags:  # each is the seed and its four nearest
        assert set(bag) == set(np.argsort(-cosines[bag[0]])[:5].tolist())


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_image_is_in_more_bags_than_allowed(limit):
    bags = mine_bags(clustered(200), 4, max_bags_per_image=limit)
    assert np.bincount(list(itertools.chain(*bags))).max() == limit
    assert len({bag[0] for bag in bags}) == len(bags)


def test_more_copies_than_neighbours_do_not_put_an_image_in_its_own_bag():
    """Of 12 equal rows a search for 4 need not find the one that asks."""
    embeddings = np.concatenate([on_circle(*[0.0] * 12), on_circle(90, 100)])
    bags = mine_bags(embeddings, 3, neighbours=3)
    assert all(len(set(bag)) == 3 for bag in bags)
    rows = list(itertools.chain(*bags))
    assert len(rows) == len(set(rows))


def test_mining_repeats_and_its_seed_decides_between_equal_seeds():
    square = on_circle(0, 90, 180, 270)  # every row has two neighbours at the same distance
    assert mine_bags(square, 2, seed=1) == mine_bags(square, 2, seed=1)
    assert len({mine_bags(square, 2, seed=seed)[0][0] for seed in range(20)}) > 1
    embeddings = clustered(
        300
    )  # no ties: the seed changes nothing but which of two mutual neighbours is called the seed
    assert {frozenset(bag) for bag in mine_bags(embeddings, 2, 0)} == {
        frozenset(bag) for bag in mine_bags(embeddings, 2, 1)
    }


def test_the_approximate_search_finds_nearly_the_same(monkeypatch):
    embeddings = clustered(3000)
    exact = np.mean([bag_similarity(embeddings, bag) for bag in mine_bags(embeddings, 5)])
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    bags = mine_bags(embeddings, 5)
    rows = list(itertools.chain(*bags))
    assert len(rows) == len(set(rows))
    assert np.mean([bag_similarity(embeddings, bag) for bag in bags]) > exact - 0.05
    assert bags == mine_bags(embeddings, 5)


def test_near_duplicates_never_share_a_bag():
    """Rows 0, 1, 2 are one picture (within 2 degrees); 3 and 4 are 20 degrees off, on either side."""
    rows = on_circle(0, 1, 2, 21, -19)
    ceiling = math.cos(math.radians(5))
    assert [set(bag) for bag in mine_bags(rows, 3)] == [{0, 1, 2}]
    bags = mine_bags(rows, 3, near_duplicate=ceiling)
    assert len(bags) == 1 and len(set(bags[0]) & {0, 1, 2}) == 1  # two mates of a seed may be copies of each other


def test_near_duplicates_are_told_by_the_pictures():
    """Compared by something else (captions, say) rows 0 and 1 differ, but their pictures are the same."""
    compared, pictures = on_circle(0, 10, 25), on_circle(0, 0.1, 90)
    assert {frozenset(bag) for bag in mine_bags(compared, 2, near_duplicate=0.99, pictures=pictures)} == {
        frozenset({1, 2})
    }


@pytest.mark.parametrize("ceiling", [0.75, 0.7])
def test_no_pair_of_a_bag_is_above_the_ceiling(ceiling):
    embeddings = clustered(300)
    bags = mine_bags(embeddings, 4, near_duplicate=ceiling)
    assert len(bags) > 30
    for bag in bags:
        own = embeddings[list(bag)]
        assert np.triu(own @ own.T, 1).max() <= ceiling


def test_no_two_of_a_bag_have_one_label_and_those_without_are_in_none():
    # At 0, 1, 2, 3 and 8 degrees; of row 2 nothing is said. 1 and 3 differ by 2 degrees, and 0 has 4 left
    bags = mine_bags(on_circle(0, 1, 2, 3, 8), 2, labels=["red", "red", None, "blue", "green"])
    assert [set(bag) for bag in bags] == [{1, 3}, {0, 4}]
    labels = np.random.default_rng(0).choice(["red", "green", "blue", "grey", ""], 300).tolist()
    labels = [label or None for label in labels]
    bags = mine_bags(clustered(300), 3, labels=labels)
    assert len(bags) > 30
    assert all(len({labels[row] for row in bag} - {None}) == 3 for bag in bags)
    with pytest.raises(DataError, match="2 labels for 3 images"):
        mine_bags(on_circle(0, 1, 2), 2, labels=["a", "b"])


def test_image_and_captions_are_compared_together():
    # (1, 0) + (0, 1), of length sqrt(2); without captions the image alone
    joint = joint_embeddings(on_circle(0, 0), np.array([[0, 1], [0, 0]], dtype=np.float32))
    np.testing.assert_allclose(joint, [[0.5**0.5, 0.5**0.5], [1, 0]], atol=1e-6)


def test_bag_similarity_is_the_mean_over_pairs():
    # pairs at 60, 60 and 120 degrees: (0.5 + 0.5 - 0.5) / 3
    assert bag_similarity(on_circle(0, 60, 120), (0, 1, 2)) == pytest.approx(0.5 / 3, abs=1e-6)
    assert bag_similarity(on_circle(0, 30, 77), (0, 1)) == pytest.approx(math.cos(math.radians(30)), abs=1e-6)


def test_random_bags_repeat_with_their_seed():
    assert random_bags(10, 3, seed=1) == random_bags(10, 3, seed=1) != random_bags(10, 3, seed=2)


@pytest.mark.parametrize("make", [lambda size: mine_bags(on_circle(0, 1, 2), size), lambda size: random_bags(3, size)])
def test_sizes_that_cannot_be(make):
    with pytest.raises(DataError, match=r"3 images.*bag of 4"):
        make(4)
    with pytest.raises(DataError, match="bags of 1"):
        make(1)
    assert len(make(3)) == 1


def test_settings_and_embeddings_that_cannot_be():
    with pytest.raises(ConfigError, match="bags of 3 need 2 neighbours, only 1"):
        mine_bags(on_circle(0, 1, 2), 3, neighbours=1)
    with pytest.raises(ConfigError, match="max_bags_per_image is 0"):
        mine_bags(on_circle(0, 1, 2), 2, max_bags_per_image=0)
    with pytest.raises(DataError, match="1 of 3 embeddings are not unit-norm"):
        mine_bags(on_circle(0, 1, 2) * np.array([[1], [2], [1]]), 2)
    with pytest.raises(DataError, match="1 of 3"):
        mine_bags(on_circle(0, np.nan, 2), 2)


def test_faiss_and_torch_share_a_process():
    """Both bring an OpenMP runtime; in the wrong order or mixture they deadlock, so it's tried in a fresh process."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "product = lambda: torch.randn(512, 512) @ torch.randn(512, 512); product()\n"
        "import numpy as np; from finecap_ray.bags.mining import mine_bags\n"
        "rows = np.random.default_rng(0).normal(size=(500, 64)); rows /= np.linalg.norm(rows, axis=1, keepdims=True)\n"
        "bags = mine_bags(rows, 5); product(); assert bags == mine_bags(rows, 5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
