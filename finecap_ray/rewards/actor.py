"""The Ray side of the reward: a frozen scorer in each actor, behind one small call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import torch

from finecap_ray.cluster import get_within
from finecap_ray.config import ResourceSettings, RewardSettings
from finecap_ray.errors import ConfigError
from finecap_ray.rewards.cider import CiderReward
from finecap_ray.rewards.self_retrieval import (
    bag_scope,
    retrieval_rank,
    self_retrieval_accuracy,
    self_retrieval_rewards,
)


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """C captions of N images. In scope `bag` an image competes for the captions of its own bag only."""

    texts: list[str]  # [C]
    target: np.ndarray  # [C] int: row of the own image
    embeddings: np.ndarray  # [N, D] float16, unit-norm, of the scorer
    bag_of_image: np.ndarray  # [N] int
    references: list[tuple[str, ...]]  # [N]: human captions of each image


@dataclass(frozen=True, slots=True)
class RewardReply:
    """Components by name, each [C] float32 and not yet weighted (NaN: no signal), and what else was seen."""

    components: dict[str, np.ndarray]
    metrics: dict[str, float]


@ray.remote(max_restarts=3, max_task_retries=3)
class RewardActor:
    """Scores captions with a frozen open_clip model."""

    def __init__(
        self, scorer: str, settings: RewardSettings, references: list[list[str]], resources: ResourceSettings
    ) -> None:
        """`references`: the human captions of every training image, whose document frequencies CIDEr uses."""
        from finecap_ray.scorers.scorer import load_scorer

        torch.set_num_threads(resources.threads)
        self.scorer = load_scorer(scorer)
        self.settings = settings
        self.logit_scale = settings.logit_scale or self.scorer.logit_scale
        self.cider = CiderReward(references) if settings.cider else None

    def digest(self) -> str:
        return self.scorer.digest

    def score(self, request: RewardRequest) -> RewardReply:
        text = self.scorer.embed_texts(request.texts)
        images = torch.nn.functional.normalize(torch.from_numpy(request.embeddings.astype(np.float32)), dim=-1)
        target = torch.from_numpy(request.target)
        bags = torch.from_numpy(request.bag_of_image)
        own_bag = bag_scope(bags[target], bags)
        scope = own_bag if self.settings.scope == "bag" else torch.ones_like(own_bag)
        components = {"self_retrieval": self._self_retrieval(text, images, target, scope).numpy()}
        metrics = {
            "rank": retrieval_rank(text, images, target, own_bag).mean().item(),
            "accuracy": self_retrieval_accuracy(text, images, target, own_bag).mean().item(),
            "truncated": self.scorer.truncated(request.texts).mean().item(),
            "unique_captions": len(set(request.texts)) / len(request.texts),
        }
        if self.cider is not None:
            components["cider"] = self.cider(
                request.texts, [list(request.references[image]) for image in request.target]
            )
            metrics["without_references"] = float(np.isnan(components["cider"]).mean())
        return RewardReply(components, metrics)

    def _self_retrieval(self, text, images, target, scope) -> torch.Tensor:
        match self.settings.kind:
            case "logprob":
                return self_retrieval_rewards(text, images, target, scope, self.logit_scale)
            case "probability":
                return self_retrieval_rewards(text, images, target, scope, self.logit_scale).exp()
            case "accuracy":
                return self_retrieval_accuracy(text, images, target, scope)
            case "similarity":
                return (text * images[target]).sum(dim=-1)


class RewardPool:
    """Reward actors that share the captions of a step, whole bags each, so that it doesn't matter how many there are."""

    def __init__(
        self, scorer: str, settings: RewardSettings, references: list[list[str]], resources: ResourceSettings
    ) -> None:
        if not settings.self_retrieval and not settings.cider:
            raise ConfigError("every reward weight is 0: set rl.reward.self_retrieval or rl.reward.cider")
        self.resources = resources
        options = RewardActor.options(num_cpus=1, num_gpus=1 if resources.use_gpu else 0)
        self.actors = [options.remote(scorer, settings, references, resources) for _ in range(resources.scorers)]
        self._next = 0

    def digest(self) -> str:
        return self._get(self.actors[0].digest.remote(), self.resources.start_timeout_s, "start")

    def score(self, request: RewardRequest) -> RewardReply:
        """Raises DeadlineError when no actor answers in time."""
        actor = self.actors[self._next % len(self.actors)]
        self._next += 1
        return self._get(
            actor.score.remote(request), self.resources.step_timeout_s, f"score {len(request.texts)} captions"
        )

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _get(self, reference, timeout_s: float, doing: str):
        late = f"the reward actors didn't {doing} within {timeout_s:.0f} s: see `ray status` for free CPUs or GPUs"
        return get_within(reference, timeout_s, late)
