"""The frozen image tower: encoded images -> pooled features, computed once and kept.

Captioner, reward scorer and judge of the embedded set-up all stand on these features, so no image is seen twice.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from jaxtyping import Float
from open_clip.transform import image_transform
from safetensors.torch import load_file
from torch import Tensor

from finecap_ray.config import ScorerSettings, TowerSettings
from finecap_ray.errors import ConfigError
from finecap_ray.hub import check_hub
from finecap_ray.images import decode_image
from finecap_ray.scorers.digest import weight_digest
from finecap_ray.scorers.levels import LevelPooled
from finecap_ray.scorers.mirrored import Mirrored
from finecap_ray.scorers.packages import efficientnet_lite0
from finecap_ray.scorers.pooled import PLAIN

# The towers above were trained on (x - 127.5) / 127.5, not on OpenAI's mean and deviation, open_clip's default.
MEAN = STD = (0.5, 0.5, 0.5)
_AROUND_PLAIN = {f"{PLAIN}_levels": LevelPooled, f"{PLAIN}_mirrored": Mirrored}


class FrozenTower:
    """`embed(list of encoded images) -> [n, F] float32`; `digest` names weights and preprocessing."""

    def __init__(self, name: str, model: torch.nn.Module, image_size: int) -> None:
        """`name` is the one by which timm builds the architecture."""
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.preprocess = image_transform(image_size, is_train=False, mean=MEAN, std=STD)
        self.width: int = model.num_features
        self.digest = weight_digest(model.state_dict(), image_size, MEAN, STD)
        self.device = device()
        self.model.to(self.device, memory_format=torch.channels_last)  # twice as fast on a CPU

    @torch.inference_mode()
    def embed(self, images: list[bytes]) -> Float[Tensor, "n F"]:
        """Pooled features. Raises DataError for bytes that aren't an image."""
        pixels = torch.stack([self.preprocess(decode_image(image)) for image in images])
        return self.model(pixels.to(self.device, memory_format=torch.channels_last)).cpu()


def device() -> str:
    """The GPU of this process, where Ray (or the machine) gave it one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_tower(settings: TowerSettings) -> None:
    """Raises what `load_tower` does, and UnsupportedError where a hub is needed and absent."""
    _check_names(settings)
    if settings.weights != "package" and not settings.weights.endswith(".safetensors"):
        check_hub(timm.models.get_pretrained_cfg(f"{settings.model}.{settings.weights}").hf_hub_id, "tower.weights")


def check_trained_tower(tower: TowerSettings, scorer: ScorerSettings, name: str) -> None:
    """Raises ConfigError where a scorer, by the name of its section, wants what the tower doesn't have: a last map, or groups
    of layers."""
    if scorer.spec is not None or not scorer.looks_at_images:
        return
    with torch.device("meta"):
        model = timm.create_model(tower.model, pretrained=False, num_classes=0)
    near = f": take {PLAIN}" if tower.model in _AROUND_PLAIN else ""
    if scorer.pooling == "spatial" and not model.default_cfg.get("pool_size"):
        raise ConfigError(f"{name}.pooling=spatial: tower.model={tower.model} doesn't end in a map{near}")
    if scorer.image_groups and not hasattr(model, "group_matcher"):
        raise ConfigError(f"{name}.image_groups={scorer.image_groups}: tower.model={tower.model} has no groups{near}")


def _check_names(settings: TowerSettings) -> None:
    name, weights = settings.model, settings.weights
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:8]}*")[:5]
        raise ConfigError(f"tower.model: timm knows no model {name!r}; near are {near}")
    if weights == "package":
        if name not in (PLAIN, *_AROUND_PLAIN):
            raise ConfigError(f"tower.weights=package holds {PLAIN} only; give a timm tag or a file for {name}")
    elif weights.endswith(".safetensors"):
        if not Path(weights).is_file():
            raise ConfigError(f"tower.weights: no file {weights}")
    else:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if weights not in tags:
            raise ConfigError(f"tower.weights: timm has no {weights!r} of {name}; it has {', '.join(tags) or 'none'}")


def load_tower(settings: TowerSettings) -> FrozenTower:
    """Raises ConfigError for an unknown timm name or weights that don't exist."""
    _check_names(settings)  # not the hub: every actor loads a tower, and weights that are cached need none
    if settings.weights == "package":
        plain = efficientnet_lite0()
        model = _AROUND_PLAIN[settings.model](plain) if settings.model in _AROUND_PLAIN else plain
    elif settings.weights.endswith(".safetensors"):
        model = timm.create_model(settings.model, pretrained=False, num_classes=0)
        model.load_state_dict(load_file(settings.weights))
    else:
        model = timm.create_model(f"{settings.model}.{settings.weights}", pretrained=True, num_classes=0)
    return FrozenTower(settings.model, model, settings.image_size)
