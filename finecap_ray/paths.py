"""Paths as processes elsewhere take them."""

from __future__ import annotations

from pathlib import Path


def absolute(path: str | Path) -> str:
    """A local path made absolute, `~` too, for processes that run elsewhere; a URI as it is."""
    return str(path) if "://" in str(path) else str(Path(path).expanduser().resolve())
