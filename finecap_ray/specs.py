"""What names a scorer, a captioner or a tower's weights: a name that its library knows, or a local file or folder."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from finecap_ray.paths import absolute

_READ = {".safetensors", ".bin", ".pt", ".json", ".model", ".txt", ".jinja"}


def absolute_spec(spec: str) -> str:
    """A local path made absolute, for processes that run elsewhere; a name as it is."""
    return absolute(spec) if Path(spec).expanduser().exists() else spec


def spec_inputs(spec: str) -> str | dict[str, str]:
    """What a stage that reads it depends on: the name, or the path and a digest of the content."""
    path = Path(absolute_spec(spec))
    return {"path": str(path), "content": _content(path)} if path.exists() else spec


@cache
def _content(path: Path) -> str:
    """Of a file, or of the weights, configuration and vocabulary in a folder."""
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.suffix in _READ)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
