"""Rows of numbers as JSON lines: read by the terminal and the report while training appends to them."""

from __future__ import annotations

import json
from pathlib import Path

from finecap_ray.errors import DataError


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file, in order. An unfinished last line is left out. Raises DataError for a damaged one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise DataError(f"{path} holds a line that is no JSON: {error}") from None
