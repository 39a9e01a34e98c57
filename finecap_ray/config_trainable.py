"""What RL trains. The tree that this is a part of is in config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from finecap_ray.config_models import Section


class TrainableSettings(Section):
    """Which parts of a captioner RL trains."""

    vision: Literal["full", "lora", "frozen"] = "frozen"
    """The image tower of an image-text model. A ClipCap's stays frozen: its features come with the bags."""
    mapper: Literal["full", "frozen"] = "full"
    """A ClipCap's; of an image-text model what leads from the image tower to the decoder (merger, connector)."""
    decoder: Literal["full", "lora", "frozen"] = "full"
    """Output layer and word embeddings included; they stay as they are with `lora`."""
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(16, gt=0)
    """An adapter adds B A alpha / rank to its matrix."""
    lora_targets: tuple[str, ...] = Field(("attn.c_attn", "attn.c_proj"), min_length=1)
    """Matrices of a decoder layer that get an adapter, by the end of their names: those of GPT-2's attention (NDLB)."""
    vision_lora_targets: tuple[str, ...] = Field(("attn.qkv", "attn.proj"), min_length=1)
    """Likewise of the image tower: those of Qwen2.5-VL's attention."""

    @model_validator(mode="after")
    def _something_trains(self) -> TrainableSettings:
        if self.vision == self.mapper == self.decoder == "frozen":
            raise ValueError(
                "vision, mapper and decoder are all frozen: nothing trains; set one of them to full, or decoder or vision to lora"
            )
        return self
