"""The settings that make a run what it is: those that differ from its preset, or from the defaults where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finecap_ray.config import Settings, load_settings
from finecap_ray.settings_file import preset_names
from finecap_ray.stages import leaves


@dataclass(frozen=True, slots=True)
class Change:
    key: str  # dotted
    value: str
    base: str


@dataclass(frozen=True, slots=True)
class SettingsDiff:
    base: str  # "preset demo" or "the defaults"
    changes: tuple[Change, ...]


def settings_diff(settings: Settings) -> SettingsDiff:
    """Compared with the preset of the same name where there is one; `name` and `run_dir` are no difference."""
    preset = settings.name in preset_names()
    base = load_settings(settings.name) if preset else Settings()
    own, other = (dict(leaves(tree.model_dump(mode="json"))) for tree in (settings, base))
    changes = tuple(
        Change(key, _text(own.get(key)), _text(other.get(key)))
        for key in dict.fromkeys([*own, *other])
        if own.get(key) != other.get(key) and key not in ("name", "run_dir")
    )
    return SettingsDiff(f"preset {settings.name}" if preset else "the defaults", changes)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(own) for own in value) or "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_text(own)}" for key, own in value.items())
    return "none" if value is None else str(value)
