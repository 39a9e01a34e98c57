"""Which parts of a captioner train: fully, through LoRA, or not at all; and the weights it captions with in each case.

LoRA (Hu 2021, arXiv:2106.09685) adds B A alpha / rank to a frozen matrix. The adapters are put into decoder and image tower in place,
so the model stays the captioner that it was, and everyone else (sampler, checkpoint, result) gets merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finecap_ray.captioners.clipcap import ClipCapConfig
from finecap_ray.captioners.decoders import architecture
from finecap_ray.captioners.families import family_class
from finecap_ray.captioners.family import Part
from finecap_ray.config import Settings, TrainableSettings
from finecap_ray.errors import ConfigError, MismatchError

ADAPTER_FILE = "trained.safetensors"  # in a checkpoint with LoRA: what trains, beside the merged captioner
_ADAPTER = "default"


def check_trainable(settings: Settings) -> None:
    """Raises ConfigError for parts that the captioner doesn't have, or LoRA targets that a part doesn't have.

    Reads the captioner's config (of a ClipCap that MLE will make its decoder's), not its weights.
    """
    from finecap_ray.captioners.loader import load_processor

    captioner = settings.captioner
    if captioner.spec is None:
        config = ClipCapConfig(text_config=architecture(captioner.decoder))
    else:
        config, _ = load_processor(captioner.spec, captioner)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    _adapted_matrices(model, settings.rl.trainable)


def set_trainable(model: PreTrainedModel, settings: TrainableSettings, seed: int) -> None:
    """Freezes what doesn't train and puts the adapters into their parts, whose output is the same until they are trained.

    `seed` is that of the adapters' A; B is 0. Raises ConfigError for parts or targets that the captioner doesn't have.
    """
    family = family_class(model.config.model_type)
    for module, names in _adapted_matrices(model, settings):
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=names,
            lora_dropout=0.0,  # the log-probs that train have to be those that were sampled from
            fan_in_fan_out=any(isinstance(inner, Conv1D) for inner in module.modules()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(lora, module, _ADAPTER)
    # Afterwards: peft freezes all that a module holds beside its adapters, and the mapper may lie in the image tower.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or getattr(settings, family.part_of(name)) == "full")


def _adapted_matrices(model: PreTrainedModel, settings: TrainableSettings) -> list[tuple[torch.nn.Module, list[str]]]:
    """The modules that get adapters, and the names of their matrices that do. Raises ConfigError for what isn't there."""
    family = family_class(model.config.model_type)
    if settings.vision != "frozen" and family.module(model, "vision") is None:
        raise ConfigError(
            f"rl.trainable.vision={settings.vision}: a {model.config.model_type} captioner has no image tower of its own, its "
            "features come with the bags; leave it frozen"
        )
    wanted: dict[Part, tuple[str, tuple[str, ...]]] = {}
    if settings.decoder == "lora":
        wanted["decoder"] = ("lora_targets", settings.lora_targets)
    if settings.vision == "lora":
        wanted["vision"] = ("vision_lora_targets", settings.vision_lora_targets)
    return [
        (family.module(model, part), _matrices(model, family, part, targets, key))
        for part, (key, targets) in wanted.items()
    ]


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
        save_file(trained(model), str(Path(folder) / ADAPTER_FILE))


def load_trained(model: PreTrainedModel, folder: str | Path) -> bool:
    """Loads what `save_trained` wrote. False where the model has no adapters and the checkpoint is all of it.

    Raises MismatchError where checkpoint and model don't train the same parts.
    """
    path, own = Path(folder) / ADAPTER_FILE, trained(model)
    adapted = any(isinstance(module, LoraLayer) for module in model.modules())
    if not adapted and not path.is_file():
        return False
    saved, fits = read_trained(path, own)
    if not fits:
        raise MismatchError(
            f"the checkpoint {folder} trained {_count(saved)}, this run trains {_count(own)}: "
            "resume with the rl.trainable it was made with"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return True


def read_trained(path: Path, own: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a file, none where there is no such file, and whether they have the names and shapes of `own`."""
    saved = load_file(str(path)) if path.is_file() else {}
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (saved, own)]
    return saved, shapes[0] == shapes[1]


def trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What trains, by name: the model's own tensors, outside of autograd."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _count(tensors: dict[str, torch.Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    adapted = sum(".lora_A." in name for name in tensors)
    return f"{numbers} numbers with {adapted} LoRA adapters"


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _matrices(model: PreTrainedModel, family: type, part: Part, targets: tuple[str, ...], key: str) -> list[str]:
    """Names, within the module of a part, of its matrices whose names end with a target."""
    module = family.module(model, part)
    (path,) = (name for name, inner in model.named_modules() if inner is module)
    # An image tower may hold the mapper, which is a part of its own.
    modules = {
        name: inner for name, inner in module.named_modules() if name and family.part_of(f"{path}.{name}.") == part
    }
    linear = {name for name, inner in modules.items() if isinstance(inner, torch.nn.Linear | Conv1D)}
    known = sorted({_within_layer(name) for name in linear})
    matrices = set()
    for target in targets:
        found = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not found or not found <= linear:
            what = "isn't a matrix" if found else "isn't there"
            raise ConfigError(
                f"rl.trainable.{key}: {target!r} {what} in a {part} of type {module.config.model_type}, which has {', '.join(known)}"
            )
        matrices |= found
    return sorted(matrices)


def _within_layer(name: str) -> str:
    """h.0.attn.c_attn -> attn.c_attn"""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 if numbers else 0 :])
