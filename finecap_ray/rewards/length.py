"""Length as a term of the reward: what the scorer can't read, and what nobody would say, is not free."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from finecap_ray.evaluation.tokenise import tokenise
from finecap_ray.rewards.component import RewardRequest


class Length:
    """-(words past `longest`) / `longest`: 0 up to it, -1 at twice as many. Punctuation counts, so that it isn't free."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        words = np.array([len(tokenise(own, "keep_punctuation")) for own in request.texts], dtype=np.float32)
        return -np.maximum(words - self.longest, 0) / self.longest
