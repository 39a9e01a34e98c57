"""The Ray side of the reward: a frozen scorer in each actor, behind one small call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import torch

from finecap_ray.cluster import get_within
from finecap_ray.config import ResourceSettings, RewardSettings
from finecap_ray.precision import dtype_of
from finecap_ray.records import ImageBank
from finecap_ray.rewards.combine import NEED_REFERENCES, build_components, component_weights
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.rewards.self_retrieval import own_bag, retrieval_rank, self_retrieval_accuracy


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Of C captions: components by name, not yet weighted (NaN: no signal), and what else was seen; each [C] float32."""

    components: dict[str, np.ndarray]
    measures: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class RewardReply:
    """Components by name, each [C] float32 and not yet weighted (NaN: no signal), and metrics of all captions together."""

    components: dict[str, np.ndarray]
    metrics: dict[str, float]


@ray.remote(max_restarts=3, max_task_retries=3)
class RewardActor:
    """Scores captions with a frozen open_clip model."""

    def __init__(
        self,
        scorer: str,
        settings: RewardSettings,
        references: list[list[str]],
        bank: ImageBank | None,
        resources: ResourceSettings,
    ) -> None:
        """`references`: the human captions of every training image, whose document frequencies CIDEr uses."""
        from finecap_ray.scorers.scorer import load_scorer

        torch.set_num_threads(resources.threads)
        self.scorer = load_scorer(scorer)
        self.scorer.text_dtype = getattr(torch, dtype_of(resources.scorer_dtype, resources.use_gpu))
        self.text_prefix = settings.text_prefix
        self.components = build_components(settings, self.scorer, references, bank)

    def digest(self) -> str:
        return self.scorer.digest

    def score(self, request: RewardRequest) -> CaptionScores:
        prefixed = [self.text_prefix + text for text in request.texts]
        text, truncated = self.scorer.read_texts(prefixed)
        among = text, request.images(), request.own_image(), own_bag(request)
        measures = {
            "rank": retrieval_rank(*among),
            "accuracy": self_retrieval_accuracy(*among),
            "truncated": truncated,
        }
        return CaptionScores(
            {name: component(request, text) for name, component in self.components.items()},
            {name: values.numpy() for name, values in measures.items()},
        )


class RewardPool:
    """Reward actors that share the captions of a step. All of them see all its images, so it doesn't matter how many there are."""

    def __init__(
        self,
        scorer: str,
        settings: RewardSettings,
        references: list[list[str]],
        resources: ResourceSettings,
        bank: ImageBank | None = None,
    ) -> None:
        """`references` and `bank`: of the training images. Raises ConfigError for a reward of nothing."""
        self._needs_references = not component_weights(settings).keys().isdisjoint(NEED_REFERENCES)
        self.resources = resources
        options = RewardActor.options(num_cpus=1, num_gpus=resources.scorer_gpus)
        shared = ray.put(references), ray.put(bank)  # once, not once per actor
        self.actors = [options.remote(scorer, settings, *shared, resources) for _ in range(resources.scorers)]

    def digest(self) -> str:
        return self._get(self.actors[0].digest.remote(), self.resources.start_timeout_s, "start")

    def score(self, request: RewardRequest) -> RewardReply:
        """Raises DeadlineError when the actors don't answer in time."""
        captions = len(request.texts)
        shares = [share for share in np.array_split(np.arange(captions), len(self.actors)) if len(share)]
        calls = [actor.score.remote(request.captions(share)) for actor, share in zip(self.actors, shares, strict=False)]
        parts = self._get(calls, self.resources.step_timeout_s, f"score {captions} captions")
        measures = _joined([part.measures for part in parts])
        metrics = {name: float(values.mean()) for name, values in measures.items()}
        metrics["unique_captions"] = len(set(request.texts)) / captions
        if self._needs_references:
            metrics["without_references"] = sum(not own for own in request.own_references()) / captions
        return RewardReply(_joined([part.components for part in parts]), metrics)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _get(self, references, timeout_s: float, doing: str):
        late = f"the reward actors didn't {doing} within {timeout_s:.0f} s: see `ray status` for free CPUs or GPUs"
        return get_within(references, timeout_s, late)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
