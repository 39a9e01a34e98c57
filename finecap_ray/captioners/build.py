"""A new ClipCap: a byte-pair vocabulary trained on the captions at hand and a GPT-2-like decoder from scratch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from finecap_ray.captioners.clipcap import IMAGE_TOKEN, ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor
from finecap_ray.config import CaptionerSettings

END_TOKEN = "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `captions`. The image token is added last: its id is the size of the decoder's vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def build_clipcap(
    settings: CaptionerSettings,
    captions: Iterable[str],
    feature_dim: int,
    feature_tower: str,
    feature_dropout: float,
    seed: int,
) -> tuple[ClipCapForConditionalGeneration, ClipCapProcessor]:
    """A ClipCap with fresh weights. `feature_tower` is the digest of the tower that makes features of `feature_dim` numbers."""
    tokenizer = train_tokenizer(captions, settings.vocabulary)
    end = tokenizer.eos_token_id
    decoder = GPT2Config(
        vocab_size=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=settings.prefix_length + settings.max_tokens,
        activation_function="gelu_pytorch_tanh",  # equal to GPT-2's gelu_new, and one kernel instead of seven on CPU
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    config = ClipCapConfig(
        text_config=decoder,
        feature_dim=feature_dim,
        prefix_length=settings.prefix_length,
        mapper_width=settings.mapper_width,
        feature_dropout=feature_dropout,
        feature_tower=feature_tower,
    )
    torch.manual_seed(seed)
    return ClipCapForConditionalGeneration(config), ClipCapProcessor(tokenizer, prefix_length=settings.prefix_length)
