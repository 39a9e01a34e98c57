"""ClipCap as a family: features come with the bag, the mapper runs beside the engine, which takes prefix embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Int
from torch import Tensor
from transformers import PreTrainedModel

from finecap_ray.captioners.clipcap import ClipCapConfig, ClipCapProcessor
from finecap_ray.captioners.family import ImageInput, Part
from finecap_ray.records import BagImage

_MAPPER = "model.mapper."


class ClipCapFamily:
    reads: ImageInput = "features"
    whole_images = False

    def __init__(self, config: ClipCapConfig, processor: ClipCapProcessor) -> None:
        self.processor = processor
        self.image_token_id = config.image_token_id
        self.banned_token_ids: tuple[int, ...] = ()  # the image token has no row in the output layer
        self.end_token_ids = (processor.tokenizer.eos_token_id,)
        self.longest_caption = config.text_config.max_position_embeddings - config.prefix_length
        self._positions = config.text_config.max_position_embeddings
        self._prompt = tuple(processor.prompt_token_ids())

    @staticmethod
    def part_of(name: str) -> Part:
        return "mapper" if name.startswith(_MAPPER) else "decoder"

    @staticmethod
    def module(model: PreTrainedModel, part: Part) -> torch.nn.Module | None:
        return {"decoder": model.model.language_model, "mapper": model.model.mapper}.get(part)

    def prepare(self, model: PreTrainedModel) -> None:
        """A ClipCap takes `image_of_row` as it is."""

    def read(self, images: Sequence[BagImage], device: torch.device | str) -> FeatureImages:
        features = torch.from_numpy(self.images_of(images).astype(np.float32)).to(device)
        return FeatureImages(features, self._prompt)

    def images_of(self, images: Sequence[BagImage]) -> Float16[np.ndarray, "N F"]:
        return np.stack([image.features for image in images])

    def save_for_engine(self, model: PreTrainedModel, folder: Path) -> None:
        model.decoder_config().save_pretrained(folder)
        self.processor.tokenizer.save_pretrained(folder)

    def engine_options(self) -> dict[str, Any]:
        return {"enable_prompt_embeds": True, "max_model_len": self._positions}

    def engine_names(self, model: PreTrainedModel) -> Mapping[str, str]:
        return model.decoder_names()

    def beside_engine(self, model: PreTrainedModel) -> tuple[str, torch.nn.Module]:
        return _MAPPER, model.model.mapper

    def requests(
        self, images: Float16[np.ndarray, "N F"], beside: torch.nn.Module, dtype: torch.dtype
    ) -> Iterator[dict[str, Any]]:
        # One image at a time: the rounding of a product depends on how many rows it has, and a caption must not depend on
        # which images share its call.
        for row in torch.from_numpy(np.asarray(images, dtype=np.float32)).split(1):
            yield {"prompt_embeds": beside(row)[0].to(dtype)}

    def prompt_of(self, reported: Sequence[int] | None) -> tuple[int, ...]:
        return self._prompt


class FeatureImages:
    """Features of N images [N, F], all behind the same prompt."""

    def __init__(self, features: Tensor, prompt: tuple[int, ...]) -> None:
        self.features = features
        self.prompts = [prompt] * len(features)

    def __len__(self) -> int:
        return len(self.features)

    def of(self, rows: Int[Tensor, " n"]) -> dict[str, Tensor]:
        return {"pixel_values": self.features[rows]}

    def alone(self, row: int, token_ids: Sequence[int]) -> dict[str, Tensor]:
        ids = torch.tensor([[*self.prompts[row], *token_ids]], device=self.features.device)
        return {"input_ids": ids, "pixel_values": self.features[[row]]}
