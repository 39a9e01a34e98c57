"""A new ClipCap: a mapper with fresh weights before a decoder from scratch, or before a pretrained one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from finecap_ray.captioners.clipcap import IMAGE_TOKEN, ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor
from finecap_ray.captioners.decoders import SCRATCH, load_decoder, scratch_config, train_tokenizer
from finecap_ray.config import CaptionerSettings
from finecap_ray.errors import MismatchError


def build_clipcap(
    settings: CaptionerSettings,
    captions: Iterable[str],
    feature_dim: int,
    feature_tower: str,
    feature_dropout: float,
    seed: int,
) -> tuple[ClipCapForConditionalGeneration, ClipCapProcessor]:
    """`feature_tower` is the digest of the tower that makes features of `feature_dim` numbers; `captions` are for a vocabulary.

    Raises what `load_decoder` does for a decoder that isn't there or doesn't fit, and MismatchError where its tokenizer leaves
    no place for the image token.
    """
    pretrained = None
    if settings.decoder == SCRATCH:
        tokenizer = train_tokenizer(captions, settings.vocabulary)
        decoder = scratch_config(settings, len(tokenizer), tokenizer.eos_token_id)
    else:
        pretrained, tokenizer = load_decoder(settings.decoder, settings.prefix_length + settings.max_tokens)
        decoder = _plain(pretrained.config)
    # Added last: its id is the size of the decoder's vocabulary.
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id != decoder.vocab_size:
        raise MismatchError(
            f"{settings.decoder}: {IMAGE_TOKEN} is token {image_token_id} of its tokenizer, and the place of an image has to be "
            f"the first id behind its vocabulary, {decoder.vocab_size}: its vocabulary has that word or ids that no token has; "
            "take another decoder"
        )
    config = ClipCapConfig(
        text_config=decoder,
        feature_dim=feature_dim,
        prefix_length=settings.prefix_length,
        mapper=settings.mapper,
        mapper_width=settings.mapper_width,
        mapper_layers=settings.mapper_layers,
        feature_dropout=feature_dropout,
        feature_tower=feature_tower,
    )
    torch.manual_seed(seed)
    model = ClipCapForConditionalGeneration(config)
    if pretrained is not None:
        model.model.language_model.load_state_dict(pretrained.base_model.state_dict())
        model.lm_head.weight.data.copy_(pretrained.get_output_embeddings().weight)
        model.model.mapper.scale_to(pretrained.get_input_embeddings().weight)
    return model, ClipCapProcessor(tokenizer, prefix_length=settings.prefix_length)


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without what says how its weights were stored."""
    tree = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        tree.pop(name, None)
    return type(config)(**tree)
