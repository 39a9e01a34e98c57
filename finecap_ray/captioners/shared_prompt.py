"""One prompt for all captions of an image: it runs through vision tower and decoder once, and its keys and values are shared.

A prompt with its image is some hundred tokens long and a caption twenty, so this is where the time of an update goes.

    prompts [n, P] --model--> keys and values [n, ...] --image_of_row--> [d, ...] <--model-- captions [d, T]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

Positions = Callable[
    ..., Int[Tensor, "..."]
]  # (backbone, prompt_ids, prompt_mask, image inputs) -> [n, P] or [3, n, P]


def share_prompts(model: PreTrainedModel, positions: Positions) -> None:
    """The backbone of `model` then takes `image_of_row` [d] as well, as a ClipCap does.

    With it, `input_ids` [d, 1 + T] begin with a token that stands for a whole prompt, and its hidden state is that of the
    prompt's last token; the prompts are `prompt_ids`, `prompt_mask` [n, P], padded on the left, and what goes with the images.
    """
    backbone = model.base_model
    plain = backbone.forward

    @wraps(plain)
    def forward(*args: Any, image_of_row: Tensor | None = None, **inputs: Any) -> Any:
        if image_of_row is None:
            return plain(*args, **inputs)
        return _shared(backbone, plain, positions, image_of_row=image_of_row, **inputs)

    backbone.forward = forward


def _shared(
    backbone: torch.nn.Module,
    plain: Callable[..., Any],
    positions: Positions,
    *,
    input_ids: Int[Tensor, "d T1"],
    attention_mask: Int[Tensor, "d T1"],
    image_of_row: Int[Tensor, " d"],
    prompt_ids: Int[Tensor, "n P"],
    prompt_mask: Int[Tensor, "n P"],
    **inputs: Any,
) -> ModelOutput:
    # What callers of a plain forward say about it doesn't concern these two.
    images = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    places = positions(backbone, prompt_ids, prompt_mask, images)
    images.pop("mm_token_type_ids", None)  # said by the places
    prompts = plain(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=places,
        use_cache=True,
        return_dict=True,
        **images,
    )
    cache = prompts.past_key_values
    cache.batch_select_indices(image_of_row)
    start = places.amax(dim=-1) + 1  # [n] or [3, n]
    start = start if start.ndim == 1 else start.amax(dim=0)
    length = input_ids.shape[1] - 1
    after = start[image_of_row][:, None] + torch.arange(length, device=start.device)
    texts = plain(
        input_ids=input_ids[:, 1:],
        attention_mask=torch.cat([prompt_mask[image_of_row], attention_mask[:, 1:]], dim=1),
        position_ids=after if places.ndim == 2 else after.expand(3, -1, -1),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    last = prompts.last_hidden_state[image_of_row, -1:]
    texts.last_hidden_state = torch.cat([last, texts.last_hidden_state], dim=1)
    return texts
