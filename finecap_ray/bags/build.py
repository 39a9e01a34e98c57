"""Build a bag set: mined bags of several sizes as parquet, self-contained, with a manifest that says what made them.

The bags most alike come first, so that a band of difficulty is a run of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.bags.bag_set import MANIFEST_FILE, Shelf, part_path
from finecap_ray.bags.conditional import word_labels
from finecap_ray.bags.mining import bag_similarities, bags_of_neighbours, joint_embeddings, random_bags
from finecap_ray.bags.neighbours import find_neighbours
from finecap_ray.bags.source import BagSource
from finecap_ray.bags.truematch import bag_rows, read_truematch
from finecap_ray.config import BagSettings
from finecap_ray.errors import DataError
from finecap_ray.records import BAG_IMAGE_TYPE, BAG_SCHEMA, float16_lists

IMAGES_PER_PART = 8192
BYTES_PER_PART = 2**30  # of encoded images, about; an Arrow array of them ends at 2 GiB
_WEIGHED = 256  # images that the mean size is taken of


def build_bags(
    source: BagSource,
    folder: Path,
    sizes: tuple[int, ...],
    settings: BagSettings,
    seed: int,
    images_per_part: int = IMAGES_PER_PART,
) -> dict[str, Any]:
    """Mines and writes one bag set and returns its manifest. Raises DataError when a size can't be filled.

    A file holds whole row groups of at most `images_per_part` images, fewer where they are large (or one row group): so many are
    in memory at a time.
    """
    few = [len(source.images[row]) for row in range(0, len(source.images), max(1, len(source.images) // _WEIGHED))]
    images_per_part = min(images_per_part, int(BYTES_PER_PART / max(1.0, float(np.mean(few)))))
    listed, absent = {}, 0
    if settings.truematch is not None:
        listed, absent = bag_rows(read_truematch(settings.truematch), source.image_ids)
    mined, search = mine_sizes(source, [size for size in sizes if size not in listed], settings, seed)
    per_size = {}
    for size in sizes:
        bags = listed.get(size) or mined[size]
        if not bags:
            raise DataError(
                f"{len(source.image_ids)} images of {source.name} give no bag of {size}: raise bags.neighbours, "
                "loosen bags.near_duplicate or use a smaller size"
            )
        similarity = bag_similarities(source.embeddings, bags)
        order = np.argsort(-similarity, kind="stable")
        if size in mined and settings.kind == "look_alike" and settings.least_similarity is not None:
            # As bags carry it: the similarity that a bag shows is one that lets it pass.
            order = order[similarity[order].astype(np.float32) >= np.float32(settings.least_similarity)]
            if not len(order):
                raise DataError(
                    f"no bag of {size} images of {source.name} reaches bags.least_similarity={settings.least_similarity}: "
                    f"the most alike has {similarity.max():.3f}"
                )
        bags, similarity = [bags[place] for place in order], similarity[order]
        control = bag_similarities(source.embeddings, random_bags(len(source.image_ids), size, seed))
        rows_per_part = settings.rows_per_group * max(1, images_per_part // (settings.rows_per_group * size))
        for start in range(0, len(bags), rows_per_part):
            part = slice(start, start + rows_per_part)
            path = part_path(folder, size, start // rows_per_part)
            _write(_table(source, bags[part], similarity[part], start), path, settings.rows_per_group)
        used = len({row for bag in bags for row in bag})
        shelf = Shelf(len(bags), settings.rows_per_group, rows_per_part)
        per_size[str(size)] = asdict(shelf) | {
            "mined": size in mined,
            "images": used,
            "leftover": len(source.image_ids) - used,
            "mean_similarity": float(np.mean(similarity)),
            "mean_similarity_of_random_bags": float(np.mean(control)),
        }
    manifest = {
        "source": source.name,
        "images": len(source.image_ids),
        "left_out": source.left_out,
        "scorer": source.scorer,
        "tower": source.tower,
        "mining": settings.model_dump(exclude={"sizes", "rows_per_group"}),
        "search": search,
        "listed_bags_of_other_images": absent,
        "seed": seed,
        "sizes": per_size,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return manifest


def mine_sizes(
    source: BagSource, sizes: Iterable[int], settings: BagSettings, seed: int
) -> tuple[dict[int, list[tuple[int, ...]]], dict[str, Any] | None]:
    """Bags of every size from one search for neighbours, and what that search was worth (None where there was none)."""
    if settings.kind == "random" or not sizes:
        return {size: random_bags(len(source.image_ids), size, seed) for size in sizes}, None
    compared, labels = source.embeddings, None
    if settings.compare == "image_and_captions" or settings.kind == "conditional":
        if source.caption_embeddings is None:
            raise DataError(f"the bags of {source.name} compare captions, and there are no embeddings of these")
        compared = joint_embeddings(source.embeddings, source.caption_embeddings)
    if settings.kind == "conditional":
        labels = word_labels(source.captions, settings.word_class)
    found = find_neighbours(compared, settings.neighbours, depth=max(sizes) - 1, target_recall=settings.target_recall)
    rules = settings.model_dump(include={"max_bags_per_image", "near_duplicate"})
    mined = {
        size: bags_of_neighbours(found, size, seed, **rules, pictures=source.embeddings, labels=labels)
        for size in sizes
    }
    return mined, asdict(found.search)


def _table(source: BagSource, bags: list[tuple[int, ...]], similarity: np.ndarray, first: int) -> pa.Table:
    """Bags of one size, in BAG_SCHEMA."""
    rows = np.asarray(bags).ravel()
    images = pa.StructArray.from_arrays(
        [
            pa.array([source.image_ids[row] for row in rows], pa.string()),
            pa.array([source.images[row] for row in rows], pa.binary()),
            pa.array([source.captions[row] for row in rows], pa.list_(pa.string())),
            float16_lists(source.embeddings[rows]),
            pa.nulls(len(rows), pa.list_(pa.float16()))
            if source.features is None
            else float16_lists(source.features[rows]),
        ],
        fields=list(BAG_IMAGE_TYPE),
    )
    size = len(bags[0])
    offsets = pa.array(np.arange(0, len(rows) + 1, size, dtype=np.int32))
    return pa.table(
        [
            pa.array([f"{source.name}-{size}-{first + index:06d}" for index in range(len(bags))]),
            pa.array(similarity.astype(np.float32)),
            pa.ListArray.from_arrays(offsets, images, type=BAG_SCHEMA.field("images").type),
        ],
        schema=BAG_SCHEMA,
    )


def _write(table: pa.Table, path: Path, rows_per_group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pictures and vectors don't get smaller; looking for a dictionary of them and packing them only takes time.
    pq.write_table(table, path, row_group_size=rows_per_group, compression="none", use_dictionary=False)
