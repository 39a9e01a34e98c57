import math

import pytest
import torch

from finecap_ray.errors import ConfigError
from finecap_ray.training.advantages import (
    RunningMean,
    batch_mean,
    greedy,
    group_mean,
    group_normalised,
    leave_one_out,
)

REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])  # two images, three captions each


def test_leave_one_out():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    torch.testing.assert_close(leave_one_out(REWARDS), torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))


def test_group_mean():
    # mean of (1, 2, 6) is 3
    torch.testing.assert_close(group_mean(REWARDS), torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]))


def test_group_normalised():
    # std with G - 1: sqrt((4 + 1 + 9) / 2) = sqrt(7); equal rewards get 0, not 0 / 0
    scale = 1 / (math.sqrt(7) + 1e-4)
    expected = torch.tensor([[-2 * scale, -1 * scale, 3 * scale], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(group_normalised(REWARDS), expected)


def test_batch_mean():
    # (1 + 2 + 6 + 0 + 0 + 0) / 6 = 1.5
    torch.testing.assert_close(batch_mean(REWARDS), REWARDS - 1.5)
    torch.testing.assert_close(batch_mean(REWARDS[:, :1]), torch.tensor([[0.5], [-0.5]]))


def test_greedy():
    expected = torch.tensor([[-1.0, 0.0, 4.0], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(greedy(REWARDS, torch.tensor([2.0, -0.5])), expected)
    with pytest.raises(ValueError, match="2 images"):
        greedy(REWARDS, torch.tensor([2.0]))


def test_running_mean_is_the_mean_of_the_batch_means_before():
    baseline = RunningMean()
    torch.testing.assert_close(baseline(REWARDS), REWARDS)  # nothing before: 0
    torch.testing.assert_close(baseline(REWARDS + 2), REWARDS + 2 - 1.5)  # before: 1.5
    torch.testing.assert_close(baseline(torch.zeros(1, 1)), torch.tensor([[-2.5]]))  # before: (1.5 + 3.5) / 2
    assert baseline.mean == pytest.approx((1.5 + 3.5 + 0) / 3)


def test_running_mean_goes_on_where_it_was():
    whole, before = RunningMean(), RunningMean()
    for step in range(3):
        whole(REWARDS * step)
        before(REWARDS * step)
    after = RunningMean()
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(REWARDS), whole(REWARDS))
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("advantage", [leave_one_out, group_mean, group_normalised])
def test_one_caption_per_image_has_nothing_to_compare_with(advantage):
    with pytest.raises(ConfigError, match=f"{advantage.__name__}.*captions_per_image"):
        advantage(torch.tensor([[1.0], [2.0]]))


def test_one_caption_in_a_step_has_nothing_to_compare_with():
    with pytest.raises(ConfigError, match="batch_mean"):
        batch_mean(torch.tensor([[1.0]]))


@pytest.mark.parametrize("advantage", [leave_one_out, group_mean, group_normalised, batch_mean])
def test_a_constant_added_to_all_rewards_changes_nothing(advantage):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantage(rewards + 3), advantage(rewards), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantage(rewards).sum(), torch.tensor(0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("advantage", [leave_one_out, group_mean, group_normalised])
def test_groups_do_not_see_each_other(advantage):
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(advantage(rewards)[2:4], advantage(rewards[2:4]))
