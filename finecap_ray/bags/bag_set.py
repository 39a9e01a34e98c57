"""A bag set on disk: what lies where, and what made it. Light: the readers of Ray Data, which import it, load no model code.

<folder>/size=5/part-00000.parquet ...   <folder>/manifest.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finecap_ray.errors import DataError, MismatchError

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shelf:
    """How the bags of one size lie on disk: files and row groups of equal length, but for the last."""

    bags: int
    rows_per_group: int
    rows_per_part: int


def read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise DataError(f"{folder} isn't a bag set: {MANIFEST_FILE} is missing (make one with `finecap bags build`)")
    return json.loads(path.read_text(encoding="utf-8"))


def check_bags_scorer(manifest: dict[str, Any], scorer_digest: str) -> None:
    """Raises MismatchError unless the embeddings in the bags are those of this scorer."""
    made_by = manifest["scorer"]
    if made_by["digest"] != scorer_digest:
        raise MismatchError(
            f"the bags hold embeddings of scorer {made_by['name']} ({made_by['digest']}), the reward's scorer is {scorer_digest}: "
            "build the bags with the scorer that pays the reward"
        )


def shelves(manifest: dict[str, Any]) -> dict[int, Shelf]:
    """Of each bag size of a set."""
    return {
        int(size): Shelf(facts["bags"], facts["rows_per_group"], facts["rows_per_part"])
        for size, facts in manifest["sizes"].items()
    }


def part_path(folder: str | Path, size: int, part: int) -> Path:
    return Path(folder) / f"size={size}" / f"part-{part:05d}.parquet"
