"""Bags per second through the stream, against reading the same parquet with pyarrow alone.

    python benchmarks/bag_stream.py

A bag set of random vectors in the demo's shapes (256 numbers of the scorer, 1,280 of the tower per image), written by
`build_bags`. Three readings of one epoch of every size, in turns, and the best of each counts: `BagStream` (Ray Data,
permuted windows, Bag records), pyarrow reading the same columns row group by row group and dropping them, and pyarrow
reading and making Bag records. Each runs in a fresh order of the same files, which lie in the page cache for all of them.
Writes benchmarks/results/bag_stream.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from finecap_ray.bags.bag_set import part_path, shelves
from finecap_ray.bags.build import build_bags
from finecap_ray.bags.source import BagSource
from finecap_ray.bags.stream import COLUMNS, plan_run, stream_bags
from finecap_ray.cluster import connect
from finecap_ray.config import BagSettings, ResourceSettings, RlSettings, Stage
from finecap_ray.records import bags_from_arrow

RESULTS = Path(__file__).parent / "results"
SIZES = (2, 5, 10)


def bag_set(folder: Path, images: int) -> dict:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((images, 256), dtype=np.float32)
    source = BagSource(
        image_ids=[f"image-{number:07d}" for number in range(images)],
        images=[b"\xff" * 200] * images,  # read by neither
        captions=[["a dog runs over the grass with a ball in its mouth", "a brown dog outside"]] * images,
        embeddings=embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
        features=rng.standard_normal((images, 1280), dtype=np.float32).astype(np.float16),
        name="synthetic",
        left_out={},
        scorer={"name": "none", "digest": ""},
        tower={"digest": ""},
    )
    return build_bags(source, folder, SIZES, BagSettings(kind="random"), seed=0)


def stream(folder: Path, manifest: dict, size: int, epoch: int) -> int:
    settings = RlSettings(images_per_step=100, curriculum=(Stage(bag_size=size, epochs=1),))
    steps = stream_bags(folder, plan_run(manifest, settings, seed=epoch), rank=0, timeout_s=60)
    return sum(len(bags) for bags in steps)


def pyarrow_alone(folder: Path, manifest: dict, size: int, records: bool) -> int:
    shelf, count = shelves(manifest)[size], 0
    for part in range(-(-shelf.bags // shelf.rows_per_part)):
        with pq.ParquetFile(part_path(folder, size, part)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=COLUMNS)
                count += len(bags_from_arrow(table)) if records else len(table)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=180_000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    connect(ResourceSettings(num_cpus=2, object_store_mb=1024))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = bag_set(folder, arguments.images)
        stream(folder, manifest, SIZES[0], 99)  # Ray's workers start
        for size in SIZES:
            ways: dict[str, Callable[[int], int]] = {
                "stream": lambda turn, size=size: stream(folder, manifest, size, turn),
                "pyarrow": lambda _, size=size: pyarrow_alone(folder, manifest, size, records=False),
                "pyarrow_records": lambda _, size=size: pyarrow_alone(folder, manifest, size, records=True),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(arguments.turns):
                for name, way in ways.items():
                    started = time.perf_counter()
                    bags = way(turn)
                    rates[name].append(bags / (time.perf_counter() - started))
            rows.append({"bag_size": size, "bags": bags} | {name: round(max(own)) for name, own in rates.items()})
            rows[-1] |= {
                "ratio": round(rows[-1]["stream"] / rows[-1]["pyarrow"], 2),
                "load": round(os.getloadavg()[0], 1),
            }
            print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    result = {"cores": os.cpu_count(), "images": arguments.images, "turns": arguments.turns, "sizes": rows}
    (RESULTS / "bag_stream.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "bag_stream.md").write_text(markdown(result), encoding="utf-8")


def markdown(result: dict) -> str:
    lines = [
        f"Bags per second on {result['cores']} cores, best of {result['turns']} (`python benchmarks/bag_stream.py`).",
        "",
        "| bag size | bags | stream | pyarrow alone | stream / pyarrow | pyarrow + records | load |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bag_size']} | {row['bags']:,} | {row['stream']:,} | {row['pyarrow']:,} | {row['ratio']} | {row['pyarrow_records']:,} "
        f"| {row['load']} |"
        for row in result["sizes"]
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
