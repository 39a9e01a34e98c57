"""Idefics3 and SmolVLM: an image and its tiles, each a picture of one size and of as many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, ProcessorMixin

from finecap_ray.captioners.family import Part
from finecap_ray.captioners.vlm import Vlm


class Idefics(Vlm):
    end_of_turn = "<end_of_utterance>"
    prefixes: ClassVar[dict[Part, tuple[str, ...]]] = {
        "mapper": ("model.connector.",),
        "vision": ("model.vision_model.",),
    }

    @staticmethod
    def module(model: PreTrainedModel, part: Part) -> torch.nn.Module | None:
        return {"decoder": model.model.text_model, "vision": model.model.vision_model}.get(part)

    def placeholders(self) -> tuple[int | str | None, ...]:
        return (
            self.image_token_id,
            "<fake_token_around_image>",
            getattr(self.processor, "global_image_token", "<global-img>"),
        )

    def collate(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """pixel_values [n, tiles, 3, H, W], pixel_attention_mask [n, tiles, H, W]; the model leaves out tiles of zeros."""
        tiles = max(one["pixel_values"].shape[1] for one in images)
        pixels = [
            pad(one["pixel_values"], (0, 0, 0, 0, 0, 0, 0, tiles - one["pixel_values"].shape[1])) for one in images
        ]
        masks = [
            pad(one["pixel_attention_mask"], (0, 0, 0, 0, 0, tiles - one["pixel_values"].shape[1])) for one in images
        ]
        return {"pixel_values": torch.cat(pixels), "pixel_attention_mask": torch.cat(masks)}

    def positions(
        self, backbone: torch.nn.Module, ids: Int[Tensor, "n P"], mask: Int[Tensor, "n P"], images: Mapping[str, Tensor]
    ) -> Int[Tensor, "n P"]:
        return (mask.cumsum(dim=-1) - 1).clamp(min=0)

    def largest_image(self) -> tuple[int, int]:
        side = self.processor.image_processor.size["longest_edge"]
        return side, side

    @staticmethod
    def set_image_size(processor: ProcessorMixin, pixels: int) -> None:
        """Tiles are of the size that the vision tower was built for; larger images than one tile are split."""
        processor.image_processor.size = {"longest_edge": pixels}
