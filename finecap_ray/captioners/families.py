"""Which captioners there are: by the model type in their config. The others are refused, with the reason where it is known."""

from __future__ import annotations

from importlib.util import find_spec

from transformers import PreTrainedConfig, ProcessorMixin

from finecap_ray.captioners.clipcap_family import ClipCapFamily
from finecap_ray.captioners.family import Family
from finecap_ray.captioners.idefics import Idefics
from finecap_ray.captioners.qwen_vl import QwenVl
from finecap_ray.errors import UnsupportedError

FAMILIES = {
    "clipcap": ClipCapFamily,
    "qwen2_5_vl": QwenVl,
    "qwen3_vl": QwenVl,
    "idefics3": Idefics,
    "smolvlm": Idefics,
}
_LLAVA = "transformers 5.17 saves its weights under names that vllm 0.29 doesn't map: sampler and trainer can't hold the same"
REFUSED = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "mllama": "vllm 0.29 no longer runs it",
    "blip-2": "it has no chat template, and vllm 0.29 takes its prompt in a form of its own",
}


def family_class(model_type: str) -> type:
    """Raises UnsupportedError, with the reason, for a model type that trainer and sampler don't both run."""
    if model_type not in FAMILIES:
        reason = REFUSED.get(model_type, "nobody has shown that trainer and sampler agree on it")
        raise UnsupportedError(
            f"captioners of type {model_type} are not supported ({reason}); supported: {', '.join(FAMILIES)}"
        )
    if model_type == "smolvlm" and find_spec("num2words") is None:
        raise UnsupportedError("SmolVLM's processor needs the package num2words: install it (`pip install num2words`)")
    return FAMILIES[model_type]


def family_of(config: PreTrainedConfig, processor: ProcessorMixin) -> Family:
    return family_class(config.model_type)(config, processor)
