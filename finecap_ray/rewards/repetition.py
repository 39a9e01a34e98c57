"""Repetition as a term of the reward: saying it twice is what a policy tries first."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor

from finecap_ray.evaluation.tokenise import tokenise
from finecap_ray.rewards.component import RewardRequest


class Repetition:
    """-(share of the pairs of neighbouring words that the caption has already used), -1 to 0.

    Pairs, because people repeat words ("a man and a dog") and hardly ever pairs: 0.3 % of the pairs in 5,000 human captions
    of Flickr8k, in 4 % of the captions. A caption said twice repeats just under half of its pairs.
    """

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        return np.array([-_repeated_pairs(own) for own in request.texts], dtype=np.float32)


def _repeated_pairs(text: str) -> float:
    pairs = list(pairwise(tokenise(text, "keep_punctuation")))
    return (len(pairs) - len(set(pairs))) / len(pairs) if pairs else 0.0
