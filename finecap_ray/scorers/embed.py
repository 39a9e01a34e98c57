"""Run the frozen image tower over examples: a Ray Data pipeline with a pool of actors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from finecap_ray.config import DataSettings, ResourceSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.records import FEATURE_SCHEMA
from finecap_ray.scorers.tower import decode_image, load_tower

FEATURES_FILE = "features.parquet"
MANIFEST_FILE = "manifest.json"


class TowerActor:
    """Ray Data batch: encoded images -> float16 features, or the reason why there are none."""

    def __init__(self, settings: TowerSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self.tower = load_tower(settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        reasons = [_reason(image) for image in batch["image"]]
        good = [image for image, reason in zip(batch["image"], reasons, strict=True) if reason is None]
        embedded = iter(self.tower.embed(good).numpy().astype(np.float16)) if good else iter(())
        features = [None if reason else next(embedded) for reason in reasons]
        return pa.table(
            {
                "image_id": pa.array(batch["image_id"], pa.string()),
                "features": pa.array(features, pa.list_(pa.float16())),
                "reason": pa.array(reasons, pa.string()),
                "digest": pa.array([self.tower.digest] * len(reasons), pa.string()),
            }
        )


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features of the frozen tower by image id, and which tower made them."""

    rows: dict[str, np.ndarray]  # image id -> [F] float16
    tower_digest: str

    @property
    def width(self) -> int:
        return len(next(iter(self.rows.values())))


def embed_examples(
    examples: pa.Table, out: Path, tower: TowerSettings, data: DataSettings, resources: ResourceSettings
) -> None:
    """Writes features.parquet and manifest.json into `out`.

    Images that can't be decoded are left out and counted. Raises DataError past `max_bad_fraction`, listing the first ten.
    """
    table = (
        ray.data.from_arrow(examples.select(["image_id", "image"]))
        .map_batches(
            TowerActor,
            fn_constructor_args=(tower, resources.threads),
            batch_size=tower.batch_size,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.scorers),
            num_cpus=1,
            num_gpus=1 if resources.use_gpu else 0,
        )
        .to_arrow_refs()
    )
    rows = pa.concat_tables(ray.get(table))
    bad = rows.filter(pa.compute.is_valid(rows["reason"]))
    if bad.num_rows > data.max_bad_fraction * rows.num_rows:
        first = "\n".join(f"  {row['image_id']}: {row['reason']}" for row in bad.slice(0, 10).to_pylist())
        raise DataError(
            f"{bad.num_rows} of {rows.num_rows} images can't be decoded, more than data.max_bad_fraction={data.max_bad_fraction}:\n{first}"
        )
    good = rows.filter(pa.compute.is_null(rows["reason"]))
    if good.num_rows == 0:
        raise DataError("there is no image to embed")
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(good.select(FEATURE_SCHEMA.names).cast(FEATURE_SCHEMA), out / FEATURES_FILE)
    manifest = {
        "tower": {
            "model": tower.model,
            "weights": tower.weights,
            "image_size": tower.image_size,
            "digest": good["digest"][0].as_py(),
        },
        "images": good.num_rows,
        "left_out": {"undecodable": bad.num_rows},
    }
    (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_features(folder: Path) -> FeatureSet:
    """What `embed_examples` wrote."""
    if not (folder / FEATURES_FILE).is_file():
        raise DataError(f"no features at {folder}: compute them first (`finecap scorer train` does)")
    table = pq.read_table(folder / FEATURES_FILE)
    values = table["features"].combine_chunks()
    matrix = values.flatten().to_numpy().reshape(len(values), -1)
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return FeatureSet(dict(zip(table["image_id"].to_pylist(), matrix, strict=True)), manifest["tower"]["digest"])


def _reason(image: bytes) -> str | None:
    try:
        decode_image(image)
    except DataError as error:
        return str(error)
    return None
