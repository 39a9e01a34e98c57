"""What trainer, sampler and evaluation have to know of a kind of captioner, and nothing else in the package does.

    bag rows --read--> StepImages --of--> inputs of the model that trains
        `--images_of--> images --requests--> what the engine captions

A family holds no weights: every process makes its own from a model's config and a processor (`captioners.family_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from finecap_ray.records import BagImage

ImageInput = Literal["features", "image"]
Part = Literal["mapper", "vision", "decoder"]


class StepImages(Protocol):
    """N images as the model that trains reads them."""

    prompts: list[tuple[int, ...]]  # [N] token ids, image tokens included

    def __len__(self) -> int: ...

    def of(self, rows: Int[Tensor, " n"]) -> dict[str, Any]:
        """Inputs of a forward pass in which captions refer to these images by `image_of_row`, their place among `rows`."""

    def alone(self, row: int, token_ids: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of the plain forward pass of one caption behind the prompt of its image."""


class Family(Protocol):
    reads: ImageInput  # the column of a bag that it takes its images from
    processor: ProcessorMixin
    image_token_id: int  # a prompt holds as many of these as its image has
    banned_token_ids: tuple[
        int, ...
    ]  # they have a row in the output layer, and are never emitted, by trainer or sampler
    end_token_ids: tuple[int, ...]
    longest_caption: int  # tokens, end token included
    whole_images: bool  # an image costs more than its captions: no micro-batch is cut through one

    @classmethod
    def part_of(cls, name: str) -> Part:
        """The part that a parameter of the model belongs to."""

    @staticmethod
    def module(model: PreTrainedModel, part: Part) -> torch.nn.Module | None:
        """The module whose matrices may get the adapters of a part; None where there is no such part."""

    # --- the model that trains

    def prepare(self, model: PreTrainedModel) -> None:
        """Once, after loading: the model then takes `StepImages.of`, and can't say a banned token."""

    def read(self, images: Sequence[BagImage], device: torch.device | str) -> StepImages: ...

    # --- the sampler

    def images_of(self, images: Sequence[BagImage]) -> Any:
        """Of each bag row what `requests` takes: an array [N, ...] or a list."""

    def save_for_engine(self, model: PreTrainedModel, folder: Path) -> None:
        """What vLLM needs to build the engine from a folder, but for the weights."""

    def engine_options(self) -> dict[str, Any]:
        """Arguments of vllm.LLM, beside those of every family."""

    def engine_names(self, model: PreTrainedModel) -> Mapping[str, str]:
        """Name of a weight in the model's state dict -> name by which the engine loads it."""

    def beside_engine(self, model: PreTrainedModel) -> tuple[str, torch.nn.Module] | None:
        """What of the model runs in the sampler itself, and the prefix of its names: the weights that `engine_names` leaves out."""

    def requests(self, images: Any, beside: torch.nn.Module | None, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """The engine's prompt for each image."""

    def prompt_of(self, reported: Sequence[int] | None) -> tuple[int, ...]:
        """Token ids of a prompt that the engine ran, by what it reports of them."""


def training_batch(
    images: StepImages, image_of_caption: Sequence[int], captions: Sequence[Sequence[int]], pad: int
) -> dict[str, Any]:
    """Captions of images -> inputs and labels of a captioner's forward pass, whose loss is then that of maximum likelihood.

    captions: C lists of token ids, end token included. Every image is read once, however many of the captions are of it.
    Input ids [C, 1 + T] begin with a token that stands for the prompt; labels are -100 where nothing is to be learnt.
    """
    ids = torch.full((len(captions), 1 + max(map(len, captions))), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(captions):
        ids[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        mask[row, : 1 + len(tokens)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    rows, image_of_row = torch.unique(torch.tensor(image_of_caption), return_inverse=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_of_row": image_of_row} | images.of(rows)
