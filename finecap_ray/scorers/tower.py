"""The frozen image tower: encoded images -> pooled features, computed once and kept.

Captioner, reward scorer and judge of the embedded set-up all stand on these features, so no image is seen twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from jaxtyping import Float
from open_clip.transform import image_transform
from safetensors import SafetensorError, safe_open
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

_AROUND_PLAIN = {f"{PLAIN}_levels": LevelPooled, f"{PLAIN}_mirrored": Mirrored}


class FrozenTower:
    """`embed(list of encoded images) -> [n, F] float32`; `digest` names weights and preprocessing."""

    def __init__(self, name: str, model: torch.nn.Module, image_size: int) -> None:
        """`name` is the one by which timm builds the architecture."""
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        # What the tower was trained on, which isn't OpenAI's mean and deviation, open_clip's default.
        self.mean, self.std = (tuple(model.default_cfg[name]) for name in ("mean", "std"))
        self.preprocess = image_transform(image_size, is_train=False, mean=self.mean, std=self.std)
        self.width: int = model.num_features
        self.digest = weight_digest(model.state_dict(), image_size, self.mean, self.std)
        self.device = device()
        self.model.to(self.device, memory_format=torch.channels_last)  # twice as fast on a CPU

    def embed(self, images: list[bytes]) -> Float[Tensor, "n F"]:
        """Pooled features. Raises DataError for bytes that aren't an image."""
        return self.look([self.preprocess(decode_image(image)) for image in images])

    @torch.inference_mode()
    def look(self, pixels: Sequence[Float[Tensor, "3 S S"]]) -> Float[Tensor, "n F"]:
        """Pooled features of images that are preprocessed."""
        batch = torch.stack(list(pixels)).to(self.device, memory_format=torch.channels_last)
        return self.model(batch).cpu()


def device() -> str:
    """The GPU of this process, where Ray (or the machine) gave it one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_tower(settings: TowerSettings) -> None:
    """Raises what `load_tower` does, and UnsupportedError where a hub is needed and absent."""
    _check_names(settings)
    if settings.weights.endswith(".safetensors"):
        with torch.device("meta"):
            _fitting(settings, timm.create_model(settings.model, pretrained=False, num_classes=0))
    elif settings.weights != "package":
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
        with safe_open(settings.weights, "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in _fitting(settings, model)})
    else:
        model = timm.create_model(f"{settings.model}.{settings.weights}", pretrained=True, num_classes=0)
    return FrozenTower(settings.model, model, settings.image_size)


def _fitting(settings: TowerSettings, model: torch.nn.Module) -> list[str]:
    """Names of the tower's weights in the file, whose classifier is left out. Raises ConfigError where it holds others."""
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    classifiers = model.default_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    try:
        with safe_open(settings.weights, "pt") as file:
            held = {name: file.get_slice(name).get_shape() for name in file.keys() if not name.startswith(prefixes)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"tower.weights: {settings.weights} can't be read as safetensors: {error}") from None
    if wrong := sorted(name for name in own | held if own.get(name) != held.get(name)):
        raise ConfigError(
            f"tower.weights: {settings.weights} doesn't hold tower.model={settings.model}: {len(wrong)} of {len(own)} weights are "
            f"absent, other or of another shape, such as {', '.join(wrong[:3])}"
        )
    return list(own)
