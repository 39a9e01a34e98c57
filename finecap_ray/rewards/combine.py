"""The components of a reward, as the settings weigh them, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from finecap_ray.config import RewardSettings
from finecap_ray.errors import ConfigError
from finecap_ray.records import ImageBank
from finecap_ray.rewards.cider import FEWEST_DOCUMENTS, Cider
from finecap_ray.rewards.clip_score import ClipScore, RefClipScore
from finecap_ray.rewards.component import RewardComponent
from finecap_ray.rewards.ended import Ended
from finecap_ray.rewards.hard_negatives import HardNegatives
from finecap_ray.rewards.length import Length
from finecap_ray.rewards.repetition import Repetition
from finecap_ray.rewards.self_retrieval import SelfRetrieval

NAMES = ("self_retrieval", "clip_score", "ref_clip_score", "cider", "length", "ended", "repetition")
NEED_REFERENCES = ("ref_clip_score", "cider")
PENALTIES = ("length", "ended", "repetition")  # 0 for every caption when all is well


def component_weights(settings: RewardSettings) -> dict[str, float]:
    """Of the components that count. Raises ConfigError when none does."""
    weights = {name: getattr(settings, name) for name in NAMES if getattr(settings, name)}
    if not weights:
        raise ConfigError(f"every reward weight is 0: set one of {', '.join(f'rl.reward.{name}' for name in NAMES)}")
    return weights


def build_components(
    settings: RewardSettings, scorer, references: Sequence[Sequence[str]], bank: ImageBank | None
) -> dict[str, RewardComponent]:
    """Those with a weight, by name. `references`: of every training image, CIDEr's corpus; `bank`: for hard negatives."""

    def build(name: str) -> RewardComponent:
        match name:
            case "self_retrieval":
                if settings.hard_negatives and bank is None:
                    raise ConfigError(
                        "rl.reward.hard_negatives needs the bank of the training images, and there is none"
                    )
                negatives = HardNegatives(bank, settings.hard_negatives) if settings.hard_negatives else None
                scale = settings.logit_scale or scorer.logit_scale
                return SelfRetrieval(settings.kind, settings.scope, scale, negatives)
            case "clip_score":
                return ClipScore()
            case "ref_clip_score":
                prefix = settings.text_prefix
                return RefClipScore(lambda texts: scorer.embed_texts([prefix + text for text in texts]))
            case "cider":
                return Cider(references if settings.cider_frequencies == "corpus" else None)
            case "length":
                return Length(settings.longest)
            case "ended":
                return Ended()
            case "repetition":
                return Repetition()

    return {name: build(name) for name in component_weights(settings)}


def images_with_signal(
    settings: RewardSettings, has_references: Bool[np.ndarray, " N"]
) -> dict[str, Bool[np.ndarray, " N"]]:
    """Of the components that need references: the images of a step that they say something about."""
    signal = {name: has_references for name in component_weights(settings) if name in NEED_REFERENCES}
    if "cider" in signal and settings.cider_frequencies == "batch" and has_references.sum() < FEWEST_DOCUMENTS:
        signal["cider"] = np.zeros_like(has_references)
    return signal


def total_reward(
    components: Mapping[str, Float[np.ndarray, " C"]],
    weights: Mapping[str, float],
    silent: Mapping[str, Float[np.ndarray, " c"]] | None = None,
) -> Float[np.ndarray, " C"]:
    """sum_k weight_k * component_k, where a caption without a signal (NaN) gets the mean of those that have one.

    So the term moves no caption away from a baseline that spans images; among the captions of one image it cancels anyway.
    silent: components whose means are taken instead. Greedy captions, a baseline of the sampled ones, take theirs: it cancels there too.
    """
    means = {name: _mean(values) for name, values in (silent or components).items()}
    filled = {name: np.where(np.isnan(values), means[name], values) for name, values in components.items()}
    return sum(weight * filled[name] for name, weight in weights.items()).astype(np.float32)


def _mean(values: Float[np.ndarray, " C"]) -> float:
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else 0.0
