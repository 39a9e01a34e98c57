"""Does the policy gradient of each advantage point where it should? A softmax policy whose gradient is a finite sum.

N images, V captions of one token each, logits x_i W. Of a step of G captions per image,

    g = 1/(N G) sum_ig A_ig grad log p(a_ig | x_i),     exact: grad 1/N sum_i sum_a p(a | x_i) r_i(a)

An estimate is the mean over many steps; its standard error is their deviation over the root of their number.
"""

import itertools
import math
from functools import partial

import pytest
import torch

from finecap_ray.training.advantages import (
    RunningMean,
    batch_mean,
    greedy,
    group_mean,
    group_normalised,
    leave_one_out,
)

STEPS, CAPTIONS = 40_000, 3  # G
FEATURES = torch.tensor([[1.0, 0.5], [-0.3, 1.2]], dtype=torch.float64)  # x [N, F]
POLICY = torch.tensor([[0.4, -0.2, 0.1], [-0.5, 0.3, 0.6]], dtype=torch.float64)  # W [F, V]
REWARDS = torch.tensor([[-0.2, -1.5, -3.0], [-2.0, -0.1, -1.0]], dtype=torch.float64)  # r [N, V], log-probabilities
IMAGES, VOCABULARY = REWARDS.shape


def probabilities():
    return (FEATURES @ POLICY).softmax(-1)  # [N, V]


def exact_gradient(rewards=REWARDS):
    """By autograd: [F, V]."""
    policy = POLICY.clone().requires_grad_()
    ((FEATURES @ policy).softmax(-1) * rewards).sum(-1).mean().backward()
    return policy.grad


def step_gradients(actions, advantages):
    """[S, N, G] captions and their advantages -> the gradient of each step [S, F, V]; grad log p(a) = x (onehot(a) - p)."""
    scores = torch.nn.functional.one_hot(actions, VOCABULARY) - probabilities()[:, None]  # [S, N, G, V]
    return torch.einsum("nf,sngv,sng->sfv", FEATURES, scores, advantages) / (IMAGES * actions.shape[-1])


def sampled(estimator, steps=STEPS, captions=CAPTIONS):
    """Gradients of many steps [S, F, V]: captions drawn from the policy, advantages of the estimator."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.multinomial(probabilities(), steps * captions, replacement=True, generator=generator)
    actions = actions.view(IMAGES, steps, captions).transpose(0, 1)
    rewards = REWARDS.expand(steps, -1, -1).gather(2, actions)
    return step_gradients(actions, estimator(rewards))


def each_step(advantage):
    return torch.vmap(advantage)


def one_after_another(rewards):
    baseline = RunningMean()
    return torch.stack([baseline(step) for step in rewards])


def nothing(rewards):
    return rewards


GREEDY = each_step(partial(greedy, greedy_rewards=REWARDS.gather(1, probabilities().argmax(1, keepdim=True))[:, 0]))

# Estimator -> by how much its expectation is short of the exact gradient.
UNBIASED_UP_TO = {
    "none": (nothing, 1.0),
    "leave_one_out": (each_step(leave_one_out), 1.0),
    "running_mean": (one_after_another, 1.0),
    "greedy": (GREEDY, 1.0),
    # The baseline holds the caption's own reward: (r - mean) is (G - 1) / G of the leave-one-out advantage ...
    "group_mean": (each_step(group_mean), (CAPTIONS - 1) / CAPTIONS),
    # ... and of a mean over all captions of the step, 1 / (N G) is the own reward.
    "batch_mean": (each_step(batch_mean), 1 - 1 / (IMAGES * CAPTIONS)),
}


def standard_errors(gradients, expected):
    """How many standard errors the mean of the steps lies away from `expected`: the largest of all parameters."""
    error = gradients.std(dim=0) / math.sqrt(len(gradients))
    return ((gradients.mean(dim=0) - expected) / error).abs().max()


@pytest.mark.parametrize("name", UNBIASED_UP_TO)
def test_the_mean_gradient_is_the_exact_one_up_to_a_known_factor(name):
    estimator, factor = UNBIASED_UP_TO[name]
    gradients = sampled(estimator)
    assert standard_errors(gradients, factor * exact_gradient()) < 3
    # The test can tell: half the exact gradient is far off.
    assert standard_errors(gradients, 0.5 * exact_gradient()) > 6


def test_a_mean_that_holds_the_own_reward_is_not_unbiased():
    """group_mean: (G - 1) / G, to be seen with the naked eye at G = 3. Adam and a clipped norm don't feel the factor."""
    assert standard_errors(sampled(each_step(group_mean)), exact_gradient()) > 6


def every_outcome(captions):
    """All V^(N G) steps [S, N, G] and their probabilities [S]."""
    actions = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=IMAGES * captions)))
    actions = actions.view(-1, IMAGES, captions)
    return actions, probabilities().expand(len(actions), -1, -1).gather(2, actions).prod(-1).prod(-1)


def expectation(advantage, rewards=REWARDS, captions=CAPTIONS):
    """The estimator's own expectation, as the sum over every possible step: [F, V]."""
    actions, weights = every_outcome(captions)
    advantages = each_step(advantage)(rewards.expand(len(actions), -1, -1).gather(2, actions))
    return torch.einsum("s,sfv->fv", weights, step_gradients(actions, advantages))


def test_the_sum_over_all_steps_is_the_exact_gradient():
    torch.testing.assert_close(expectation(leave_one_out), exact_gradient())
    torch.testing.assert_close(expectation(group_mean), (CAPTIONS - 1) / CAPTIONS * exact_gradient())
    torch.testing.assert_close(expectation(batch_mean), (1 - 1 / (IMAGES * CAPTIONS)) * exact_gradient())


def test_normalised_advantages_follow_a_gradient_of_their_own():
    """GRPO's isn't the gradient of the mean reward, nor a multiple of it: an image whose captions differ less weighs more."""
    own = expectation(group_normalised)
    assert standard_errors(sampled(each_step(group_normalised)), own) < 3
    cosine = torch.nn.functional.cosine_similarity(own.flatten(), exact_gradient().flatten(), dim=0)
    assert 0.5 < cosine < 0.999


def test_of_two_valued_rewards_normalised_advantages_scale_each_image_by_a_positive_factor():
    """With rewards 0 and 1, p the probability of a 1 and k ones among G,

    E g_i = c(p_i) grad p_i,     c(p) = E sqrt(k (G - k) (G - 1) / G) / (G p (1 - p)),     k ~ Binomial(G, p)

    since k ones have the advantage (1 - k/G) / std each, the zeros -k/G / std, std = sqrt(k (G - k) / (G (G - 1))),
    and the mean of grad log p(a) over the ones is grad p / p, over the zeros -grad p / (1 - p).
    """
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    total = torch.zeros_like(POLICY)
    for image, p in enumerate((probabilities() * rewards).sum(-1).tolist()):
        roots = [math.sqrt(k * (CAPTIONS - k) * (CAPTIONS - 1) / CAPTIONS) for k in range(CAPTIONS + 1)]
        chances = [math.comb(CAPTIONS, k) * p**k * (1 - p) ** (CAPTIONS - k) for k in range(CAPTIONS + 1)]
        factor = sum(c * r for c, r in zip(chances, roots, strict=True)) / (CAPTIONS * p * (1 - p))
        assert factor > 0
        own = torch.zeros_like(rewards)
        own[image] = rewards[image]
        total += factor * exact_gradient(own)
    # 1e-4 in the denominator, which is 0.58 here, is all that is left between the two.
    torch.testing.assert_close(expectation(group_normalised, rewards), total, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [*(name for name in UNBIASED_UP_TO if name != "none"), "group_normalised"])
def test_every_baseline_lowers_the_variance(name):
    """Total variance over the squared length of the mean: an estimator that shrinks its gradient gains nothing by it."""

    def noise(gradients):
        return gradients.var(dim=0).sum() / gradients.mean(dim=0).square().sum()

    estimator = each_step(group_normalised) if name == "group_normalised" else UNBIASED_UP_TO[name][0]
    assert noise(sampled(estimator)) < 0.9 * noise(sampled(nothing))
