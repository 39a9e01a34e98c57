"""CLIPScore and RefCLIPScore (Hessel 2021, arXiv:2104.08718) on the embeddings of any scorer.

    CLIPScore(c, v) = 2.5 * max(cos(c, v), 0)
    RefCLIPScore    = harmonic mean of CLIPScore(c, v) and max(max_r cos(c, r), 0)

2.5 stretches CLIP ViT-B/32's cosines over 0 to 1. Numbers of another scorer compare with those of the same scorer only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

CLIP_PREFIX = "A photo depicts "  # stands before captions and references in the published numbers
_STRETCH = 2.5


def clip_score(text: Float[Tensor, "C D"], images: Float[Tensor, "C D"]) -> Float[Tensor, " C"]:
    """CLIPScore of each caption with its own image; both unit-norm."""
    return _STRETCH * (text * images).sum(dim=-1).clamp(min=0)


def ref_clip_score(
    text: Float[Tensor, "C D"], images: Float[Tensor, "C D"], references: Sequence[Float[Tensor, "R D"]]
) -> Float[Tensor, " C"]:
    """RefCLIPScore of each caption; references: the embedded human captions of its image, unit-norm, one or more."""
    closest = torch.stack([(own @ caption).max().clamp(min=0) for caption, own in zip(text, references, strict=True)])
    score = clip_score(text, images)
    both = score + closest
    return torch.where(both > 0, 2 * score * closest / both, torch.zeros_like(both))
