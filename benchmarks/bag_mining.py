"""Time, memory and recall of mining bags of 10 from synthetic look-alikes, and how time grows with their number.

    python benchmarks/bag_mining.py                         # 10,000 to 1,000,000 images, each in a process of its own
    python benchmarks/bag_mining.py --sizes 1000000         # one size again; the results of the others stay

A tenth as many random unit centres as images, 10 points at cosine 0.8 to each, in random order; 512 numbers, float32.
Time is that of `mine_bags`, with nothing known beforehand. Recall: of the 9 nearest images of 2,000 queries, told by exact
search, the share found. CPU seconds are given beside those on the clock: on a machine that others use they differ by more
than the number of cores. Writes benchmarks/results/bag_mining.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from finecap_ray.bags.mining import bags_of_neighbours
from finecap_ray.bags.neighbours import Neighbours, find_neighbours
from finecap_ray.config import BagSettings

RESULTS = Path(__file__).parent / "results"
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
WIDTH, PER_CENTRE, COSINE, BAG_SIZE, QUERIES = 512, 10, 0.8, 10, 2000
BLOCK = 10_000


def synthetic(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, 512], unit-norm, and the centre of each [N]."""
    rng = np.random.default_rng(seed)
    centres = _unit(rng.standard_normal((images // PER_CENTRE, WIDTH), dtype=np.float32))
    centre = rng.permutation(np.arange(images) // PER_CENTRE)
    embeddings = np.empty((images, WIDTH), dtype=np.float32)
    noise = np.empty((BLOCK, WIDTH), dtype=np.float32)
    for start in range(0, images, BLOCK):
        rng.standard_normal(out=noise, dtype=np.float32)
        own = centres[centre[start : start + BLOCK]]
        aside = noise - np.einsum("nd,nd->n", noise, own)[:, None] * own
        embeddings[start : start + BLOCK] = COSINE * own + np.float32((1 - COSINE**2) ** 0.5) * _unit(aside)
    return embeddings, centre


def _unit(rows: np.ndarray) -> np.ndarray:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def measure(images: int) -> dict:
    embeddings, centre = synthetic(images)
    before_gib = _peak_gib()
    clock, processor = time.perf_counter(), time.process_time()
    # The two halves of `mine_bags`.
    found = find_neighbours(
        embeddings, BagSettings().neighbours, depth=BAG_SIZE - 1, target_recall=BagSettings().target_recall
    )
    search_seconds = time.perf_counter() - clock
    bags = bags_of_neighbours(
        found, BAG_SIZE, 0, max_bags_per_image=1, near_duplicate=None, pictures=embeddings, labels=None
    )
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    peak_gib = _peak_gib()
    return {
        "images": images,
        "seconds": round(clock, 1),
        "cpu_seconds": round(processor, 1),
        "search_seconds": round(search_seconds, 1),
        "peak_gib": round(peak_gib, 2),
        "peak_gib_before_mining": round(before_gib, 2),
        "recall": round(_recall(embeddings, found), 4),
        "search": {name: getattr(found.search, name) for name in ("kind", "recall", "queries", "cells", "probed")},
        "bags": len(bags),
        "bags_of_one_centre": sum(len(set(centre[list(bag)].tolist())) == 1 for bag in bags),
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }


def _recall(embeddings: np.ndarray, found: Neighbours) -> float:
    import faiss

    queries = np.sort(np.random.default_rng(7).choice(len(embeddings), QUERIES, replace=False))
    truth = faiss.knn(embeddings[queries], embeddings, BAG_SIZE, metric=faiss.METRIC_INNER_PRODUCT)[1]
    wanted = [set(rows.tolist()) - {query} for query, rows in zip(queries.tolist(), truth, strict=True)]
    near = found.rows[queries, : BAG_SIZE - 1]
    shares = [len(own & set(rows.tolist())) / len(own) for own, rows in zip(wanted, near, strict=True)]
    return float(np.mean(shares))


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def exponent(rows: list[dict], key: str) -> float | None:
    """Slope of log time over log images, from the smallest size to the largest."""
    first, last = rows[0], rows[-1]
    if first is last:
        return None
    return round(float(np.log(last[key] / first[key]) / np.log(last["images"] / first["images"])), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    if arguments.images:
        print(json.dumps(measure(arguments.images)))
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "bag_mining.json"
    rows = (
        {row["images"]: row for row in json.loads(path.read_text(encoding="utf-8"))["sizes"]} if path.is_file() else {}
    )
    for images in arguments.sizes:
        command = [sys.executable, __file__, "--images", str(images)]
        rows[images] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(rows[images], flush=True)
        write(path, [rows[size] for size in sorted(rows)])


def write(path: Path, rows: list[dict]) -> None:
    result = {
        "cores": os.cpu_count(),
        "exponent": exponent(rows, "seconds"),
        "exponent_of_cpu_seconds": exponent(rows, "cpu_seconds"),
        "sizes": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def markdown(result: dict) -> str:
    lines = [
        f"Bags of {BAG_SIZE} from N x {WIDTH} embeddings on {result['cores']} cores (`python benchmarks/bag_mining.py`).",
        "",
        "| images | seconds | CPU seconds | of it search, s | peak GiB | recall of 9 nearest | cells probed | bags | of one centre | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['images']:,} | {row['seconds']} | {row['cpu_seconds']} | {row['search_seconds']} | {row['peak_gib']} | {row['recall']} "
        f"| {row['search']['probed']} of {row['search']['cells']} | {row['bags']:,} | {row['bags_of_one_centre']:,} "
        f"| {row['load_after'][0]} |"
        for row in result["sizes"]
    ]
    first, last = result["sizes"][0]["images"], result["sizes"][-1]["images"]
    lines += [
        "",
        f"From {first:,} to {last:,} images time grows as N^{result['exponent']} "
        f"(CPU seconds as N^{result['exponent_of_cpu_seconds']}). Load: processes that wanted a core at the end of each, of all "
        "users of the machine; on busy cores the clock says little, and CPU seconds more.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
