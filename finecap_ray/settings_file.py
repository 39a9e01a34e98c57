"""Settings as they stand in files and on the command line: presets, YAML, dotted overrides, and what is wrong with them."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from finecap_ray.errors import ConfigError


def preset_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _presets().iterdir() if path.name.endswith(".yaml"))


def _presets():
    return resources.files("finecap_ray") / "presets"


def read_tree(source: str | Path) -> dict[str, Any]:
    """The settings of a preset or YAML file, as they stand there. Raises ConfigError where there is none."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(
                f"no config file {path}: give the path of a YAML file, or a preset out of {', '.join(preset_names())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} isn't UTF-8 text: {error}") from None
    else:
        if str(source) not in preset_names():
            near = difflib.get_close_matches(str(source), preset_names(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no preset {str(source)!r}: {hint}presets are {', '.join(preset_names())}; a file ends in .yaml"
            )
        text = (_presets() / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        tree = yaml.load(text, _WithoutRepeats) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} isn't valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold settings by name, found a {type(tree).__name__}")
    return tree


class _WithoutRepeats(yaml.SafeLoader):
    """Of a key that comes twice, YAML's own would keep the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return node


def set_dotted(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """tree[a][b] = value, of keys [a, b]. Raises ConfigError where a is a value."""
    *parents, last = keys
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    # YAML reads 1e-4 as text (it wants 1.0e-4); pydantic turns such text into a float.
    tree[last] = value


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """A line per mistake; that of an unknown key names the nearest one of the tree `settings`."""
    lines = []
    for issue in error.errors():
        location = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location, _all_keys(settings), n=1, cutoff=0.0)
            lines.append(f"unknown setting {location!r}: the nearest known one is {near[0]!r}")
        else:
            value = f", got {issue['input']!r}" if issue["loc"] else ""
            lines.append(f"{location + ': ' if location else ''}{issue['msg'].removeprefix('Value error, ')}{value}")
    return "\n".join(lines)


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
