"""Stages of a run folder, each cached by the digest of its inputs.

A stage is a folder and a function that fills it. `stage.json` in it holds the digest of the inputs: equal inputs, and
the stage is done; other inputs, and it starts from nothing; equal inputs but unfinished, and it goes on from what is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finecap_ray import __version__

STAGE_FILE = "stage.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    name: str
    folder: Path
    digest: str
    seconds: float  # of the run that finished it, also when it is cached now
    cached: bool


class Stages:
    """The stages of one run folder."""

    def __init__(
        self, root: str | Path, on_start: Callable[[str], None], on_end: Callable[[StageResult], None]
    ) -> None:
        self.root = Path(root)
        self.on_start, self.on_end = on_start, on_end
        self.results: list[StageResult] = []

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], None]) -> StageResult:
        """Does `work(folder)` unless it was done with the same `inputs` (anything JSON can hold)."""
        folder = self.root / name
        digest = hashlib.sha256(
            json.dumps([__version__, name, inputs], sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
        state = self._state(folder)
        if state.get("digest") == digest and state["finished"]:
            result = StageResult(name, folder, digest, state["seconds"], cached=True)
        else:
            if folder.exists() and state.get("digest") != digest:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            before = state["seconds"] if state.get("digest") == digest else 0.0
            self._write(folder, digest, before, finished=False)
            self.on_start(name)
            started = time.perf_counter()
            try:
                work(folder)
            except BaseException:
                self._write(folder, digest, before + time.perf_counter() - started, finished=False)
                raise
            seconds = before + time.perf_counter() - started
            self._write(folder, digest, seconds, finished=True)
            result = StageResult(name, folder, digest, seconds, cached=False)
        self.results.append(result)
        self.on_end(result)
        return result

    def _state(self, folder: Path) -> dict[str, Any]:
        path = folder / STAGE_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(self, folder: Path, digest: str, seconds: float, finished: bool) -> None:
        temporary = folder / f"{STAGE_FILE}.new"
        temporary.write_text(json.dumps({"digest": digest, "seconds": seconds, "finished": finished}), encoding="utf-8")
        temporary.replace(folder / STAGE_FILE)
