"""Advantages: what a reward is compared with, so that its policy gradient has less variance.

Rewards are [N, G]: G captions of each of N images. `batch_mean` and `RunningMean` compare across images: with several
workers give them the rewards of all of them, or every worker follows a baseline of its own.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finecap_ray.errors import ConfigError

EPSILON = 1e-4  # as in TRL: a group of equal rewards gets 0, not 0 / 0


def leave_one_out(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """A_ig = r_ig - mean reward of the other captions of image i. RLOO (Kool 2019; Ahmadian 2024, arXiv:2402.14740)."""
    captions = _captions_per_image(rewards, "leave_one_out")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (captions / (captions - 1))


def group_mean(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """A_ig = r_ig - mean_g r_ig. Dr. GRPO (Liu 2025, arXiv:2503.20783)."""
    _captions_per_image(rewards, "group_mean")
    return rewards - rewards.mean(dim=1, keepdim=True)


def group_normalised(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """A_ig = (r_ig - mean_g r_ig) / (std_g r_ig + 1e-4), with G - 1 in the std. GRPO (Shao 2024, arXiv:2402.03300)."""
    _captions_per_image(rewards, "group_normalised")
    return group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + EPSILON)


def batch_mean(rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """A_ig = r_ig - mean of all rewards of the step. REINFORCE with a batch baseline (Williams 1992)."""
    if rewards.numel() < 2:
        raise ConfigError("advantage batch_mean needs 2 or more captions in a step, got 1: its advantage is always 0")
    return rewards - rewards.mean()


def greedy(rewards: Float[Tensor, "N G"], greedy_rewards: Float[Tensor, " N"]) -> Float[Tensor, "N G"]:
    """A_ig = r_ig - reward of image i's greedy caption. SCST (Rennie 2017, arXiv:1612.00563)."""
    if greedy_rewards.shape != rewards.shape[:1]:
        raise ValueError(f"{len(rewards)} images need as many greedy rewards, not {tuple(greedy_rewards.shape)}")
    return rewards - greedy_rewards[:, None]


class RunningMean:
    """A_ig = r_ig - b, where b is the mean of the batch means of the steps before (0 before the first).

    REINFORCE as in DiscriTune 2023 and NDLB 2024. Every step weighs the same, however many captions it holds.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self.steps = 0

    def __call__(self, rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N G"]:
        """The advantages against the steps before; the baseline then takes this step in."""
        advantages = rewards - self.mean
        self.steps += 1
        self.mean += (rewards.double().mean().item() - self.mean) / self.steps
        return advantages

    def state_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.mean = float(state["mean"])
        self.steps = int(state["steps"])


def _captions_per_image(rewards: Float[Tensor, "N G"], name: str) -> int:
    captions = rewards.shape[1]
    if captions < 2:
        raise ConfigError(
            f"advantage {name} compares the captions of one image, and there is {captions} per image: "
            "set rl.captions_per_image to 2 or more, or use batch_mean, running_mean or greedy"
        )
    return captions
