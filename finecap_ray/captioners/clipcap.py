"""ClipCap: cached image features -> mapper -> prefix embeddings -> causal decoder (Mokady et al. 2021, arXiv:2111.09734).

The image tower is frozen and its pooled features come with the bag, so `pixel_values` here are features [N, F], not
pixels. The model is a Hugging Face image-text model: TRL trains it as one, `save_pretrained` writes safetensors, and
the `Auto*` classes find it once this module is imported.

The placeholder of the prefix is the first id past the decoder's vocabulary. It has no row in the output layer, so the
policy can't emit it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationMixin,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from finecap_ray.captioners.mapper import Mapper, MapperKind

IMAGE_TOKEN = "<image>"
_SCORED_TOGETHER = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% endif %}"
    "{% endfor %}{% endfor %}"
)
_DECODER = "model.language_model."


class ClipCapConfig(PreTrainedConfig):
    model_type = "clipcap"
    sub_configs: ClassVar = {"text_config": AutoConfig}
    auto_map: ClassVar = {}  # transformers reads it when TRL builds the reference model of a KL term

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        feature_dim: int = 1280,
        prefix_length: int = 8,
        mapper: MapperKind = "linear",
        mapper_width: int = 512,
        mapper_layers: int = 2,
        feature_dropout: float = 0.0,
        feature_tower: str = "",
        **kwargs: Any,
    ) -> None:
        """`feature_tower` is the digest of the frozen tower whose features the mapper was trained on."""
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config or GPT2Config()
        self.feature_dim = feature_dim
        self.prefix_length = prefix_length
        self.mapper = mapper
        self.mapper_width = mapper_width
        self.mapper_layers = mapper_layers
        self.feature_dropout = feature_dropout
        self.feature_tower = feature_tower
        kwargs.setdefault("eos_token_id", self.text_config.eos_token_id)
        kwargs.setdefault("pad_token_id", self.text_config.pad_token_id)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        return self.text_config.vocab_size


class ClipCapPreTrainedModel(PreTrainedModel):
    config_class = ClipCapConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True


class ClipCapModel(ClipCapPreTrainedModel):
    """Mapper and decoder without the output layer."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__(config)
        decoder = config.text_config
        self.mapper = Mapper(
            config.mapper,
            config.feature_dim,
            config.prefix_length,
            decoder.hidden_size,
            config.mapper_width,
            config.mapper_layers,
            decoder.num_attention_heads,
            config.feature_dropout,
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_of_row: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] with P placeholders per image, pixel_values [images, F] -> hidden states [B, T, H].

        Rows that show the same image can share its prefix, which then runs through mapper and decoder once: with
        `image_of_row` [B], the image of each row, `input_ids` [B, 1 + T] begin with one placeholder that stands for all P,
        and its hidden state is that of the last of them. Raises ValueError when placeholders and images don't match.
        """
        if image_of_row is not None:
            return self._forward_shared(input_ids, attention_mask, pixel_values, image_of_row)
        if inputs_embeds is None:
            slots = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
            images = 0 if pixel_values is None else len(pixel_values)
            if int(slots.sum()) != images * self.config.prefix_length:
                raise ValueError(
                    f"{int(slots.sum())} image placeholders for {images} images of {self.config.prefix_length} prefix embeddings each"
                )
            if images:
                prefix = self.mapper(pixel_values.to(self.mapper.out.weight.dtype)).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(slots.unsqueeze(-1), prefix)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _forward_shared(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        image_of_row: torch.Tensor,
    ) -> BaseModelOutputWithPast:
        prefix = self.mapper(pixel_values.to(self.mapper.out.weight.dtype))
        images = self.language_model(inputs_embeds=prefix, use_cache=True)
        cache = images.past_key_values
        cache.batch_select_indices(image_of_row)
        length = prefix.shape[1]
        texts = self.language_model(
            inputs_embeds=self.get_input_embeddings()(input_ids[:, 1:]),
            attention_mask=torch.cat([attention_mask[:, :1].expand(-1, length), attention_mask[:, 1:]], dim=1),
            position_ids=torch.arange(length, length + input_ids.shape[1] - 1, device=input_ids.device)[None],
            past_key_values=cache,
        )
        last = images.last_hidden_state[image_of_row, -1:]
        return BaseModelOutputWithPast(last_hidden_state=torch.cat([last, texts.last_hidden_state], dim=1))


class ClipCapForConditionalGeneration(ClipCapPreTrainedModel, GenerationMixin):
    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__(config)
        self.model = ClipCapModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            embeddings = self.model.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with labels [B, T] (-100: not scored) also the mean next-token loss, in nats.

        In training, labels make it compute the logits that they score and no others, and return none; the loss is then the sum
        over `num_items_in_batch` where that is given: the Trainer's count of the labels of all workers.
        """
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            **kwargs,
        )
        if labels is not None and self.training:
            scored = labels[:, 1:] != -100
            hidden, targets = outputs.last_hidden_state[:, :-1][scored], labels[:, 1:][scored]
            # A CPU compiles a kernel for each shape that it meets: their number is kept small.
            short = -len(targets) % _SCORED_TOGETHER
            logits = self.lm_head(nn.functional.pad(hidden, (0, 0, 0, short)))
            loss = fixed_cross_entropy(logits.float(), nn.functional.pad(targets, (0, short), value=-100), items)
            return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, pixel_values=None, is_first_iteration=False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs["pixel_values"] = pixel_values if is_first_iteration else None
        return inputs

    def decoder_config(self) -> PreTrainedConfig:
        """Config of the decoder as a causal LM of its own: what the sampling engine is built from.

        Never tied: vLLM packs the output layer for the CPU on its own, and a reload that doesn't name it leaves the old one.
        """
        config = type(self.config.text_config)(**self.config.text_config.to_dict())
        config.architectures = [_causal_lm_class(config).__name__]
        config.tie_word_embeddings = False
        return config

    def decoder_names(self) -> dict[str, str]:
        """Name in this model's state dict -> name in the causal LM class that `decoder_config` names."""
        prefix = _causal_lm_class(self.config.text_config).base_model_prefix
        names = {f"{_DECODER}{name}": f"{prefix}.{name}" for name in self.model.language_model.state_dict()}
        return names | {"lm_head.weight": "lm_head.weight"}


def _causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return AutoModelForCausalLM._model_mapping[type(config)]


class ClipCapProcessor(ProcessorMixin):
    """Text with `<image>` marks and image features [F] each -> input_ids with P placeholders per image, pixel_values [N, F]."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prefix_length: int = 8,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.prefix_length = prefix_length
        self.image_token = IMAGE_TOKEN
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: list | None = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """`images`: features [F] per image, flat or one list per text."""
        texts = [text] if isinstance(text, str) else list(text)
        texts = [one.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.prefix_length) for one in texts]
        options = {name: kwargs[name] for name in ("truncation", "max_length", "add_special_tokens") if name in kwargs}
        inputs = dict(self.tokenizer(texts, padding=padding, padding_side="left", **options))
        if images is not None:
            flat = (
                [features for group in images for features in group] if isinstance(images[0], list | tuple) else images
            )
            inputs["pixel_values"] = np.stack([np.asarray(features, dtype=np.float32) for features in flat])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def prompt_token_ids(self) -> list[int]:
        """The prompt of one image: nothing but its placeholders."""
        return [self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * self.prefix_length


AutoConfig.register("clipcap", ClipCapConfig)
AutoModel.register(ClipCapConfig, ClipCapModel)
AutoModelForCausalLM.register(ClipCapConfig, ClipCapForConditionalGeneration)
AutoModelForImageTextToText.register(ClipCapConfig, ClipCapForConditionalGeneration)
AutoProcessor.register(ClipCapConfig, ClipCapProcessor)
