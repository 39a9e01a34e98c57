"""Self-retrieval: is an image found from its caption among the images that compete with it?

A frozen dual encoder gives unit-norm text t_c and images v_j. With scale s, over the images j in scope:

    R_c = log softmax_j(s * <t_c, v_j>) at the own image          (DiscriTune 2023, NDLB 2024)

Equal images share what there is to win: n equal images that beat all others get -log n, rank (n + 1) / 2 and
accuracy 1 / n. That needs their similarities to be equal to the last bit, and a matrix product doesn't promise it:
its rounding depends on the position of a column. So equal rows are multiplied once, and their result is copied.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finecap_ray.errors import RewardError
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.rewards.hard_negatives import HardNegatives


class SelfRetrieval:
    """The component: what `kind` pays against the images in `scope`, and against hard negatives where there are any.

    logprob      R_c, in nats
    probability  exp R_c
    accuracy     1 where the own image is first, 1 / n in a tie of n (DiscriTune's other reward)
    similarity   the cosine with the own image; no image competes
    """

    def __init__(
        self,
        kind: Literal["logprob", "probability", "accuracy", "similarity"],
        scope: Literal["bag", "batch"],
        logit_scale: float,
        negatives: HardNegatives | None,
    ) -> None:
        self.kind, self.scope, self.logit_scale, self.negatives = kind, scope, logit_scale, negatives

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        images, target, scope = request.images(), request.own_image(), own_bag(request)
        if self.kind == "similarity":
            return (text * images[target]).sum(dim=-1).numpy()
        if self.scope == "batch":
            scope = torch.ones_like(scope)
        if self.negatives is not None:
            images, scope = self.negatives.join(request.image_ids, images, target, scope)
        if self.kind == "accuracy":
            return self_retrieval_accuracy(text, images, target, scope).numpy()
        logprobs = self_retrieval_rewards(text, images, target, scope, self.logit_scale)
        return (logprobs.exp() if self.kind == "probability" else logprobs).numpy()


def own_bag(request: RewardRequest) -> Bool[Tensor, "C N"]:
    """The scope in which an image competes for the captions of its own bag only."""
    bags = torch.from_numpy(request.bag_of_image)
    return bag_scope(bags[request.own_image()], bags)


def self_retrieval_rewards(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"],
    logit_scale: float,
) -> Float[Tensor, " C"]:
    """Log-probability, in nats and at most 0, that the scorer picks the own image of each caption.

    text and images are unit-norm; target is the row of the own image; scope says which images compete.
    Raises ValueError where the own image of a caption is out of its scope, RewardError for a similarity that is no number.
    """
    similarity = _similarity(text, images, target, scope)
    logits = (logit_scale * similarity).masked_fill(~scope, -torch.inf)
    return logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)


def retrieval_rank(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"],
) -> Float[Tensor, " C"]:
    """Expected rank of the own image, from 1, when ties are broken by chance: 1 + better + (tied others) / 2."""
    better, tied = better_and_tied(text, images, target, scope)
    return 1 + better + (tied - 1) / 2


def self_retrieval_accuracy(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"],
) -> Float[Tensor, " C"]:
    """Probability that the own image comes first, ties broken by chance: 1 / n in a tie of n at the top, else 0."""
    better, tied = better_and_tied(text, images, target, scope)
    return torch.where(better == 0, 1 / tied, 0.0)


def bag_scope(bag_of_caption: Int[Tensor, " C"], bag_of_image: Int[Tensor, " N"]) -> Bool[Tensor, "C N"]:
    """The scope in which an image competes for the captions of its own bag only."""
    return bag_of_caption[:, None] == bag_of_image[None, :]


def better_and_tied(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"],
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """How many images in scope are more similar than the own one, and how many are equal to it (itself included)."""
    similarity = _similarity(text, images, target, scope)
    own = similarity.gather(1, target[:, None])
    better = ((similarity > own) & scope).sum(dim=1)
    tied = ((similarity == own) & scope).sum(dim=1)
    return better.to(similarity.dtype), tied.to(similarity.dtype)


def _similarity(
    text: Float[Tensor, "C D"],
    images: Float[Tensor, "N D"],
    target: Int[Tensor, " C"],
    scope: Bool[Tensor, "C N"],
) -> Float[Tensor, "C N"]:
    """Cosines in float32 or better; equal rows of `text` or `images` give results that are equal to the last bit."""
    if text.ndim != 2 or images.ndim != 2 or text.shape[1] != images.shape[1]:
        raise ValueError(f"text {tuple(text.shape)} and images {tuple(images.shape)} must be [C, D] and [N, D]")
    if target.shape != text.shape[:1] or scope.shape != (len(text), len(images)) or scope.dtype != torch.bool:
        raise ValueError(
            f"{len(text)} captions and {len(images)} images need target [{len(text)}] and a boolean scope "
            f"[{len(text)}, {len(images)}], not {tuple(target.shape)} and {scope.dtype} {tuple(scope.shape)}"
        )
    outside = int((~scope.gather(1, target[:, None])).sum())
    if outside:
        raise ValueError(f"the own image of {outside} of {len(text)} captions is not in their scope")
    dtype = torch.promote_types(torch.promote_types(text.dtype, images.dtype), torch.float32)
    text_rows, text_row = torch.unique(text.to(dtype), dim=0, return_inverse=True)
    image_rows, image_row = torch.unique(images.to(dtype), dim=0, return_inverse=True)
    similarity = text_rows @ image_rows.T
    if not similarity.isfinite().all():  # NaN is neither better nor worse than anything: it would come first
        wrong = int((~similarity.isfinite()).any(dim=1)[text_row].sum())
        raise RewardError(
            f"the similarities of {wrong} of {len(text)} captions aren't all numbers: the scorer gives NaN or infinity; look for "
            "damaged weights, or run it in float32 (resources.scorer_dtype)"
        )
    return similarity[text_row][:, image_row]
