import numpy as np
import pytest
import torch

from finecap_ray.errors import DataError, RewardError
from finecap_ray.evaluation.pools import Pool, PoolSet, all_images, random_pools
from finecap_ray.evaluation.ranking import Places, place_captions, retrieval_numbers


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    draws = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draws, dim=1)


def placed(pools: PoolSet, images: torch.Tensor, text: torch.Tensor, ids: list[str]) -> Places:
    rows = {image_id: row for row, image_id in enumerate(ids)}
    return place_captions(pools.pools, rows, images, {image_id: [row] for image_id, row in rows.items()}, text)


def test_ties_are_shared():
    # better 0, tied 1 | better 0, tied 4 | better 3, tied 2
    places = Places(np.array([0.0, 0, 3]), np.array([1.0, 4, 2]), np.zeros(3), np.arange(3))
    assert places.rank.tolist() == [1, 2.5, 4.5]
    assert places.found_within(1).tolist() == [1, 1 / 4, 0]
    assert places.found_within(4).tolist() == [1, 1, 1 / 2]  # the last one stands on place 4 or 5


def test_identical_images_and_captions_score_one_in_n():
    for n in (2, 3, 5, 7, 10):
        ids = [f"i{row}" for row in range(n)]
        pools = PoolSet(f"bags of {n}", n, (Pool(tuple(ids), tuple(range(n))),), dependent=True)
        same = unit(1, 64, n).repeat(n, 1)
        places = placed(pools, same, unit(1, 64, 99).repeat(n, 1), ids)
        numbers = retrieval_numbers(pools, places, 100, 0)
        assert numbers["recall_at_1"]["value"] == pytest.approx(1 / n)
        assert numbers["mean_rank"]["value"] == numbers["median_rank"]["value"] == (n + 1) / 2


def test_chance_and_oracle_on_rd100():
    ids = [f"i{row}" for row in range(1000)]
    images = unit(1000, 32, 0)
    pools = random_pools(ids, 100, seed=0)
    by_chance = retrieval_numbers(pools, placed(pools, images, unit(1000, 32, 1), ids), 2000, 0)
    for k, share in ((1, 0.01), (5, 0.05), (10, 0.10)):
        assert by_chance[f"recall_at_{k}"]["low"] <= share <= by_chance[f"recall_at_{k}"]["high"]
    assert by_chance["mean_rank"]["low"] <= 50.5 <= by_chance["mean_rank"]["high"]
    oracle = retrieval_numbers(pools, placed(pools, images, images, ids), 200, 0)
    assert oracle["recall_at_1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert oracle["median_rank"]["value"] == 1
    assert (oracle["n"], oracle["pools"], oracle["chance"]) == (1000, 10, 0.01)


def test_chunks_change_nothing():
    """1,500 captions are ranked in two chunks; by hand with one product."""
    ids = [f"i{row}" for row in range(1500)]
    images, text = unit(1500, 8, 0), unit(1500, 8, 1)
    cosines = text @ images.T
    rank = 1 + (cosines > cosines.diagonal()[:, None]).sum(dim=1).double()
    places = placed(all_images(ids), images, text, ids)
    assert np.abs(places.rank - rank.numpy()).max() <= 1  # rounding may turn two neighbours around


def test_only_images_with_captions_are_asked_about_and_each_caption_counts():
    images = torch.eye(2)
    pools = PoolSet("bags of 2", 2, (Pool(("a", "b"), (0, 1)),), dependent=True)
    places = place_captions(pools.pools, {"a": 0, "b": 1}, images, {"a": [0, 1, 1]}, torch.eye(2))
    assert places.found_within(1).tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="none of the images of 1 pools has a caption"):
        place_captions(pools.pools, {"a": 0, "b": 1}, images, {}, torch.eye(2))


def test_a_caption_without_an_embedding_is_no_find():
    pools = PoolSet("bags of 2", 2, (Pool(("a", "b"), (0, 1)),), dependent=True)
    with pytest.raises(RewardError, match="similarities of 1 of 2 captions aren't all numbers"):
        placed(pools, torch.eye(2), torch.tensor([[1, 0], [torch.nan, torch.nan]]), ["a", "b"])
    assert placed(pools, torch.eye(2), torch.zeros(2, 2), ["a", "b"]).found_within(1).tolist() == [1 / 2, 1 / 2]


def test_the_interval_over_bags_is_wider_than_over_captions():
    """100 bags of 5 whose captions all hit or all miss are 100 facts: sqrt(5) times as wide as 500."""
    better = np.repeat([0.0, 1.0], 250)
    places = Places(better, np.ones(500), np.repeat(np.arange(100), 5), np.arange(500))
    width = {}
    for dependent in (True, False):
        pools = PoolSet("bags of 5", 5, (Pool(tuple("abcde"), (0, 1, 2, 3, 4)),) * 100, dependent)
        recall = retrieval_numbers(pools, places, 4000, 0)["recall_at_1"]
        assert recall["value"] == 0.5
        width[dependent] = recall["high"] - recall["low"]
    assert width[True] / width[False] == pytest.approx(5**0.5, rel=0.06)
    # 95 % of a mean of 100 coins
    assert width[True] == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.06)


def test_the_captions_of_an_image_are_drawn_together():
    """As with bags: five captions that all hit or all miss are one fact, also where the pools are random."""
    better = np.repeat([0.0, 1.0], 250)
    pools = PoolSet("5 random images", 5, (Pool(tuple("abcde"), (0,)),), dependent=False)
    width = {}
    for name, image in (("five", np.repeat(np.arange(100), 5)), ("one", np.arange(500))):
        recall = retrieval_numbers(pools, Places(better, np.ones(500), np.zeros(500), image), 4000, 0)["recall_at_1"]
        width[name] = recall["high"] - recall["low"]
    assert width["five"] / width["one"] == pytest.approx(5**0.5, rel=0.06)


@pytest.mark.parametrize("dependent", [True, False])
def test_an_image_counts_with_the_mean_of_its_captions(dependent):
    # image 0: four captions, three of them find it; image 1: one, which doesn't
    places = Places(np.array([0.0, 0, 0, 1, 1]), np.ones(5), np.zeros(5), np.array([0, 0, 0, 0, 1]))
    pools = PoolSet("bags of 2", 2, (Pool(("a", "b"), (0, 1)),), dependent)
    numbers = retrieval_numbers(pools, places, 500, 0)
    assert numbers["n"] == 5 and numbers["recall_at_1"]["value"] == pytest.approx((3 / 4 + 0) / 2)
    assert numbers["mean_rank"]["value"] == pytest.approx((5 / 4 + 2) / 2)
    assert numbers["median_rank"]["value"] == 2  # 5/8 of the weight is at rank 2


def test_the_median_is_the_lower_middle():
    places = Places(np.array([0.0, 1, 5, 9]), np.ones(4), np.zeros(4), np.arange(4))
    pools = PoolSet("all 10 images", 10, (Pool(tuple("abcdefghij"), (0,)),), dependent=False)
    numbers = retrieval_numbers(pools, places, 500, 0)
    assert numbers["median_rank"]["value"] == 2 and numbers["median_rank"]["low"] >= 1
    assert "recall_at_10" not in numbers  # every image of 10 is among the first 10
