"""The models that settings name: whether they are there and fit each other, looked at before Ray starts."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from transformers import AutoConfig

from finecap_ray.captioners.clipcap import ClipCapConfig
from finecap_ray.captioners.decoders import check_decoder, check_sampler_runs
from finecap_ray.config import Settings
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.hub import check_hub
from finecap_ray.scorers.scorer import check_scorer
from finecap_ray.scorers.tower import check_tower, check_trained_tower
from finecap_ray.smollm2 import smollm2_folder


def check_models(settings: Settings) -> None:
    """Raises ConfigError or DataError for a tower, scorer or captioner that isn't there, UnsupportedError where it takes a hub
    that this machine doesn't reach, MismatchError for a captioner of features of another width than the tower's."""
    check_tower(settings.tower)
    for name, scorer in (("scorer", settings.scorer), ("judge", settings.judge)):
        if scorer.spec is not None:
            check_scorer(scorer.spec)
        elif scorer.text == "smollm2":
            smollm2_folder(f"{name}.text")
        check_trained_tower(settings.tower, scorer, name)
    if settings.captioner.spec is None:
        check_decoder(settings.captioner.decoder)
        check_sampler_runs(settings.captioner.decoder)
    else:
        _check_start(settings.captioner.spec, settings)


def _check_start(spec: str, settings: Settings) -> None:
    if not Path(spec).is_dir():
        check_hub(spec, "captioner.spec")
    try:
        config = AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise DataError(f"captioner.spec: no captioner at {spec} ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(config, ClipCapConfig):
        return
    with torch.device("meta"):
        width = timm.create_model(settings.tower.model, pretrained=False, num_classes=0).num_features
    if config.feature_dim != width:
        raise MismatchError(
            f"captioner.spec: {spec} maps features of {config.feature_dim} numbers, tower.model={settings.tower.model} makes {width}"
        )
