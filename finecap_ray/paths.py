"""Paths as processes elsewhere take them, and those of files that will be written."""

from __future__ import annotations

from pathlib import Path

from finecap_ray.errors import ConfigError


def absolute(path: str | Path) -> str:
    """A local path made absolute, `~` too, for processes that run elsewhere; a URI as it is."""
    return str(path) if "://" in str(path) else str(Path(path).expanduser().resolve())


def make_room(out: str | None) -> None:
    """The folder of a file that will be written, before the work whose results would be lost without it. Raises ConfigError."""
    if out is None:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        new = not Path(out).exists()
        Path(out).open("ab").close()
        if new:
            Path(out).unlink()
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}") from None
