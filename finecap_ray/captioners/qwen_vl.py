"""Qwen2.5-VL and Qwen3-VL: patches of every image in one sequence, as many tokens as the image has pixels for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from finecap_ray.captioners.family import Part
from finecap_ray.captioners.vlm import Vlm


class QwenVl(Vlm):
    prefixes: ClassVar[dict[Part, tuple[str, ...]]] = {
        "mapper": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "vision": ("model.visual.",),
    }

    @staticmethod
    def module(model: PreTrainedModel, part: Part) -> torch.nn.Module | None:
        return {"decoder": model.model.language_model, "vision": model.model.visual}.get(part)

    def placeholders(self) -> tuple[int | str | None, ...]:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return tuple(getattr(self.config, name, None) for name in names)

    def collate(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """pixel_values [patches of all images, F], image_grid_thw [n, 3]."""
        return {name: torch.cat([one[name] for one in images]) for name in ("pixel_values", "image_grid_thw")}

    def positions(
        self, backbone: torch.nn.Module, ids: Int[Tensor, "n P"], mask: Int[Tensor, "n P"], images: Mapping[str, Tensor]
    ) -> Int[Tensor, "3 n P"]:
        return backbone.get_rope_index(
            ids, images["mm_token_type_ids"], image_grid_thw=images["image_grid_thw"], attention_mask=mask
        )[0]

    def largest_image(self) -> tuple[int, int]:
        # One patch more than a square of that many pixels: the processor rounds a side up, and then the other down.
        side = math.ceil(math.sqrt(self.processor.image_processor.size["longest_edge"]))
        return side, side

    @staticmethod
    def set_image_size(processor: ProcessorMixin, pixels: int) -> None:
        images = processor.image_processor
        smallest = min(images.size["shortest_edge"], pixels**2)
        images.size = {"shortest_edge": smallest, "longest_edge": pixels**2}
