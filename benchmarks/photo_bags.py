"""Bags of 2 to 20 look-alikes on the photos of ../shared/data, each split by itself: how alike they are, against random ones.

    python benchmarks/photo_bags.py
    finecap bags show runs/photo_bags/bags/test --out page.html       # to look at them

Compared are the unit-norm pooled features of EfficientNet-lite0 at 224 pixels, which are kept in runs/photo_bags. Writes
benchmarks/results/photo_bags.json and .md: figures only, no photo.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from human_ceiling import DATA, RESULTS, TOWER, photo_features

from finecap_ray.bags.build import build_bags
from finecap_ray.bags.describe import describe_bags
from finecap_ray.bags.source import BagSource
from finecap_ray.config import BagSettings
from finecap_ray.scorers.tower import load_tower

RUN = Path("runs/photo_bags")
SIZES = (2, 3, 5, 7, 10, 15, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--near-duplicate", type=float)
    arguments = parser.parse_args()
    rows, tower = pq.read_table(DATA / "flickr8k.parquet").to_pylist(), load_tower(TOWER)
    vectors = photo_features(rows, tower, RUN).numpy()
    settings = BagSettings(near_duplicate=arguments.near_duplicate)
    splits = {}
    for split in sorted({row["split"] for row in rows}):
        own = [number for number, row in enumerate(rows) if row["split"] == split]
        embeddings = vectors[own]
        source = BagSource(
            image_ids=[rows[number]["image_id"] for number in own],
            images=[rows[number]["image"] for number in own],
            captions=[rows[number]["captions"] for number in own],
            embeddings=embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
            features=embeddings.astype(np.float16),
            name=split,
            left_out={},
            scorer={"name": TOWER.model, "digest": tower.digest},
            tower={"digest": tower.digest},
        )
        started = time.perf_counter()
        splits[split] = build_bags(source, RUN / "bags" / split, SIZES, settings, seed=0)
        splits[split]["seconds"] = round(time.perf_counter() - started, 1)
        print(describe_bags(splits[split]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "photo_bags.json").write_text(json.dumps(splits, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "photo_bags.md").write_text(markdown(splits), encoding="utf-8")


def markdown(splits: dict) -> str:
    lines = [
        "Mean cosine of the pairs of a bag, by unit-norm EfficientNet-lite0 features (`python benchmarks/photo_bags.py`).",
        "",
        "| split | images | bag size | bags | left over | mined | random |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {split} | {manifest['images']} | {size} | {facts['bags']} | {facts['leftover']} | {facts['mean_similarity']:.3f} "
        f"| {facts['mean_similarity_of_random_bags']:.3f} |"
        for split, manifest in splits.items()
        for size, facts in manifest["sizes"].items()
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
