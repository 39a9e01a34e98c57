"""Guards: what has to hold between sampler, reward and trainer at every step. Each fault stops the run under its own name.

trainer --weights--> sampler      check_weights: the same tensors on both sides
sampler --captions--> trainer     check_captions: of the images asked for, each with its whole prompt
reward --components--> trainer    check_rewards: numbers, and not all alike
the same tokens on both sides     check_drift: the log-probs of the sampler are the trainer's
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finecap_ray.captioners.family import StepImages
from finecap_ray.errors import DriftError, MismatchError, RewardError, StaleWeightsError
from finecap_ray.records import Rollout
from finecap_ray.rewards.combine import PENALTIES

log = logging.getLogger(__name__)

CAPTION_BOUND = 10  # the drift of one caption may be this many times the bound on the mean over all
EXPLAINED = 0.1  # what explains the drift leaves less than this share of it
_TEMPERATURES = np.arange(5, 201) / 100  # candidates; 2 is vLLM's limit
_FITTED = 16  # captions that a temperature is fitted to
_NAMED = 3  # names in a message; the rest is counted


def check_weights(own: Mapping[str, str], samplers: Sequence[Mapping[str, str]], version: int) -> None:
    """Raises StaleWeightsError, naming sampler and tensors, unless all samplers hold the trainer's weights.

    own, samplers: tensor name -> fingerprint (`sampling.fingerprint`), of the trainer and of each sampler.
    """
    for index, held in enumerate(samplers):
        absent = sorted(own.keys() - held.keys())
        differ = sorted(name for name in own.keys() & held.keys() if own[name] != held[name])
        if absent or differ:
            parts = [f"without {_some(absent)}"] * bool(absent) + [f"with another {_some(differ)}"] * bool(differ)
            raise StaleWeightsError(
                f"after the sync of weights {version} sampler {index} is {' and '.join(parts)} ({len(own)} tensors were "
                "compared): it would caption with a policy that isn't the one that learns. Its log is in the run folder"
            )


def check_captions(
    rollouts: Sequence[Rollout],
    image_ids: Sequence[str],
    captions_per_image: int,
    prompts: Sequence[Sequence[int]],
    image_token: int,
    banned: Collection[int],
) -> None:
    """The captions of N images, those of an image side by side, each behind the prompt of its image.

    Raises MismatchError, naming the first image whose captions are another's, whose prompt isn't the trainer's (with both
    numbers of image tokens), or a caption of which holds an image token or a banned one.
    """
    forbidden = {image_token, *banned}
    prompt_of = [prompt for prompt in prompts for _ in range(captions_per_image)]
    expected = [image_id for image_id in image_ids for _ in range(captions_per_image)]
    if len(rollouts) != len(expected):
        raise MismatchError(
            f"{len(image_ids)} images x {captions_per_image} captions = {len(expected)} were asked for, {len(rollouts)} came"
        )
    for row, (rollout, image_id) in enumerate(zip(rollouts, expected, strict=True)):
        if rollout.image_id != image_id:
            raise MismatchError(
                f"caption {row} is of image {rollout.image_id!r} in the place of {image_id!r}: its reward would go to the wrong image"
            )
        found, prompt = tuple(rollout.prompt_token_ids), tuple(prompt_of[row])
        if found != prompt:
            raise MismatchError(
                f"a caption of image {image_id!r} came with a prompt of {len(found)} tokens, {found.count(image_token)} of them image "
                f"tokens; the trainer's has {len(prompt)}, {prompt.count(image_token)} of them image tokens: the sampler runs another "
                "processor, prompt or image size"
            )
        if forbidden.intersection(rollout.token_ids):
            raise MismatchError(f"a caption of image {image_id!r} holds an image token, which the policy must not emit")


def check_rewards(
    components: Mapping[str, Float[np.ndarray, " C"]],
    image_ids: Sequence[str],
    has_signal: Mapping[str, Bool[np.ndarray, " N"]],
) -> dict[str, float]:
    """Metrics of the components of C captions of N images: for each the number of images whose captions all got the same.

    Such an image teaches nothing by that component under a baseline of its own captions. Where images have one caption each, the
    baseline spans them, and all or none are counted. Where it is so for every image, the log says so, but for a penalty that no
    caption has to pay.
    has_signal: for components that need references, the images that they say something about
    (`rewards.combine.images_with_signal`); the others are counted, and NaN is no fault there. Raises RewardError, naming the
    component and the first image, for anything else that isn't a number.
    """
    metrics = {}
    for name, values in components.items():
        values = np.asarray(values).reshape(len(image_ids), -1)  # [N, G]
        silent = np.isnan(values).all(axis=1) & ~has_signal.get(name, np.ones(len(values), dtype=bool))
        if name in has_signal:
            metrics[f"rewards/{name}/silent_images"] = float(silent.sum())
        wrong = ~np.isfinite(values) & ~silent[:, None]
        if wrong.any():
            image, caption = np.argwhere(wrong)[0]
            raise RewardError(
                f"reward component {name!r} is {values[image, caption]} for {wrong.sum()} of {values.size} captions, first for "
                f"caption {caption} of image {image_ids[image]!r}: look at that image's embedding and captions, or set "
                f"the weight rl.reward.{name} to 0"
            )
        if values.shape[1] > 1:
            equal = ~silent & (values.max(axis=1) == values.min(axis=1))
        else:
            equal = ~silent & (len(np.unique(values[~silent])) == 1)
        metrics[f"rewards/{name}/equal_images"] = float(equal.sum())
        if equal.sum() == (~silent).sum() > 0 and name not in PENALTIES:
            log.warning(
                "reward component %r is the same for all captions of each of %d images: no signal", name, equal.sum()
            )
    return metrics


@dataclass(frozen=True, slots=True)
class Drift:
    """log p(trainer) - log p(sampler) of the same tokens, as absolute values."""

    token_mean: float  # nats per token
    token_max: float
    caption_mean: float  # nats per caption: of the sums over a caption's tokens, the log of its sequence ratio
    caption_max: float
    by_caption: Float[Tensor, " C"]  # nats per token, the mean of each caption

    @classmethod
    def of(cls, own: Float[Tensor, "C T"], sampler: Float[Tensor, "C T"], mask: Bool[Tensor, "C T"]) -> Drift:
        """own, sampler: log-probs of the tokens under `mask`, by trainer and sampler."""
        difference = torch.where(mask, own - sampler, 0.0)
        tokens, captions = difference.abs()[mask], difference.sum(dim=1).abs()
        by_caption = difference.abs().sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return cls(
            tokens.mean().item(), tokens.max().item(), captions.mean().item(), captions.max().item(), by_caption.cpu()
        )

    def metrics(self) -> dict[str, float]:
        """`drift/mean` and `drift/max` in nats per token, `drift/caption_mean` and `drift/caption_max` in nats per caption."""
        return {
            "drift/mean": self.token_mean,
            "drift/max": self.token_max,
            "drift/caption_mean": self.caption_mean,
            "drift/caption_max": self.caption_max,
        }


def check_drift(drift: Drift, bound: float, step: int, first_step: bool, likely_cause: Callable[[], str]) -> None:
    """Raises DriftError where the mean over all tokens is past `bound`, or that of one caption past 10 times `bound`.

    bound: nats per token. first_step: of a run or of its resumption. likely_cause: asked only on failure; what the error says.
    """
    if drift.token_mean <= bound and bool((drift.by_caption <= CAPTION_BOUND * bound).all()):
        return
    start = "the sampler's captions are not those of the checkpoint that training starts from; " if first_step else ""
    raise DriftError(
        f"step {step}: sampler and trainer differ by {drift.token_mean:.2e} nats per token on average (largest "
        f"{drift.token_max:.2e}) and {drift.caption_mean:.2e} nats per caption (largest {drift.caption_max:.2e}), the bound is "
        f"{bound:.2e} per token: {start}likely cause: {likely_cause()}"
    )


@torch.no_grad()
def likely_cause(
    model: torch.nn.Module,
    images: StepImages,
    row_of_image: Mapping[str, int],
    rollouts: Sequence[Rollout],
    temperature: float,
    bound: float,
) -> str:
    """What makes the log-probs of captions another's than the model's: some images, the temperature, or the weights.

    row_of_image: place of an image id among `images`. Every caption is run by itself, through the captioner's plain forward.
    """
    drifts: dict[str, list[float]] = {}
    sample: list[tuple[Tensor, Rollout]] = []  # logits of some captions
    for rollout in rollouts:
        logits = caption_logits(model, images, row_of_image[rollout.image_id], rollout)
        drifts.setdefault(rollout.image_id, []).append(token_drift(logits, rollout, temperature).mean().item())
        if len(sample) < _FITTED:
            sample.append((logits, rollout))
    apart = [image_id for image_id, own in drifts.items() if not max(own) <= CAPTION_BOUND * bound]
    if apart and len(apart) <= len(drifts) / 2:
        return (
            f"the sampler saw something else than the trainer of image {_some(apart)}, whose captions drift; those of the "
            f"{len(drifts) - len(apart)} other images don't"
        )

    def left(candidate: float) -> float:
        return float(np.mean([token_drift(logits, rollout, candidate).mean().item() for logits, rollout in sample]))

    best = min(_TEMPERATURES.tolist(), key=left)
    if left(best) < EXPLAINED * left(temperature):
        return f"the sampler's log-probs are those of temperature {best:.2f}, the trainer's of {temperature:.2f}"
    return "stale weights, or a lower precision on one side (raise rl.drift_bound only for that)"


@torch.no_grad()
def caption_logits(model: torch.nn.Module, images: StepImages, row: int, rollout: Rollout) -> Float[Tensor, "T V"]:
    """What the model says before each token of a caption of image `row`, run by itself."""
    logits = model(**images.alone(row, rollout.token_ids)).logits[0]
    return logits[len(rollout.prompt_token_ids) - 1 : -1].float()


def token_drift(logits: Float[Tensor, "T V"], rollout: Rollout, temperature: float) -> Float[Tensor, " T"]:
    """|log p - log p(sampler)| of each token of a caption, in nats."""
    chosen = torch.tensor(rollout.token_ids, device=logits.device)[:, None]
    own = (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]
    return (own.cpu() - torch.tensor(rollout.logprobs)).abs()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
