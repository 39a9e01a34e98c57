"""Checkpoints of transformers' Trainer in a folder."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: Path) -> str | None:
    """The one of most steps that was written to its end (the trainer's state is written last); None where there is none."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=steps_of)) if found else None


def steps_of(checkpoint: str | Path | None) -> int:
    """Optimizer steps that a checkpoint was made after; 0 without one."""
    return 0 if checkpoint is None else int(Path(checkpoint).name.rsplit("-", 1)[1])
