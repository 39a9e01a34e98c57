"""Image-text models of some 100,000 random weights, with tokenizers of their own: for tests and benchmarks, no hub needed.

They are the supported architectures with every part in it; what they caption means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

WIDTH, HEADS, LAYERS = 128, 4, 2
_CAPTIONS = ["a red apple on a plate", "two dogs run on the beach", "a man rides a bike", "describe the image"]
_QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDEFICS_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
)
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_tiny(kind: str, folder: str | Path, tied: bool = False, seed: int = 0) -> None:
    """Writes a captioner of that kind (see TINY); `tied`: word embeddings and output layer are one matrix."""
    torch.manual_seed(seed)
    model, processor = TINY[kind](tied)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform distributions
            parameter.add_(0.08 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer(special: tuple[str, ...], end: str, **more: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_CAPTIONS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token="<|endoftext|>", extra_special_tokens=more
    )


def _text(tokenizer: PreTrainedTokenizerFast, end: str, tied: bool) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{side}_token_id": f"vision_{side}" for side in ("start", "end")}
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(_QWEN_TOKENS, "<|im_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")


def _qwen2_5_vl(tied: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _qwen_tokenizer()
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84})
    rope = {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        text_config=_text(tokenizer, "<|im_end|>", tied) | {"rope_parameters": rope},
        tie_word_embeddings=tied,
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=_QWEN_TEMPLATE)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(tied: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _qwen_tokenizer()
    images = Qwen2VLImageProcessor(
        size={"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    rope = {"mrope_section": [6, 5, 5], "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config=_text(tokenizer, "<|im_end|>", tied) | {"head_dim": WIDTH // HEADS, "rope_parameters": rope},
        tie_word_embeddings=tied,
        **_qwen_ids(tokenizer),
    )
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=_QWEN_TEMPLATE)
    return Qwen3VLForConditionalGeneration(config), processor


def _idefics3(tied: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(_IDEFICS_TOKENS + _TILES, "<end_of_utterance>")
    images = Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    config = Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config=_text(tokenizer, "<end_of_utterance>", tied) | {"model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    # A tile of 4 x 4 patches is 2 x 2 tokens.
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_IDEFICS_TEMPLATE)
    return Idefics3ForConditionalGeneration(config), processor


TINY: dict[str, Callable[[bool], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics3,
}
