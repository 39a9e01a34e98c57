"""A step's captions in micro-batches: those of like length together, so that little is computed for padding. Pure."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

# What TRL keeps per token of a completion, padded on the right.
_PER_TOKEN = (
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)


def split_by_length(
    batch: dict[str, Any],
    parts: int,
    loss_type: str,
    captions_per_image: int,
    share_images: bool,
    workers: int,
    captions: int,
) -> list[dict[str, Any]]:
    """TRL's batch of C captions, image by image -> `parts` batches of nearly C / parts captions, in order of their length.

    Each is cut to its own longest caption, and `share` is the factor of its loss. With `share_images` the rows of
    `pixel_values` are those of the images in it, once, `image_of_row` [rows] says which of them a caption is of, and of the
    prompt (which is the image and no more) one token is left to stand for it.
    workers, captions: of the whole step, whose gradients are averaged over the workers, however many captions each has.
    """
    mask: Bool[Tensor, "C T"] = batch["completion_mask"].bool()
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    bounds = np.linspace(0, len(order), parts + 1).round().astype(int)
    made = []
    for rows in (order[start:end] for start, end in itertools.pairwise(bounds)):
        part = {name: _take(value, rows, len(order)) for name, value in batch.items()}
        longest = int(lengths[rows].max())
        part |= {name: part[name][:, :longest] for name in _PER_TOKEN if part.get(name) is not None}
        if share_images:
            part |= _images_once(batch["pixel_values"], rows, captions_per_image)
            part |= {name: part[name][:, -1:] for name in ("prompt_ids", "prompt_mask")}
        share = _share(loss_type, mask[rows], captions, int(batch["num_items_in_batch"]))
        made.append(part | {"share": 1.0 if share is None else share * parts * workers})
    return made


def _share(loss_type: str, mask: Bool[Tensor, "c T"], captions: int, tokens: int) -> float | None:
    """What of the step's loss a mean over these captions stands for; None where TRL divides by the whole step already."""
    match loss_type:
        case "dapo":
            return None
        case "bnpo":  # a mean over tokens
            return mask.sum().item() / tokens
    return len(mask) / captions


def _images_once(pixels: Tensor, rows: Int[Tensor, " c"], captions_per_image: int) -> dict[str, Any]:
    images, image_of_row = torch.unique(rows // captions_per_image, return_inverse=True)
    # TRL takes as many images as `num_images` adds up to: all of them here.
    num_images = [len(images)] + [0] * (len(rows) - 1)
    return {
        "pixel_values": pixels[images * captions_per_image],
        "image_of_row": image_of_row,
        "num_images": num_images,
    }


def _take(value: Any, rows: Int[Tensor, " c"], of: int) -> Any:
    """The rows of what has one per caption; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == of:
        return value[rows]
    if isinstance(value, list) and len(value) == of:
        return [value[row] for row in rows.tolist()]
    return value
