"""Build a bag set: mined bags of several sizes as parquet, self-contained, with a manifest that says what made them.

<folder>/size=5/part-0.parquet ...   <folder>/manifest.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.bags.mining import bag_similarity, mine_bags, random_bags
from finecap_ray.config import BagSettings
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.records import BAG_SCHEMA

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class BagSource:
    """Images of one split, row by row: what a bag set is mined from."""

    image_ids: list[str]
    images: list[bytes]
    captions: list[list[str]]
    embeddings: np.ndarray  # [N, D] float32, unit-norm, of the reward scorer
    features: np.ndarray | None  # [N, F] float16, of the captioner's frozen tower
    name: str
    left_out: dict[str, int]
    scorer: dict[str, str]  # name and digest
    tower: dict[str, str]  # digest; empty where the captioner has no frozen tower


def build_bags(
    source: BagSource, folder: Path, sizes: tuple[int, ...], settings: BagSettings, seed: int
) -> dict[str, Any]:
    """Mines and writes one bag set and returns its manifest. Raises DataError when a size can't be filled."""
    per_size = {}
    for size in sizes:
        bags = mine_bags(
            source.embeddings,
            size,
            seed,
            max_bags_per_image=settings.max_bags_per_image,
            neighbours=settings.neighbours,
        )
        if not bags:
            raise DataError(
                f"{len(source.image_ids)} images of {source.name} give no bag of {size}: raise bags.neighbours or use a smaller size"
            )
        similarity = [bag_similarity(source.embeddings, bag) for bag in bags]
        control = [bag_similarity(source.embeddings, bag) for bag in random_bags(len(source.image_ids), size, seed)]
        _write(source, bags, similarity, folder / f"size={size}", settings.rows_per_group)
        per_size[str(size)] = {
            "bags": len(bags),
            "images": len({row for bag in bags for row in bag}),
            "leftover": len(source.image_ids) - len({row for bag in bags for row in bag}),
            "mean_similarity": float(np.mean(similarity)),
            "mean_similarity_of_random_bags": float(np.mean(control)),
        }
    manifest = {
        "source": source.name,
        "images": len(source.image_ids),
        "left_out": source.left_out,
        "scorer": source.scorer,
        "tower": source.tower,
        "max_bags_per_image": settings.max_bags_per_image,
        "seed": seed,
        "sizes": per_size,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise DataError(f"{folder} isn't a bag set: {MANIFEST_FILE} is missing (make one with `finecap bags build`)")
    return json.loads(path.read_text(encoding="utf-8"))


def check_scorer(manifest: dict[str, Any], scorer_digest: str) -> None:
    """Raises MismatchError unless the embeddings in the bags are those of this scorer."""
    made_by = manifest["scorer"]
    if made_by["digest"] != scorer_digest:
        raise MismatchError(
            f"the bags hold embeddings of scorer {made_by['name']} ({made_by['digest']}), the reward's scorer is {scorer_digest}: "
            "build the bags with the scorer that pays the reward"
        )


def bag_count(manifest: dict[str, Any], size: int) -> int:
    if str(size) not in manifest["sizes"]:
        raise MismatchError(
            f"the bag set has bags of {', '.join(manifest['sizes'])}, not of {size}: build that size too"
        )
    return manifest["sizes"][str(size)]["bags"]


def _write(
    source: BagSource, bags: list[tuple[int, ...]], similarity: list[float], folder: Path, rows_per_group: int
) -> None:
    rows = [
        {
            "bag_id": f"{source.name}-{len(bag)}-{index:06d}",
            "similarity": value,
            "images": [
                {
                    "image_id": source.image_ids[row],
                    "image": source.images[row],
                    "captions": source.captions[row],
                    "embedding": source.embeddings[row].astype(np.float16),
                    "features": None if source.features is None else source.features[row],
                }
                for row in bag
            ],
        }
        for index, (bag, value) in enumerate(zip(bags, similarity, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=BAG_SCHEMA), folder / "part-0.parquet", row_group_size=rows_per_group
    )
