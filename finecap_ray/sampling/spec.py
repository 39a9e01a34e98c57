"""How captions are drawn: read by those who ask for captions, without importing the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """temperature 0 is greedy."""

    captions_per_image: int
    max_tokens: int
    temperature: float = 1.0
