"""Run the frozen image tower over examples: a Ray Data pipeline with a pool of actors that grows with the work.

<out>/features/part-00000.parquet ...   <out>/manifest.json

One file for every page of `rows_per_file` examples, written whole or not at all, and the manifest last; so a job that was
killed and is started again computes only the files that aren't there. A file says which tower made it and of which examples.
The actors read the pictures where they lie: no process holds more than a page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from jaxtyping import Float16

from finecap_ray.config import DataSettings, ResourceSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.images import decode_image
from finecap_ray.records import FEATURE_SCHEMA, vectors
from finecap_ray.scorers.tower import load_tower
from finecap_ray.sources.examples import ExampleSet, update_digest

FEATURES_FOLDER = "features"
MANIFEST_FILE = "manifest.json"
_LISTED = 10  # images that a message names
_MADE_OF, _DIGEST, _BAD = b"made_of", b"tower_digest", b"left_out"
_BLOCKS = 1000  # that Ray Data shares pages out in, at most


class PageActor:
    """Ray Data batch: numbers of pages -> whether `compute(page)` had to compute them; what it makes goes to disk."""

    def __call__(self, pages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"computed": np.array([self.compute(int(page)) for page in pages["page"]])}


class TowerActor(PageActor):
    """Float16 features of a page, on disk."""

    def __init__(self, examples: ExampleSet, settings: TowerSettings, threads: int, folder: str) -> None:
        torch.set_num_threads(threads)
        self.tower = load_tower(settings)
        self.examples, self.settings, self.folder = examples, settings, Path(folder)

    def compute(self, page: int) -> bool:
        size, file = self.settings.rows_per_file, page_file(page)
        examples = self.examples.page(page * size, size)
        made_of = _fingerprint(self.settings, examples)
        if _made_of(self.folder / file) == made_of:
            return False
        ids, features, bad = [], [], {}
        for batch in examples.to_batches(self.settings.batch_size):
            good = []
            for image_id, image in zip(batch["image_id"].to_pylist(), batch["image"].to_pylist(), strict=True):
                reason = why_undecodable(image)
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
        write_page(self.folder / file, table, {_MADE_OF: made_of, _DIGEST: self.tower.digest, _BAD: json.dumps(bad)})
        return True


class FeatureSet:
    """What `embed_examples` wrote: features of the frozen tower, page by page of the examples, and which tower made them."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where there is no finished set."""
        if not (folder / MANIFEST_FILE).is_file():
            raise DataError(f"no features at {folder}: compute them first (`finecap scorer train` does)")
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        self.tower_digest: str = manifest["tower"]["digest"]
        self.rows_per_page: int = manifest["rows_per_file"]
        self.folder = folder
        self._paths = [folder / FEATURES_FOLDER / page_file(page) for page in range(manifest["files"])]

    def __len__(self) -> int:
        """Pages."""
        return len(self._paths)

    @cached_property
    def image_ids(self) -> frozenset[str]:
        """Of the images that have features: all but those that couldn't be decoded."""
        columns = (pq.read_table(path, columns=["image_id"])["image_id"] for path in self._paths)
        return frozenset(image_id for column in columns for image_id in column.to_pylist())

    def page(self, page: int) -> tuple[list[str], Float16[np.ndarray, "n F"]]:
        """Image ids and features of the images of that page of the examples."""
        table = pq.read_table(self._paths[page])
        lists = table["features"].combine_chunks()
        features = vectors(lists) if len(lists) else np.empty((0, 0), dtype=np.float16)
        return table["image_id"].to_pylist(), features

    def matrix(self, image_ids: Sequence[str]) -> Float16[np.ndarray, "N F"]:
        """Of these images, in this order; of none [0, 0]. Raises DataError, naming the first that has none."""
        place = {image_id: row for row, image_id in enumerate(image_ids)}
        found = np.empty((len(image_ids), 0), dtype=np.float16)
        for page in range(len(self)):
            ids, features = self.page(page)
            own = [(place.pop(image_id), row) for row, image_id in enumerate(ids) if image_id in place]
            if own:
                to, of = map(list, zip(*own, strict=True))
                if not found.shape[1]:
                    found = np.empty((len(image_ids), features.shape[1]), dtype=np.float16)
                found[to] = features[of]
        if place:
            raise DataError(
                f"{len(place)} images have no features, such as {next(iter(place))}: embed the examples again"
            )
        return found


def embed_examples(
    examples: ExampleSet, out: Path, tower: TowerSettings, data: DataSettings, resources: ResourceSettings
) -> int:
    """Writes features and a manifest into `out`, and returns how many files were computed (the others were there).

    Images that can't be decoded are left out and counted. Raises DataError past `max_bad_fraction`, listing the first ten.
    """
    folder = out / FEATURES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pages = -(-len(examples) // tower.rows_per_file)
    computed = over_pages(range(pages), TowerActor, (examples, tower, resources.threads, str(folder)), resources)
    files = [page_file(page) for page in range(pages)]
    for stranger in {path.name for path in folder.iterdir()} - set(files):
        (folder / stranger).unlink()  # of a job that was killed while it wrote, or of more examples
    _write_manifest(folder, files, out, tower, data)
    return computed


def over_pages(pages: Sequence[int], actor: type[PageActor], arguments: tuple, resources: ResourceSettings) -> int:
    """A Ray Data pool of actors that grows with the work, over pages of examples: how many they had to compute."""
    dataset = ray.data.from_items([{"page": page} for page in pages], override_num_blocks=min(len(pages), _BLOCKS))
    answers = dataset.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.scorers),
        num_cpus=1,
        num_gpus=resources.gpus,
    )
    return sum(int(batch["computed"].sum()) for batch in answers.iter_batches(batch_size=None))


def page_file(page: int) -> str:
    return f"part-{page:05d}.parquet"


def write_page(path: Path, table: pa.Table, facts: dict) -> None:
    """With facts as its metadata; the file is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    pq.write_table(table.replace_schema_metadata(facts), unfinished, compression="none", use_dictionary=False)
    unfinished.replace(path)


def _fingerprint(tower: TowerSettings, examples: pa.Table) -> str:
    """Of tower settings and examples."""
    digest = hashlib.sha256(tower.model_dump_json(exclude={"batch_size", "rows_per_file"}).encode())
    update_digest(digest, examples)
    return digest.hexdigest()[:16]


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
    check_decodable(bad, images + len(bad), data.max_bad_fraction)
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
        "rows_per_file": tower.rows_per_file,
        "left_out": {"undecodable": len(bad)},
    }
    (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def check_decodable(bad: Mapping[str, str], images: int, max_bad_fraction: float) -> None:
    """bad: image id -> why it can't be decoded. Raises DataError where those are too many of all, listing the first ten."""
    if len(bad) > max_bad_fraction * images:
        first = "\n".join(f"  {image_id}: {reason}" for image_id, reason in list(bad.items())[:_LISTED])
        raise DataError(
            f"{len(bad)} of {images} images can't be decoded, more than data.max_bad_fraction={max_bad_fraction}:\n{first}"
        )


def why_undecodable(image: bytes) -> str | None:
    """None where it can be decoded."""
    try:
        decode_image(image)
    except DataError as error:
        return str(error)
    return None
