"""Does the sampler caption with the trainer's weights? A tiny captioner of random weights, through a real sampler actor.

Its weights are published as a training step would, and the log-probs of what is sampled are worked out again by the model.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from finecap_ray.captioners.build import build_clipcap
from finecap_ray.captioners.clipcap_family import FeatureImages
from finecap_ray.config import CaptionerSettings, ResourceSettings
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.sampling.weights import publish
from finecap_ray.training.guards import caption_logits, token_drift

_CAPTIONS = ("a red apple on a plate", "two dogs run on the beach", "a man rides a bike")
_WEIGHTS_VERSION = 7  # any: the captions have to carry it
_SIZES = {"prefix_length": 2, "width": 32, "layers": 1, "heads": 1, "vocabulary": 300, "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class Parity:
    versions: set[int]  # weights versions that the captions carry
    asked_for: int
    drift: float  # largest |log p(sampler) - log p(trainer)| of a token, in nats


def measure_parity(resources: ResourceSettings, logs: str, images: int = 4) -> Parity:
    """Starts one sampler on the Ray that is connected, which writes its log into the folder `logs`, and stops it again. Raises
    DeadlineError when it doesn't start."""
    settings = CaptionerSettings(**_SIZES)
    model, processor = build_clipcap(settings, _CAPTIONS, 16, "", feature_dropout=0.0, seed=0)
    features = np.random.default_rng(0).standard_normal((images, 16)).astype(np.float16)
    spec = SamplingSpec(captions_per_image=2, max_tokens=settings.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        pool = SamplerPool(folder, resources.model_copy(update={"samplers": 1}), logs)
        try:
            pool.wait_until_ready()
            publish(pool.board, _WEIGHTS_VERSION, model.state_dict(), resources.step_timeout_s)
            names = [f"image {row}" for row in range(images)]
            rollouts = pool.sample(_WEIGHTS_VERSION, names, features, spec, seeds=list(range(images)))
        finally:
            pool.close()
    read = FeatureImages(torch.from_numpy(features).float(), tuple(processor.prompt_token_ids()))
    drifts = [
        token_drift(caption_logits(model, read, row // spec.captions_per_image, rollout), rollout, spec.temperature)
        for row, rollout in enumerate(rollouts)
    ]
    return Parity(
        {rollout.weights_version for rollout in rollouts}, _WEIGHTS_VERSION, max(drift.max().item() for drift in drifts)
    )
