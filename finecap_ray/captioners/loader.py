"""One loader for every captioner: a folder or a hub name -> model and processor."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from finecap_ray.captioners import clipcap  # registers the Auto classes
from finecap_ray.errors import DataError, MismatchError, UnsupportedError


def load_captioner(spec: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (float32, in eval mode) and processor of a folder written by `save_pretrained`, or of a hub name.

    Raises DataError where there is no such captioner, UnsupportedError for a family that isn't supported.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(spec, dtype="float32")
        processor = AutoProcessor.from_pretrained(spec)
    except (OSError, ValueError) as error:  # ValueError: a folder without config.json, or a model type nobody knows
        raise DataError(
            f"no captioner at {spec!s}: expected a folder with config.json and model.safetensors, or a hub name ({error})"
        ) from error
    if not isinstance(model, clipcap.ClipCapForConditionalGeneration):
        raise UnsupportedError(
            f"{spec!s} is a {type(model).__name__}; this version trains and samples ClipCap captioners"
        )
    return model.eval(), processor


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
