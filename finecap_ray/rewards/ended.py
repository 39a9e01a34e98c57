"""The end as a term of the reward: a caption that nobody ended is no sentence.

CIDEr and a scorer don't see the end token. Trained on CIDEr alone, 99.6 % of NDLB's captions pad spaces up to the length
limit, and 0.4 % end with a full stop (94.1 % before).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from finecap_ray.rewards.component import RewardRequest


class Ended:
    """0 for a caption that ended by itself and at its last word; -1 where it was cut at the limit or trails off in spaces."""

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        trails = np.array([own != own.rstrip() for own in request.texts])
        return -(~request.ended | trails).astype(np.float32)
