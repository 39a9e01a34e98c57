"""Hugging Face image-text models as captioners: what they have in common. Each kind says the rest (`qwen_vl`, `idefics`).

The encoded image of a bag goes through the model's own processor, with its chat template and one prompt for all images. Config
and processor carry prompt and image size, so that a saved captioner is used as it was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from finecap_ray.captioners.family import ImageInput, Part
from finecap_ray.captioners.shared_prompt import share_prompts
from finecap_ray.errors import MismatchError, UnsupportedError
from finecap_ray.images import decode_image
from finecap_ray.records import BagImage

# Added to the logits of banned tokens: no probability is left in float32, and p log p is 0 and not the NaN of infinity.
BANNED_LOGIT = -1e4
LONGEST_CAPTION = (
    256  # tokens; what the engine keeps room for behind the longest prompt, where the model reads that many
)
PROMPT_FIELD = "caption_prompt"  # of a saved config


class Vlm(ABC):
    reads: ImageInput = "image"
    whole_images = True
    end_of_turn: ClassVar[str | None] = None  # a token, where the tokenizer calls another its end
    prefixes: ClassVar[dict[Part, tuple[str, ...]]]  # of names of parameters; the first that fits counts

    def __init__(self, config: PreTrainedConfig, processor: ProcessorMixin) -> None:
        """Raises UnsupportedError for a processor without chat template, MismatchError for another model's tokenizer."""
        self.config, self.processor = config, processor
        self.image_token_id = config.image_token_id
        # The tokenizer's first.
        self.end_token_ids = tuple(token_ids(processor.tokenizer.eos_token_id, config.get_text_config().eos_token_id))
        self.banned_token_ids = self._banned()
        self.check_tokenizer()
        self.prompt = self._prompt_text()

    # --- what a kind says

    @abstractmethod
    def placeholders(self) -> tuple[int | str | None, ...]:
        """Tokens (or their ids) that stand around or for images; the policy must not emit them."""

    @abstractmethod
    def collate(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the processor made of each of some images -> the model's image inputs."""

    @abstractmethod
    def positions(
        self, backbone: torch.nn.Module, ids: Int[Tensor, "n P"], mask: Int[Tensor, "n P"], images: Mapping[str, Tensor]
    ) -> Int[Tensor, ...]:
        """Positions of the tokens of prompts: [n, P], or [3, n, P] for a rotary embedding over time, height and width."""

    @abstractmethod
    def largest_image(self) -> tuple[int, int]:
        """Width and height of an image that the processor makes the most tokens of."""

    @staticmethod
    @abstractmethod
    def set_image_size(processor: ProcessorMixin, pixels: int) -> None:
        """Lets the processor scale images to at most about pixels x pixels."""

    # --- Family

    @cached_property
    def longest_caption(self) -> int:
        return min(LONGEST_CAPTION, self.config.get_text_config().max_position_embeddings - self.longest_prompt)

    @classmethod
    def part_of(cls, name: str) -> Part:
        return next((part for part, starts in cls.prefixes.items() if name.startswith(starts)), "decoder")

    @staticmethod
    @abstractmethod
    def module(model: PreTrainedModel, part: Part) -> torch.nn.Module | None: ...

    def prepare(self, model: PreTrainedModel) -> None:
        ban_tokens(model.get_output_embeddings(), self.banned_token_ids)
        share_prompts(model, self.positions)

    def read(self, images: Sequence[BagImage], device: torch.device | str) -> ProcessedImages:
        return ProcessedImages(self, [self.process(decode_image(image.image)) for image in images], device)

    def images_of(self, images: Sequence[BagImage]) -> list[bytes]:
        return [image.image for image in images]

    def save_for_engine(self, model: PreTrainedModel, folder: Path) -> None:
        """Never tied: vLLM packs the output layer for the CPU on its own, and a reload that doesn't name it leaves the old one."""
        config = type(model.config)(**model.config.to_dict())
        for one in (config, config.get_text_config()):
            one.tie_word_embeddings = False
            one.architectures = [
                type(model).__name__
            ]  # vllm 0.29 on CPU asks the decoder's config of a Qwen3-VL as well
        config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def engine_options(self) -> dict[str, Any]:
        return {
            "max_model_len": self.longest_prompt + self.longest_caption,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_processor_cache_gb": 0,  # an image is asked for once per step
            "skip_mm_profiling": True,
            # Else vllm 0.29 has the Qwen models scale pixels by buffers that a start without weights (load_format) overwrites.
            "mm_device_do_normalize": False,
        }

    def engine_names(self, model: PreTrainedModel) -> Mapping[str, str]:
        """vLLM maps transformers' names itself."""
        return {name: name for name in model.state_dict() if ".lora_" not in name}

    def beside_engine(self, model: PreTrainedModel) -> None:
        return None  # all of it runs in the engine

    def requests(self, images: Sequence[bytes], beside: None, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        for image in images:
            yield {"prompt": self.prompt, "multi_modal_data": {"image": decode_image(image)}}

    def prompt_of(self, reported: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(reported or ())

    # --- shared work

    def process(self, image: Image.Image) -> dict[str, Tensor]:
        """What the processor makes of the prompt with one image: input_ids [1, P] and more."""
        return dict(self.processor(text=[self.prompt], images=[image], return_tensors="pt"))

    def check_tokenizer(self) -> None:
        tokenizer, rows = self.processor.tokenizer, self.config.get_text_config().vocab_size
        own = tokenizer.convert_tokens_to_ids(self.processor.image_token)
        if own != self.image_token_id:
            raise MismatchError(
                f"the tokenizer's image token {self.processor.image_token!r} is {own}, the model's is {self.image_token_id}: they "
                "are not of one captioner; take tokenizer and model from the same folder"
            )
        if len(tokenizer) > rows:
            raise MismatchError(
                f"the tokenizer knows {len(tokenizer)} tokens and the model has embeddings of {rows}: they are not of one captioner"
            )

    def _banned(self) -> tuple[int, ...]:
        known = self.processor.tokenizer.get_vocab()
        ids = {known.get(one) if isinstance(one, str) else one for one in self.placeholders()}
        rows = self.config.get_text_config().vocab_size
        return tuple(sorted(one for one in ids if one is not None and one < rows))

    def _prompt_text(self) -> str:
        if not getattr(self.processor, "chat_template", None) and not self.processor.tokenizer.chat_template:
            raise UnsupportedError(
                "the captioner's processor has no chat template, so nobody can say what its prompt looks like: take an "
                "instruction-tuned checkpoint, or put a chat_template.jinja beside it"
            )
        content = [{"type": "image"}, {"type": "text", "text": getattr(self.config, PROMPT_FIELD)}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens, with an image of which the processor makes the most."""
        return self.process(Image.new("RGB", self.largest_image()))["input_ids"].shape[1]


class ProcessedImages:
    """What the processor made of N images, each behind the prompt."""

    def __init__(self, family: Vlm, inputs: list[dict[str, Tensor]], device: torch.device | str) -> None:
        self._family, self._device = family, device
        self._inputs = inputs
        self.prompts = [tuple(one["input_ids"][0].tolist()) for one in inputs]

    def __len__(self) -> int:
        return len(self._inputs)

    def of(self, rows: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """Prompts are padded on the left, so that captions follow all of them at the same place."""
        own = [self._inputs[row] for row in rows.tolist()]
        ids = [one["input_ids"][0] for one in own]
        inputs = {
            "prompt_ids": _left_padded(ids, self._family.end_token_ids[0]),
            "prompt_mask": _left_padded([torch.ones_like(one) for one in ids], 0),
        }
        if "mm_token_type_ids" in own[0]:
            inputs["mm_token_type_ids"] = _left_padded([one["mm_token_type_ids"][0] for one in own], 0)
        inputs |= self._family.collate(own)
        return {name: value.to(self._device) for name, value in inputs.items()}

    def alone(self, row: int, token_ids: Sequence[int]) -> dict[str, Tensor]:
        own = self._inputs[row]
        ids = torch.cat([own["input_ids"], torch.tensor([list(token_ids)], dtype=torch.long)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self._family.collate([own])
        if "mm_token_type_ids" in own:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(own["mm_token_type_ids"], (0, len(token_ids)))
        return {name: value.to(self._device) for name, value in inputs.items()}


def ban_tokens(output_layer: torch.nn.Linear, token_ids: Sequence[int]) -> None:
    """Gives the output layer a bias, in no state dict, that leaves these tokens no probability: TRL's loss takes it as well."""
    bias = output_layer.weight.new_zeros(output_layer.out_features)
    bias[list(token_ids)] = BANNED_LOGIT
    del output_layer.bias
    output_layer.register_buffer("bias", bias, persistent=False)


def token_ids(*given: int | list[int] | None) -> list[int]:
    """Each once, of what configs hold: a token, several or none."""
    flat = (one for own in given for one in (own if isinstance(own, list) else [own]))
    return list(dict.fromkeys(one for one in flat if one is not None))


def _left_padded(rows: list[Int[Tensor, " p"]], value: int) -> Int[Tensor, "n P"]:
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])
