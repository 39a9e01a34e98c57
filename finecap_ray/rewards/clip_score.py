"""CLIPScore and RefCLIPScore as rewards (CLIP-Reward, Cho 2022, arXiv:2205.13115): captions close to their image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from finecap_ray.evaluation.clip_score import clip_score, ref_clip_score
from finecap_ray.rewards.component import RewardRequest


class ClipScore:
    """2.5 max(cos, 0) with the own image. It looks at no other image: what every caption may say is paid as well."""

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        return clip_score(text, request.images()[request.own_image()]).numpy()


class RefClipScore:
    """Harmonic mean of CLIPScore and the cosine of the closest reference; NaN where the image has none."""

    def __init__(self, embed_texts: Callable[[list[str]], Float[Tensor, "n D"]]) -> None:
        """`embed_texts`: of the scorer, unit-norm; the references of a step are embedded once for all its captions."""
        self._embed_texts = embed_texts

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        scores = np.full(len(text), np.nan, dtype=np.float32)
        own = request.own_references()
        rows = [row for row, references in enumerate(own) if references]
        if rows:
            texts = list(dict.fromkeys(reference for row in rows for reference in own[row]))
            place = {reference: index for index, reference in enumerate(texts)}
            embedded = self._embed_texts(texts)
            references = [embedded[[place[reference] for reference in own[row]]] for row in rows]
            images = request.images()[request.own_image()]
            scores[rows] = ref_clip_score(text[rows], images[rows], references).numpy()
        return scores
