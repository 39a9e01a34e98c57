"""Memory of building a bag set, against the size of the pictures that go into it.

    python benchmarks/bag_build.py --run-dir runs/demo --images 200000

The pictures are random bytes of the size that a photo of 224 pixels has, with random features in place of a tower's: a tower
would take hours over them. The scorer of a finished demo projects the features. Memory is what the process itself holds, read
every 0.2 s (RssAnon: not the pages of files, which the system takes back when it needs them).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.bags.build import build_bags
from finecap_ray.bags.embeddings import EmbeddingSet, embed_by_scorer
from finecap_ray.bags.source import bag_source
from finecap_ray.cluster import connect
from finecap_ray.config import BagSettings, ResourceSettings
from finecap_ray.paths import absolute
from finecap_ray.records import EXAMPLE_SCHEMA, FEATURE_SCHEMA
from finecap_ray.scorers.embed import FEATURES_FOLDER, MANIFEST_FILE, FeatureSet
from finecap_ray.sources import ExampleSet

RESULTS = Path(__file__).parent / "results"
ROWS_PER_PAGE = 1024
PICTURE_BYTES = 15_000


class Peak(threading.Thread):
    """Of the memory that this process holds, GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gib, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.gib = max(self.gib, int(found[1]) / 2**20)


def synthetic(folder: Path, images: int, digest: str, width: int) -> tuple[ExampleSet, FeatureSet]:
    rng = np.random.default_rng(0)
    pages = -(-images // ROWS_PER_PAGE)
    (folder / FEATURES_FOLDER).mkdir()
    (folder / "examples").mkdir()
    centres = rng.standard_normal((images // 10 + 1, width), dtype=np.float32)
    for page in range(pages):
        rows = range(page * ROWS_PER_PAGE, min((page + 1) * ROWS_PER_PAGE, images))
        ids = pa.array([f"image-{row:09d}" for row in rows])
        pictures = pa.array([rng.bytes(PICTURE_BYTES) for _ in rows], pa.binary())
        captions = pa.array([["a brown dog runs over the grass with a ball in its mouth"]] * len(rows))
        examples = [ids, pictures, captions, pa.array(["train"] * len(rows))]
        part = f"part-{page:05d}.parquet"
        pq.write_table(pa.table(examples, schema=EXAMPLE_SCHEMA), folder / "examples" / part, compression="none")
        features = centres[rng.permutation(images)[: len(rows)] // 10]
        features = (features + rng.standard_normal(features.shape, dtype=np.float32)).astype(np.float16)
        lists = pa.array(list(features), pa.list_(pa.float16()))
        pq.write_table(pa.table([ids, lists], schema=FEATURE_SCHEMA), folder / FEATURES_FOLDER / part)
    manifest = {"tower": {"digest": digest}, "files": pages, "rows_per_file": ROWS_PER_PAGE}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    return ExampleSet(str(folder / "examples")), FeatureSet(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a finished demo, of which the scorer is used")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=5)
    arguments = parser.parse_args()
    run = Path(absolute(arguments.run_dir))
    real, resources = FeatureSet(run / "features"), ResourceSettings(num_cpus=2, object_store_mb=1024)
    connect(resources)
    with tempfile.TemporaryDirectory() as temporary:
        folder, width = Path(temporary), real.page(0)[1].shape[1]
        examples, features = synthetic(folder, arguments.images, real.tower_digest, width)
        out, settings = folder / "bags", BagSettings(sizes=(arguments.size,))
        out.mkdir()
        peak, started = Peak(), time.perf_counter()
        peak.start()
        embed_by_scorer(examples, features, str(run / "scorer"), None, resources, folder)
        embedded = time.perf_counter()
        with bag_source(examples, features, EmbeddingSet(folder), "train", out) as source:
            prepared = time.perf_counter()
            manifest = build_bags(source, out, (arguments.size,), settings, seed=0)
        built = time.perf_counter()
        peak.ended.set()
        written = sum(path.stat().st_size for path in out.rglob("*.parquet"))
        bytes_of = {"pictures": arguments.images * PICTURE_BYTES, "features": arguments.images * width * 2}
    result = {
        "images": arguments.images,
        "bag_size": arguments.size,
        "bags": manifest["sizes"][str(arguments.size)]["bags"],
        "gb": {name: round(size / 1e9, 2) for name, size in (bytes_of | {"bag set": written}).items()},
        "peak_gib": round(peak.gib, 2),
        "seconds": {
            "embed": round(embedded - started, 1),
            "lay out": round(prepared - embedded, 1),
            "mine and write": round(built - prepared, 1),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bag_build.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
