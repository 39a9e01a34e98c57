"""Beam search, by vLLM: its score of a caption is the log-prob over the length of prompt and caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finecap_ray.errors import ConfigError, UnsupportedError
from finecap_ray.records import Rollout
from finecap_ray.sampling.engine import CaptionEngine

WIDEST = 10  # a step looks at the log-probs of twice its width in tokens, and vLLM gives 20


def check_beam(width: int, reads: str) -> None:
    """Raises ConfigError for a width that can't be, UnsupportedError for a captioner whose prompts are embeddings."""
    if not 2 <= width <= WIDEST:
        raise ConfigError(f"a beam must be from 2 to {WIDEST} captions wide (vLLM's limit), got {width}")
    if reads == "features":
        raise UnsupportedError(
            "vLLM's beam search takes token prompts only (`Embedding prompt not supported for beam search`), and what a "
            "ClipCap gives its decoder are embeddings: take the best of several samples instead"
        )


@torch.inference_mode()
def beam_search(
    engine: CaptionEngine, image_ids: Sequence[str], images: Any, width: int, max_tokens: int
) -> list[list[Rollout]]:
    """Per image up to `width` captions, the best first. Raises as `check_beam`."""
    from vllm.sampling_params import BeamSearchParams

    family = engine.family
    check_beam(width, family.reads)
    prompts = list(family.requests(images, engine.beside, engine.dtype))
    outputs = engine.llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=max_tokens))
    return [
        [_rollout(engine, image_id, beam) for beam in output.sequences]
        for image_id, output in zip(image_ids, outputs, strict=True)
    ]


def _rollout(engine: CaptionEngine, image_id: str, beam: Any) -> Rollout:
    """A beam's tokens begin with those of the prompt; it has log-probs of the others."""
    length = len(beam.logprobs)
    prompt, tokens = beam.tokens[: len(beam.tokens) - length], beam.tokens[len(beam.tokens) - length :]
    return Rollout(
        image_id=image_id,
        prompt_token_ids=engine.family.prompt_of(prompt),
        token_ids=tuple(tokens),
        logprobs=tuple(step[token].logprob for step, token in zip(beam.logprobs, tokens, strict=True)),
        text=engine.family.processor.tokenizer.decode(tokens, skip_special_tokens=True),
        finish_reason="stop" if tokens[-1] in engine.family.end_token_ids else "length",
        weights_version=engine.weights_version,
    )
