"""The causal decoders that a ClipCap stands on: GPT-2-like from scratch, SmolLM2-135M of its package, or any causal language model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from finecap_ray.config import CaptionerSettings
from finecap_ray.config_models import NAMED_DECODERS
from finecap_ray.errors import ConfigError, MismatchError, UnsupportedError
from finecap_ray.hub import check_hub
from finecap_ray.smollm2 import GGUF_FILE, smollm2_folder

SCRATCH, SMOLLM2 = NAMED_DECODERS
END_TOKEN = "<|endoftext|>"
_KNOWN = {SCRATCH: GPT2Config(n_layer=1), SMOLLM2: LlamaConfig(num_hidden_layers=1)}


def check_decoder(name: str) -> None:
    """Raises ConfigError for a decoder that isn't there, UnsupportedError without a hub to ask, or for what is no causal language model.

    Reads a config at most, no weights.
    """
    if name == SCRATCH:
        return
    if name == SMOLLM2:
        smollm2_folder("captioner.decoder")
        return
    if not Path(name).is_dir():
        check_hub(name, "captioner.decoder")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"captioner.decoder: {name!r} is none: give {SCRATCH}, {SMOLLM2}, or a folder or hub name with a config.json "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"captioner.decoder: {name!r} is a {config.model_type}, no causal language model")
    if not hasattr(config, "max_position_embeddings"):
        raise UnsupportedError(
            f"captioner.decoder: {name!r} is a {config.model_type}, which doesn't say how many tokens it reads"
        )
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    more = [
        one
        for one in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if getattr(config, one, None) not in (None, 1)
    ]
    more += ["a bias of its output layer"] if getattr(head, "bias", None) is not None else []
    if more:
        raise UnsupportedError(
            f"captioner.decoder: {name!r} is a {config.model_type} with {' and '.join(more)}: a ClipCap's output layer is one matrix, "
            "and the sampler's would be more"
        )


def check_sampler_runs(name: str) -> None:
    """Raises UnsupportedError for a decoder that `check_decoder` takes and vllm doesn't run."""
    if name in _KNOWN:
        return
    causal_lm = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(name))]
    if not causal_lm.is_backend_compatible() and causal_lm.__name__ not in _sampled():
        raise UnsupportedError(
            f"captioner.decoder: {name!r} is a {causal_lm.__name__}, which the installed vllm doesn't run: take another"
        )


def _sampled() -> set[str]:
    """Classes that vllm runs with code of its own, asked in a process that ends: vllm would stay in this one."""
    program = "from vllm import ModelRegistry; print(*ModelRegistry.get_supported_archs())"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def architecture(name: str) -> PreTrainedConfig:
    """Config of a decoder of that name with the matrices that it has; of those that are known one layer. Raises as `check_decoder`."""
    if name in _KNOWN:
        return _KNOWN[name]
    check_decoder(name)
    return AutoConfig.from_pretrained(name)


def scratch_config(settings: CaptionerSettings, vocabulary: int, end: int) -> GPT2Config:
    """Of a GPT-2-like decoder that ends a caption with the token `end`."""
    return GPT2Config(
        vocab_size=vocabulary,
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


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `captions`."""
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
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN)


def load_decoder(name: str, longest: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained decoder (float32) for sequences of `longest` tokens, and its tokenizer, which ends texts as the decoder does.

    Raises ConfigError and UnsupportedError as `check_decoder`, and MismatchError for a tokenizer or a length that doesn't fit.
    """
    check_decoder(name)
    folder, file = (smollm2_folder("captioner.decoder"), GGUF_FILE) if name == SMOLLM2 else (name, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise MismatchError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the decoder embeds {config.vocab_size}: they aren't of one model"
        )
    # Rows that no token uses (padding of the vocabulary) could be sampled, and stand where the image token has its id.
    model.resize_token_embeddings(len(tokenizer))
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0] if isinstance(ends, list) else ends)
    tokenizer.pad_token = tokenizer.eos_token
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    _shorten(name, config, longest)
    return model, tokenizer


def _shorten(name: str, config: PreTrainedConfig, longest: int) -> None:
    """Plain rotary positions need no weights: the longest caption is then the settings', as with a decoder from scratch."""
    if config.max_position_embeddings < longest:
        raise MismatchError(
            f"{name} reads {config.max_position_embeddings} tokens, captioner.prefix_length + max_tokens are {longest}: lower them"
        )
    rotary = getattr(config, "rope_parameters", None)
    if rotary and rotary.get("rope_type") == "default":
        config.max_position_embeddings = longest
