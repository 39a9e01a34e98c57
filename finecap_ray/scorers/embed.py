"""Run the frozen image tower over examples: a Ray Data pipeline with a pool of actors that grows with the work.

<out>/features/part-00000.parquet ...   <out>/manifest.json

One file for every `rows_per_file` examples, written whole or not at all, and the manifest last; so a job that was killed
and is started again computes only the files that aren't there. A file says which tower made it and of which examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from finecap_ray.config import DataSettings, ResourceSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.records import FEATURE_SCHEMA, vectors
from finecap_ray.scorers.tower import decode_image, load_tower

FEATURES_FOLDER = "features"
MANIFEST_FILE = "manifest.json"
_LISTED = 10  # images that a message names
_MADE_OF, _DIGEST, _BAD = b"made_of", b"tower_digest", b"left_out"


class TowerActor:
    """Ray Data batch: the examples of one file -> its float16 features, on disk."""

    def __init__(self, settings: TowerSettings, threads: int, folder: str) -> None:
        torch.set_num_threads(threads)
        self.tower = load_tower(settings)
        self.batch_size, self.folder = settings.batch_size, Path(folder)

    def __call__(self, examples: pa.Table) -> pa.Table:
        file, made_of = examples["file"][0].as_py(), examples["made_of"][0].as_py()
        ids, features, bad = [], [], {}
        for batch in examples.to_batches(self.batch_size):
            good = []
            for image_id, image in zip(batch["image_id"].to_pylist(), batch["image"].to_pylist(), strict=True):
                reason = _reason(image)
                if reason is None:
                    ids.append(image_id)
                    good.append(image)
                else:
                    bad[image_id] = reason
            if good:
                features += list(self.tower.embed(good).numpy().astype(np.float16))
        table = pa.table(
            [pa.array(ids, pa.string()), pa.array(features, pa.list_(pa.float16()))], schema=FEATURE_SCHEMA
        )
        facts = {_MADE_OF: made_of, _DIGEST: self.tower.digest, _BAD: json.dumps(bad)}
        unfinished = self.folder / f".{file}.new"
        pq.write_table(table.replace_schema_metadata(facts), unfinished, compression="none", use_dictionary=False)
        unfinished.replace(self.folder / file)
        return pa.table({"file": [file]})


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
) -> int:
    """Writes features and a manifest into `out`, and returns how many files were computed (the others were there).

    Images that can't be decoded are left out and counted. Raises DataError past `max_bad_fraction`, listing the first ten.
    """
    folder = out / FEATURES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = list(_files(examples.select(["image_id", "image"]), tower))
    todo = [(file, made_of, part) for file, made_of, part in files if _made_of(folder / file) != made_of]
    if todo:
        # One block each, and so one call of an actor.
        blocks = [
            part.append_column("file", pa.repeat(file, len(part))).append_column(
                "made_of", pa.repeat(made_of, len(part))
            )
            for file, made_of, part in todo
        ]
        ray.data.from_arrow(blocks).map_batches(
            TowerActor,
            fn_constructor_args=(tower, resources.threads, str(folder)),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.scorers),
            num_cpus=1,
            num_gpus=1 if resources.use_gpu else 0,
        ).materialize()
    for stranger in {path.name for path in folder.iterdir()} - {file for file, _, _ in files}:
        (folder / stranger).unlink()  # of a job that was killed while it wrote, or of more examples
    _write_manifest(folder, [file for file, _, _ in files], out, tower, data)
    return len(todo)


def read_features(folder: Path) -> FeatureSet:
    """What `embed_examples` wrote."""
    if not (folder / MANIFEST_FILE).is_file():
        raise DataError(f"no features at {folder}: compute them first (`finecap scorer train` does)")
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    table = pa.concat_tables(pq.read_table(path) for path in sorted((folder / FEATURES_FOLDER).glob("part-*.parquet")))
    matrix = vectors(table["features"].combine_chunks())
    return FeatureSet(dict(zip(table["image_id"].to_pylist(), matrix, strict=True)), manifest["tower"]["digest"])


def _files(examples: pa.Table, tower: TowerSettings) -> Iterator[tuple[str, str, pa.Table]]:
    """Name, fingerprint of tower settings and examples, and the examples, of each file."""
    for number, start in enumerate(range(0, examples.num_rows, tower.rows_per_file)):
        part = examples.slice(start, tower.rows_per_file)
        digest = hashlib.sha256(tower.model_dump_json(exclude={"batch_size", "rows_per_file"}).encode())
        for image_id, image in zip(part["image_id"].to_pylist(), part["image"].to_pylist(), strict=True):
            digest.update(f"{image_id!r}{len(image)}".encode())
            digest.update(image)
        yield f"part-{number:05d}.parquet", digest.hexdigest()[:16], part


def _made_of(path: Path) -> str | None:
    return _facts(path)[_MADE_OF].decode() if path.is_file() else None


def _facts(path: Path) -> dict[bytes, bytes]:
    return pq.read_schema(path).metadata


def _write_manifest(folder: Path, files: list[str], out: Path, tower: TowerSettings, data: DataSettings) -> None:
    images, bad, digests = 0, {}, set()
    for file in files:
        facts = _facts(folder / file)
        bad |= json.loads(facts[_BAD])
        digests.add(facts[_DIGEST].decode())
        images += pq.read_metadata(folder / file).num_rows
    if len(bad) > data.max_bad_fraction * (images + len(bad)):
        first = "\n".join(f"  {image_id}: {reason}" for image_id, reason in list(bad.items())[:_LISTED])
        raise DataError(
            f"{len(bad)} of {images + len(bad)} images can't be decoded, more than data.max_bad_fraction={data.max_bad_fraction}:\n{first}"
        )
    if not images:
        raise DataError("there is no image to embed")
    if len(digests) != 1:
        raise DataError(
            f"the features in {folder} were made by towers {', '.join(sorted(digests))}: remove the folder and embed again"
        )
    manifest: dict[str, Any] = {
        "tower": {
            "model": tower.model,
            "weights": tower.weights,
            "image_size": tower.image_size,
            "digest": digests.pop(),
        },
        "images": images,
        "files": len(files),
        "left_out": {"undecodable": len(bad)},
    }
    (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _reason(image: bytes) -> str | None:
    try:
        decode_image(image)
    except DataError as error:
        return str(error)
    return None
