import math

import numpy as np
import pytest
import torch

from finecap_ray.errors import DataError
from finecap_ray.evaluation import retrieval
from finecap_ray.evaluation.retrieval import (
    bootstrap_gain_interval,
    bootstrap_interval,
    recall_at_1,
    recall_per_caption,
)
from finecap_ray.rewards.self_retrieval import self_retrieval_accuracy

AXES = torch.eye(3)


def test_recall_counts_first_places_and_shares_ties():
    text = AXES[[0, 1, 0, 0]]
    images = AXES[[0, 1, 2, 2]]
    target = torch.tensor([0, 1, 1, 2])
    # found, found, image 0 is better, image 0 is better
    assert recall_per_caption(text, images, target).tolist() == [1, 1, 0, 0]
    assert recall_at_1(text, images, target) == 0.5
    # without image 0 in scope, the three others are equal (cosine 0) for the last two captions
    scope = torch.tensor([[True] * 4, [True] * 4, [False, True, True, True], [False, True, True, True]])
    assert recall_at_1(text, images, target, scope) == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4)


def test_one_caption_for_all_scores_chance():
    """Bags of n equal images, or one caption for n images: 1 / n, whatever the scorer."""
    for n in (2, 3, 5, 7, 10):
        text = torch.nn.functional.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)), dim=1)
        images = torch.nn.functional.normalize(torch.ones(n, 64), dim=1)
        assert recall_at_1(text, images, torch.arange(n)) == pytest.approx(1 / n)
        assert recall_at_1(text[:1].repeat(n, 1), text, torch.arange(n)) == pytest.approx(1 / n)


@pytest.mark.parametrize("scoped", [False, True])
def test_many_captions_are_taken_in_parts(scoped, monkeypatch):
    """2,500 captions, each of one of 5 axes, are three parts. No part may hold more of the C x N numbers than its own."""
    target, shapes = torch.arange(2500) % 5, []

    def accuracy(text, images, target, scope):
        shapes.append(scope.shape)
        return self_retrieval_accuracy(text, images, target, scope)

    monkeypatch.setattr(retrieval, "self_retrieval_accuracy", accuracy)
    monkeypatch.setattr(retrieval, "_COSINES", 5 * 1024)
    said = torch.where(torch.arange(2500) < 2000, target, (target + 1) % 5)  # the last 500 say another one
    scope = torch.ones(2500, 5, dtype=torch.bool) if scoped else None
    found = recall_per_caption(torch.eye(5)[said], torch.eye(5), target, scope)
    assert found.tolist() == [1] * 2000 + [0] * 500
    assert shapes == [(1024, 5), (1024, 5), (452, 5)]


def test_recall_of_nothing_is_an_error():
    with pytest.raises(DataError, match="0 captions"):
        recall_at_1(AXES[:0], AXES, torch.tensor([], dtype=torch.long))


def test_the_interval_is_that_of_the_mean_over_bags():
    """One value a bag: the mean of B draws has the standard error sqrt(p (1 - p) / B), and 95 % are 1.96 of it."""
    values = [np.array([1.0])] * 300 + [np.array([0.0])] * 700
    low, high = bootstrap_interval(values, samples=4000, seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)
    low_50, high_50 = bootstrap_interval(values, samples=4000, seed=0, level=0.5)
    half = 0.6745 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low_50, high_50) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)


def test_bags_are_drawn_whole():
    """With five equal values per bag there are 100 facts, not 500: the interval is sqrt(5) as wide as that of 500."""
    values = np.repeat([1.0, 0.0], 50)
    bags = bootstrap_interval([np.repeat(value, 5) for value in values], samples=4000, seed=0)
    captions = bootstrap_interval([np.array([value]) for value in np.repeat(values, 5)], samples=4000, seed=0)
    assert (bags[1] - bags[0]) / (captions[1] - captions[0]) == pytest.approx(math.sqrt(5), rel=0.05)


def test_bags_weigh_by_their_captions():
    # every draw of one bag has the mean of that bag
    assert bootstrap_interval([np.array([1.0, 0.0, 0.0])], samples=100, seed=0) == pytest.approx((1 / 3, 1 / 3))
    # draws of two bags: (1, 1), (1, 2) or (2, 2), with means 1, 1 / 4 and 0 -> extremes 0 and 1
    assert bootstrap_interval([np.array([1.0]), np.zeros(3)], samples=1000, seed=0) == (0.0, 1.0)


def test_a_gain_of_the_same_on_every_bag_is_certain():
    rng = np.random.default_rng(0)
    before = [rng.random(5) for _ in range(50)]
    after = [values + 0.25 for values in before]
    assert bootstrap_gain_interval(before, after, samples=500, seed=0) == pytest.approx((0.25, 0.25))
    low, high = bootstrap_interval(before, samples=500, seed=0)
    assert high - low > 0.05


def test_the_interval_repeats_with_its_seed():
    values = [np.array([float(bag % 3 == 0)]) for bag in range(100)]
    assert bootstrap_interval(values, 500, seed=1) == bootstrap_interval(values, 500, seed=1)


def test_bags_that_do_not_fit():
    with pytest.raises(DataError, match="0 of 0 bags"):
        bootstrap_interval([], 100, 0)
    with pytest.raises(DataError, match="1 of 2 bags"):
        bootstrap_interval([np.array([1.0]), np.array([])], 100, 0)
    with pytest.raises(DataError, match="1 before and 2 after"):
        bootstrap_gain_interval([np.ones(1)], [np.ones(1)] * 2, 100, 0)
