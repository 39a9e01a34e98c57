"""A step's captions in micro-batches: those of like length together, so that little is computed for padding. Pure.

Where an image costs more than its captions, as in a vision-language model, those of an image together instead: then it is read
once per step.

A policy that is sure of itself says the same of an image again and again: in a micro-batch every distinct caption of an image
runs through the model once, and its log-probs stand for all that are equal to it.
"""

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


def split_captions(
    batch: dict[str, Any],
    image_of_caption: Int[Tensor, " C"],
    parts: int,
    loss_type: str,
    workers: int,
    captions: int,
    whole_images: bool = False,
) -> list[dict[str, Any]]:
    """TRL's batch of C captions -> `parts` batches of nearly C / parts captions, in order of their length.

    Each is cut to its own longest caption, `share` is the factor of its loss, and what the model reads for its c captions is

        distinct [d]           rows of captions of which none is another's repetition
        row_of_caption [c]     which of the d each caption is equal to
        images [n]             which images they are of, each once
        image_of_row [d]       which of the n each distinct caption is of

    whole_images: in order of their images, and cut between images where there are as many images as parts.
    Of fewer captions than parts, such as those of an epoch's last step, some parts hold one that counts for nothing (`share` 0):
    every step of every worker has as many parts.

    workers, captions: of the whole step, whose gradients are averaged over the workers, however many captions each has.
    Of the prompt (which is the image and no more) one token is left to stand for it.
    """
    mask: Bool[Tensor, "C T"] = batch["completion_mask"].bool()
    lengths = mask.sum(dim=1)
    image = image_of_caption.to(mask.device)
    first = [image[:, None], lengths[:, None]] if whole_images else [lengths[:, None], image[:, None]]
    key = torch.cat([*first, batch["completion_ids"].masked_fill(~mask, 0)], dim=1)
    caption: Int[Tensor, " C"] = torch.unique(key, dim=0, return_inverse=True)[1]  # in order of length, or of images
    order = caption.argsort(stable=True)
    bounds = np.linspace(0, len(order), parts + 1).round().astype(int)
    if whole_images and len(ends := image[order].bincount().cumsum(0).cpu().numpy()) >= parts:
        bounds = _between_images(ends, parts)
    made = []
    for start, end in itertools.pairwise(bounds):
        rows = order[start : max(end, start + 1)] if start < len(order) else order[:1]
        part = {name: _take(value, rows, len(order)) for name, value in batch.items()}
        longest = int(lengths[rows].max())
        part |= {name: part[name][:, :longest] for name in _PER_TOKEN if part.get(name) is not None}
        part |= {name: part[name][:, -1:] for name in ("prompt_ids", "prompt_mask")}
        part |= _read_once(caption[rows], image[rows])
        share = _share(loss_type, mask[rows], captions, int(batch["num_items_in_batch"])) if end > start else 0.0
        made.append(part | {"share": 1.0 if share is None else share * parts * workers})
    return made


def _between_images(ends: Int[np.ndarray, " N"], parts: int) -> Int[np.ndarray, " P1"]:
    """Bounds of `parts` shares, each of an image or more: ends[i] is where the captions of image i end."""
    images = np.linspace(0, len(ends), parts + 1).round().astype(int)
    return np.concatenate([[0], ends])[images]


def _read_once(caption: Int[Tensor, " c"], image: Int[Tensor, " c"]) -> dict[str, Tensor]:
    """`caption` ascends: equal captions are neighbours."""
    _, row_of_caption, count = torch.unique_consecutive(caption, return_inverse=True, return_counts=True)
    distinct = count.cumsum(dim=0) - count
    images, image_of_row = torch.unique(image[distinct], return_inverse=True)
    return {"distinct": distinct, "row_of_caption": row_of_caption, "images": images, "image_of_row": image_of_row}


def _share(loss_type: str, mask: Bool[Tensor, "c T"], captions: int, tokens: int) -> float | None:
    """What of the step's loss a mean over these captions stands for; None where TRL divides by the whole step already."""
    match loss_type:
        case "dapo":
            return None
        case "bnpo":  # a mean over tokens
            return mask.sum().item() / tokens
    return len(mask) / captions


def _take(value: Any, rows: Int[Tensor, " c"], of: int) -> Any:
    """The rows of a tensor that has one per caption; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == of else value
