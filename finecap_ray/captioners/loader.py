"""One loader for every captioner: a folder or a hub name -> model and processor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from finecap_ray.captioners import clipcap  # noqa: F401 - registers the Auto classes
from finecap_ray.captioners.families import family_class, family_of
from finecap_ray.captioners.vlm import PROMPT_FIELD, Vlm, token_ids
from finecap_ray.config import CaptionerSettings
from finecap_ray.config_models import DEFAULT_PROMPT
from finecap_ray.errors import DataError, MismatchError, UnsupportedError


def load_captioner(
    spec: str | Path, settings: CaptionerSettings | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (float32, in eval mode) and processor of a folder written by `save_pretrained`, or of a hub name.

    `settings` give a start its prompt, image size and longest caption; what is saved afterwards keeps them. Raises DataError
    where there is no such captioner, UnsupportedError for a family that isn't supported, MismatchError for a tokenizer of another model.
    """
    config, processor = load_processor(spec, settings)
    try:
        model = AutoModelForImageTextToText.from_pretrained(spec, config=config, dtype="float32")
    except (OSError, ValueError) as error:
        raise _nothing_at(spec, error) from error
    family = family_of(config, processor)
    family.prepare(model)
    model.generation_config.eos_token_id = list(family.end_token_ids)
    if settings is not None:
        model.generation_config.max_new_tokens = settings.max_tokens
    return model.eval(), processor


def load_processor(
    spec: str | Path, settings: CaptionerSettings | None = None
) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """As `load_captioner`, of everything but the weights: what can be looked at before anything heavy starts."""
    try:
        config = AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:  # ValueError: a folder without config.json, or a model type nobody knows
        raise _nothing_at(spec, error) from error
    family = family_class(config.model_type)
    try:
        processor = AutoProcessor.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise _nothing_at(spec, error) from error
    if not isinstance(processor, ProcessorMixin):
        raise UnsupportedError(
            f"{spec!s} has a tokenizer and no processor of images: the folder lacks preprocessor_config.json"
        )
    if issubclass(family, Vlm):
        settings = settings or CaptionerSettings()
        if settings.prompt is not None or not hasattr(config, PROMPT_FIELD):
            setattr(config, PROMPT_FIELD, settings.prompt or DEFAULT_PROMPT)
        if settings.image_size is not None:
            family.set_image_size(processor, settings.image_size)
        _set_ends(config, processor, family.end_of_turn, spec)
    family_of(config, processor)  # raises what doesn't fit
    return config, processor


def _set_ends(config: PreTrainedConfig, processor: ProcessorMixin, end_of_turn: str | None, spec: str | Path) -> None:
    """A caption ends with what ends a turn of the chat, which an Idefics3's tokenizer doesn't call its end; and with all that the
    checkpoint's own `generation_config.json` stops at."""
    if end_of_turn in processor.tokenizer.get_vocab():
        processor.tokenizer.eos_token = end_of_turn
    ends = [config.get_text_config().eos_token_id]
    with suppress(OSError):  # it has none
        ends.append(GenerationConfig.from_pretrained(spec).eos_token_id)
    config.get_text_config().eos_token_id = token_ids(*ends)


def _nothing_at(spec: str | Path, error: Exception) -> DataError:
    return DataError(
        f"no captioner at {spec!s}: expected a folder with config.json and model.safetensors, or a hub name and a network "
        f"that reaches the hub ({error})"
    )


def check_features(model: PreTrainedModel, tower_digest: str, feature_dim: int) -> None:
    """Raises MismatchError unless features of that tower are the ones the captioner was trained on."""
    config = model.config
    if config.feature_dim != feature_dim:
        raise MismatchError(
            f"the captioner maps features of {config.feature_dim} numbers, the tower makes {feature_dim}"
        )
    if config.feature_tower != tower_digest:
        raise MismatchError(
            f"the captioner was trained on features of tower {config.feature_tower}, these are of tower {tower_digest}: "
            "rebuild the features and bags with the captioner's tower"
        )
