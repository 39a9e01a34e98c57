"""Stages of a run folder, each cached by the digest of its inputs.

A stage is a folder and a function that fills it. `stage.json` in it holds the inputs and their digest: equal inputs, and
the stage is done; equal inputs but unfinished, and it goes on from what is there; other inputs, and it starts from nothing,
unless it is one that is kept, such as a captioner that took days to train.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finecap_ray import __version__
from finecap_ray.errors import DataError

STAGE_FILE = "stage.json"
LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # of a file system that has none


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
        self,
        root: str | Path,
        on_start: Callable[[str], None],
        on_end: Callable[[StageResult], None],
        kept: Collection[str] = (),
    ) -> None:
        """`kept` names the stages that are never thrown away because their inputs changed."""
        self.root = Path(root)
        self.on_start, self.on_end, self.kept = on_start, on_end, kept
        self.results: list[StageResult] = []

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], None]) -> StageResult:
        """Does `work(folder)` unless it was done with the same `inputs` (anything JSON can hold).

        Raises DataError, naming the inputs that differ, for a kept stage that was begun with others; for a folder of that name
        that no stage made; and where another process works on a stage of this run folder.
        """
        folder = self.root / name
        inputs, digest = _with_digest(name, inputs)
        result = self._done(name, folder, digest)
        if result is None:
            with alone(self.root):
                # Another process may have done it meanwhile.
                result = self._done(name, folder, digest) or self._do(name, folder, digest, inputs, work)
        self.results.append(result)
        self.on_end(result)
        return result

    def _done(self, name: str, folder: Path, digest: str) -> StageResult | None:
        state = self._state(folder)
        if state.get("digest") == digest and state["finished"]:
            return StageResult(name, folder, digest, state["seconds"], cached=True)
        return None

    def _do(
        self, name: str, folder: Path, digest: str, inputs: dict[str, Any], work: Callable[[Path], None]
    ) -> StageResult:
        before, seconds = self._state(folder), 0.0
        if before.get("digest") == digest:
            seconds = before["seconds"]  # until it was interrupted
        elif before:
            if name in self.kept:
                raise _refused(folder, _differences(before, inputs))
            _remove(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise DataError(
                f"{folder} is there and isn't a stage of a run, it has no {STAGE_FILE}: take another run_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        state = {"digest": digest, "inputs": inputs, "version": __version__}
        self._write(folder, state | {"seconds": seconds, "finished": False})
        self.on_start(name)
        started = time.perf_counter() - seconds
        try:
            work(folder)
        except BaseException:
            self._write(folder, state | {"seconds": time.perf_counter() - started, "finished": False})
            raise
        seconds = time.perf_counter() - started
        self._write(folder, state | {"seconds": seconds, "finished": True})
        return StageResult(name, folder, digest, seconds, cached=False)

    def rehearsal(self) -> Rehearsal | None:
        """None where no kept stage was begun, so that none can be refused."""
        begun = any(self._state(self.root / name) for name in self.kept)
        return Rehearsal(self.root, self.kept) if begun else None

    def _state(self, folder: Path) -> dict[str, Any]:
        path = folder / STAGE_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(self, folder: Path, state: dict[str, Any]) -> None:
        temporary = folder / f"{STAGE_FILE}.new"
        temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
        temporary.replace(folder / STAGE_FILE)


class Rehearsal(Stages):
    """The stages of a run folder without their work: what `run` would refuse is refused before anything is changed."""

    def __init__(self, root: str | Path, kept: Collection[str]) -> None:
        super().__init__(root, lambda _: None, lambda _: None, kept)
        # Digest of a stage that would be made anew -> what changed in it or before it.
        self._changed: dict[str, list[str]] = {}

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], None]) -> StageResult:
        """Nothing is done or written. Raises DataError as Stages does, naming what changed in the stages before as well."""
        folder = self.root / name
        inputs, digest = _with_digest(name, inputs)
        state = self._state(folder)
        if state and state["digest"] != digest:
            self._changed[digest] = _differences(state, inputs, self._changed)
            if name in self.kept:
                raise _refused(folder, self._changed[digest])
        return StageResult(name, folder, digest, 0.0, cached=True)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the run folder's lock. Raises DataError, naming who has it, where another process does."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{root} is in use by {file.read() or 'another process'}: wait for its end, or take another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _remove(folder: Path) -> None:
    """Out of its place first: what is left of a removal that was interrupted is no stage."""
    if folder.is_symlink():
        raise DataError(f"{folder} is a link to a stage that was made with other inputs: remove the link to do it anew")
    gone = folder.with_name(f".{folder.name}.gone")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    shutil.rmtree(gone)


def _with_digest(name: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The inputs as JSON gives them back, and their digest."""
    inputs = json.loads(json.dumps(inputs, default=str))
    text = json.dumps([__version__, name, inputs], sort_keys=True)
    return inputs, hashlib.sha256(text.encode()).hexdigest()[:16]


def _refused(folder: Path, differences: Iterable[str]) -> DataError:
    return DataError(
        f"{folder} was made with other inputs ({'; '.join(differences)}): "
        "go back to those, take another run_dir, or remove the folder to do it anew"
    )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], of_digest: Mapping[str, list[str]] = {}
) -> list[str]:
    """`rl.learning_rate was 0.1, is 0.2` for each leaf that differs between what a stage was made with and now; of another version,
    which may have other inputs, only that.

    of_digest: what is said, instead, of a leaf that is such a digest now.
    """
    if before.get("version") != __version__:
        return ["another version of finecap-ray"]
    old, new = dict(leaves(before["inputs"])), dict(leaves(now))
    changed = [(key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)]
    said = [one for key, was, own in changed for one in of_digest.get(str(own), [f"{key} was {was}, is {own}"])]
    return list(dict.fromkeys(said))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that isn't a mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
