"""Several pairs of heads behind frozen towers, side by side in one open_clip model: an ensemble in the form of wide heads.

Head = second(gelu(first(x))). A member has its own rows of `first` and the block of `second` that reads them and writes its share of
the embedding; what is off these blocks stays 0. Embeddings of members have nearly equal norms, so the cosine of the whole is
about the mean of theirs. Members learn from the same images, each with its own captions and its own dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Member:
    image: Head  # what the image tower puts out -> embedding, not unit-norm
    text: Head  # likewise of a text


def split_heads(image: nn.Module, text: nn.Module, members: int) -> list[Member]:
    """The members of a model's two MLP heads (timm's, and open_clip's of a Hugging Face tower): views, by which they train.

    Sets what is off their blocks to 0. Their number has to divide the width of the embedding.
    """
    pairs = (image.mlp.fc1, image.mlp.fc2), (text[0], text[2])
    for pair in pairs:
        _keep_blocks(*pair, members)
    return [
        Member(*(partial(_head, *pair, *_block(*pair, member, members)) for pair in pairs)) for member in range(members)
    ]


def _block(first: nn.Linear, second: nn.Linear, member: int, members: int) -> tuple[slice, slice]:
    """Of a member: its hidden units, and its share of the embedding."""
    sizes = first.out_features // members, second.out_features // members
    hidden, out = (slice(member * size, (member + 1) * size) for size in sizes)
    return hidden, out


@torch.no_grad()
def _keep_blocks(first: nn.Linear, second: nn.Linear, members: int) -> None:
    kept = torch.zeros_like(second.weight)
    for member in range(members):
        hidden, out = _block(first, second, member, members)
        kept[out, hidden] = math.sqrt(members)  # the spread at the start of a head of a block's size
    second.weight.mul_(kept)


def _head(
    first: nn.Linear, second: nn.Linear, hidden: slice, out: slice, x: Float[Tensor, "n F"]
) -> Float[Tensor, "n D"]:
    bias = None if first.bias is None else first.bias[hidden]
    inner = nn.functional.gelu(nn.functional.linear(x, first.weight[hidden], bias))
    return nn.functional.linear(inner, second.weight[out, hidden])
