import math

import pytest
import torch

from finecap_ray.errors import RewardError
from finecap_ray.rewards.self_retrieval import (
    bag_scope,
    retrieval_rank,
    self_retrieval_accuracy,
    self_retrieval_rewards,
)

# Two captions and three images on the axes of a plane: similarities are 1, 0 and -1.
TEXT = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
TARGET = torch.tensor([0, 2])
ALL = torch.ones(2, 3, dtype=torch.bool)


def random_unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_reward_is_the_log_softmax_at_the_own_image():
    rewards = self_retrieval_rewards(TEXT, IMAGES, TARGET, ALL, logit_scale=2.0)
    # caption 0: similarities (1, 0, -1), own 1;  caption 1: (0, 1, 0), own 0 (image 2)
    expected = [
        2 - math.log(math.exp(2) + 1 + math.exp(-2)),
        0 - math.log(1 + math.exp(2) + 1),
    ]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_only_images_in_scope_compete():
    scope = torch.tensor([[True, False, True], [True, False, True]])
    rewards = self_retrieval_rewards(TEXT, IMAGES, TARGET, scope, logit_scale=2.0)
    # caption 0: (1, -1), own 1;  caption 1: (0, 0): a tie of two
    torch.testing.assert_close(rewards, torch.tensor([2 - math.log(math.exp(2) + math.exp(-2)), -math.log(2)]))
    torch.testing.assert_close(retrieval_rank(TEXT, IMAGES, TARGET, scope), torch.tensor([1.0, 1.5]))
    torch.testing.assert_close(self_retrieval_accuracy(TEXT, IMAGES, TARGET, scope), torch.tensor([1.0, 0.5]))


def test_an_image_alone_in_scope_is_certain():
    scope = torch.tensor([[True, False, False], [False, False, True]])
    assert self_retrieval_rewards(TEXT, IMAGES, TARGET, scope, 100.0).tolist() == [0.0, 0.0]


def test_rank_counts_the_better_and_shares_ties():
    # caption 1: image 1 is better, images 0 and 2 tie for ranks 2 and 3 -> 2.5
    assert retrieval_rank(TEXT, IMAGES, TARGET, ALL).tolist() == [1.0, 2.5]
    assert self_retrieval_accuracy(TEXT, IMAGES, TARGET, ALL).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("n", [2, 3, 5, 17])
def test_equal_images_share_the_reward(n):
    image = random_unit(1, 384, seed=n)
    images = torch.cat([random_unit(n, 384, seed=100 + n), image.expand(n, -1), random_unit(40, 384, seed=200 + n)])
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(n))]
    target = (images == image).all(dim=1).nonzero().squeeze(1)
    text = image.expand(n, -1)
    scope = torch.ones(n, len(images), dtype=torch.bool)
    assert self_retrieval_accuracy(text, images, target, scope).tolist() == pytest.approx([1 / n] * n)
    assert retrieval_rank(text, images, target, scope).tolist() == [(n + 1) / 2] * n
    # the others are at a cosine far below 1, so at scale 100 only the n equal images are left: log(1 / n)
    rewards = self_retrieval_rewards(text, images, target, scope, logit_scale=100.0)
    assert rewards.tolist() == pytest.approx([-math.log(n)] * n, abs=1e-6)
    assert len(set(rewards.tolist())) == 1


@pytest.mark.parametrize("width", [64, 256, 384, 512, 513])
@pytest.mark.parametrize("images", [2, 5, 7, 10, 17, 101])
def test_ties_are_exact_for_a_single_caption(width, images):
    """A product of one row goes through kernels whose sums differ from column to column: a plain `text @ images.T`
    breaks these ties in the last bit, and one image then gets all."""
    image, text = random_unit(1, width, seed=0), random_unit(1, width, seed=1)
    arguments = text, image.repeat(images, 1), torch.tensor([images - 1]), torch.ones(1, images, dtype=torch.bool)
    assert self_retrieval_accuracy(*arguments).tolist() == pytest.approx([1 / images])
    assert retrieval_rank(*arguments).tolist() == [(images + 1) / 2]


@pytest.mark.parametrize("captions", [3, 5])
def test_equal_captions_score_the_same(captions):
    text, images = random_unit(1, 64, seed=0).repeat(captions, 1), random_unit(3, 64, seed=1)
    target, scope = torch.zeros(captions, dtype=torch.long), torch.ones(captions, 3, dtype=torch.bool)
    assert len(set(self_retrieval_rewards(text, images, target, scope, 100.0).tolist())) == 1


def test_equal_captions_of_different_images_win_once():
    """One caption for two images finds one of them: together they get an accuracy of 1, not of 2."""
    text = random_unit(1, 64, seed=0).expand(2, -1)
    images = random_unit(2, 64, seed=1)
    target = torch.tensor([0, 1])
    scope = torch.ones(2, 2, dtype=torch.bool)
    assert self_retrieval_accuracy(text, images, target, scope).sum().item() == 1.0
    # the two probabilities of one softmax: exp(R_0) + exp(R_1) = 1
    assert self_retrieval_rewards(text, images, target, scope, 20.0).exp().sum().item() == pytest.approx(1.0)


def test_results_do_not_depend_on_the_order_of_the_images():
    text, images = random_unit(30, 384, seed=2), random_unit(30, 384, seed=3)
    target = torch.arange(30)
    bags = torch.arange(30) // 5
    scope = bag_scope(bags, bags)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    place = torch.argsort(order)  # where an image went
    rewards = self_retrieval_rewards(text, images, target, scope, 50.0)
    moved = self_retrieval_rewards(text, images[order], place[target], scope[:, order], 50.0)
    torch.testing.assert_close(moved, rewards, rtol=0, atol=1e-5)


def test_half_precision_embeddings_are_scored_in_float32():
    rewards = self_retrieval_rewards(TEXT.half(), IMAGES.half(), TARGET, ALL, logit_scale=100.0)
    assert rewards.dtype == torch.float32
    # (0, 1, 0) at scale 100: own image 0 - log(2 + e^100) = -100
    assert rewards.tolist() == pytest.approx([0.0, -100.0])


def test_bag_scope_is_the_own_bag():
    scope = bag_scope(torch.tensor([0, 0, 7]), torch.tensor([7, 0]))
    assert scope.tolist() == [[False, True], [False, True], [True, False]]


def test_an_own_image_out_of_scope_is_refused():
    scope = torch.tensor([[False, True, True], [True, True, True]])
    with pytest.raises(ValueError, match="1 of 2 captions"):
        self_retrieval_rewards(TEXT, IMAGES, TARGET, scope, 1.0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_similarity_that_is_no_number_never_wins(wrong):
    text = TEXT.clone()
    text[1, 0] = wrong
    for score in (retrieval_rank, self_retrieval_accuracy, lambda *among: self_retrieval_rewards(*among, 1.0)):
        with pytest.raises(RewardError, match="similarities of 1 of 2 captions aren't all numbers"):
            score(text, IMAGES, TARGET, ALL)


def test_a_text_that_says_nothing_ties_with_all():
    assert self_retrieval_accuracy(torch.zeros(2, 2), IMAGES, TARGET, ALL).tolist() == pytest.approx([1 / 3] * 2)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\) and images \(3, 1\)"):
        retrieval_rank(TEXT, IMAGES[:, :1], TARGET, ALL)
    with pytest.raises(ValueError, match=r"not \(1,\)"):
        retrieval_rank(TEXT, IMAGES, TARGET[:1], ALL)
