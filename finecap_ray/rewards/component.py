"""What a component of the reward is: one number per caption, worked out from what a step holds.

A component is pure (no ray, vllm or trl) and sees no weights of the other ones; `combine.py` builds and adds them up.
Higher is always better: a penalty is 0 at its best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """C captions of N images, those of B bags."""

    texts: list[str]  # [C]
    ended: np.ndarray  # [C] bool: the policy ended the caption by itself, before the token limit
    target: np.ndarray  # [C] int: row of the own image
    image_ids: list[str]  # [N]
    embeddings: np.ndarray  # [N, D] float16, unit-norm, of the scorer
    bag_of_image: np.ndarray  # [N] int
    references: list[tuple[str, ...]]  # [N]: human captions of each image

    def images(self) -> Float[Tensor, "N D"]:
        """The embeddings in float32, unit-norm again after half precision."""
        return torch.nn.functional.normalize(torch.from_numpy(self.embeddings.astype(np.float32)), dim=-1)

    def own_image(self) -> Int[Tensor, " C"]:
        return torch.from_numpy(self.target)

    def own_references(self) -> list[tuple[str, ...]]:
        """[C]: the references of the image of each caption."""
        return [self.references[image] for image in self.target]

    def captions(self, rows: np.ndarray) -> RewardRequest:
        """Some of the captions, and all images: what competes for a caption stays as it is."""
        return replace(self, texts=[self.texts[row] for row in rows], ended=self.ended[rows], target=self.target[rows])


class RewardComponent(Protocol):
    """One term of the reward, not weighted."""

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        """float32; NaN where there is no signal. `text`: the captions, embedded by the scorer, unit-norm."""
