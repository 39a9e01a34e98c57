"""Which parts of a captioner train: fully, through LoRA, or not at all; and the weights it captions with in each case.

LoRA (Hu 2021, arXiv:2106.09685) adds B A alpha / rank to a frozen matrix. The adapters are put into decoder and image tower in place,
so the model stays the captioner that it was, and everyone else (sampler, checkpoint, result) gets merged weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finecap_ray.captioners.decoders import architecture
from finecap_ray.captioners.families import family_class
from finecap_ray.captioners.family import Part
from finecap_ray.config import Settings, TrainableSettings
from finecap_ray.errors import ConfigError, MismatchError

ADAPTER_FILE = "trained.safetensors"  # in a checkpoint with LoRA: what trains, beside the merged captioner
_ADAPTER = "default"


def check_trainable(settings: Settings) -> None:
    """Raises ConfigError for parts that the captioner doesn't have, or LoRA targets that a part doesn't have.

    Reads the captioner's config, not its weights.
    """
    from finecap_ray.captioners.loader import load_processor

    spec, trainable = settings.captioner.spec, settings.rl.trainable
    if spec is None:
        if trainable.decoder == "lora":
            with torch.device("meta"):
                decoder = AutoModel.from_config(architecture(settings.captioner.decoder))
            _check_targets(decoder, "decoder", trainable.lora_targets, "lora_targets")
        return
    config, _ = load_processor(spec, settings.captioner)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    _adapted_modules(model, trainable)


def set_trainable(model: PreTrainedModel, settings: TrainableSettings, seed: int) -> None:
    """Freezes what doesn't train and puts the adapters into their parts, whose output is the same until they are trained.

    `seed` is that of the adapters' A; B is 0. Raises ConfigError for parts or targets that the captioner doesn't have.
    """
    family = family_class(model.config.model_type)
    adapted = _adapted_modules(model, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(settings, family.part_of(name)) == "full")
    for module, targets in adapted:
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=list(targets),
            lora_dropout=0.0,  # the log-probs that train have to be those that were sampled from
            fan_in_fan_out=any(isinstance(inner, Conv1D) for inner in module.modules()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(lora, module, _ADAPTER)


def _adapted_modules(
    model: PreTrainedModel, settings: TrainableSettings
) -> list[tuple[torch.nn.Module, tuple[str, ...]]]:
    """The modules that get adapters, with their targets. Raises ConfigError for what isn't there."""
    family = family_class(model.config.model_type)
    if settings.vision != "frozen" and family.module(model, "vision") is None:
        raise ConfigError(
            f"rl.trainable.vision={settings.vision}: a {model.config.model_type} captioner has no image tower of its own, its "
            "features come with the bags; leave it frozen"
        )
    wanted: dict[Part, tuple[str, ...]] = {}
    if settings.decoder == "lora":
        wanted["decoder"] = settings.lora_targets
    if settings.vision == "lora":
        wanted["vision"] = settings.vision_lora_targets
    for part, targets in wanted.items():
        key = "lora_targets" if part == "decoder" else "vision_lora_targets"
        _check_targets(family.module(model, part), part, targets, key)
    return [(family.module(model, part), targets) for part, targets in wanted.items()]


def merged_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict of the captioner without adapters: W + B A alpha / rank where there is one. The model isn't changed.

    Weights without an adapter are the model's own tensors, no copies.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    weights = {_plain(name): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    with torch.no_grad():
        for name, layer in adapted.items():
            weights[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight(_ADAPTER)
    return weights


def share_frozen(reference: PreTrainedModel, model: PreTrainedModel) -> None:
    """Lets the reference of a KL term use the frozen weights of the model that trains, which are its own: no second copy."""
    for name, parameter in model.named_parameters():
        own = None if ".lora_" in name else reference.get_parameter(_plain(name))
        if own is not None and not parameter.requires_grad and torch.equal(own, parameter):
            own.data = parameter.data


def save_trained(model: PreTrainedModel, folder: str | Path) -> None:
    """Beside the merged weights of a checkpoint, what they were merged from: a merged matrix can't be taken apart again."""
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        save_file(_trained(model), str(Path(folder) / ADAPTER_FILE))


def load_trained(model: PreTrainedModel, folder: str | Path) -> bool:
    """Loads what `save_trained` wrote. False where the model has no adapters and the checkpoint is all of it.

    Raises MismatchError where checkpoint and model don't train the same parts.
    """
    path, own = Path(folder) / ADAPTER_FILE, _trained(model)
    adapted = any(isinstance(module, LoraLayer) for module in model.modules())
    if not adapted and not path.is_file():
        return False
    saved = load_file(str(path)) if path.is_file() else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise MismatchError(
            f"the checkpoint {folder} trained {_count(saved)}, this run trains {_count(own)}: "
            "resume with the rl.trainable it was made with"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return True


def _trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _count(tensors: dict[str, torch.Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    adapted = sum(".lora_A." in name for name in tensors)
    return f"{numbers} numbers with {adapted} LoRA adapters"


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _check_targets(module: torch.nn.Module, part: Part, targets: tuple[str, ...], key: str) -> None:
    modules = dict(module.named_modules())
    linear = {name for name, inner in modules.items() if isinstance(inner, torch.nn.Linear | Conv1D)}
    known = sorted({_within_layer(name) for name in linear})
    for target in targets:
        found = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not found or not found <= linear:
            what = "isn't a matrix" if found else "isn't there"
            raise ConfigError(
                f"rl.trainable.{key}: {target!r} {what} in a {part} of type {module.config.model_type}, which has {', '.join(known)}"
            )


def _within_layer(name: str) -> str:
    """h.0.attn.c_attn -> attn.c_attn"""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 if numbers else 0 :])
