"""Bags in the format of the TrueMatch benchmark: a JSON list of bags, each a list of image ids.

finecap bags export FOLDER OUT.json          finecap bags build bags.truematch=bags.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finecap_ray.bags.bag_set import read_manifest, shelves
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.sources.files import read_json

BagIds = list[list[str]]


def write_truematch(bags: Iterable[Sequence[str]], path: str | Path) -> None:
    """bags: the image ids of each."""
    Path(path).write_text(json.dumps([list(bag) for bag in bags], ensure_ascii=False, indent=1), encoding="utf-8")


def export_bags(folder: str | Path, out: str | Path, sizes: Sequence[int] | None) -> int:
    """Writes the bags of a bag set (of some sizes, or all), and returns how many they are."""
    found = shelves(read_manifest(folder))
    absent = sorted(set(sizes or ()) - set(found))
    if absent:
        raise MismatchError(
            f"the bag set has bags of {', '.join(map(str, found))}, not of {', '.join(map(str, absent))}"
        )
    bags = bag_set_ids(folder, tuple(sizes or found))
    write_truematch(bags, out)
    return len(bags)


def bag_set_ids(folder: str | Path, sizes: Sequence[int] | None = None) -> BagIds:
    """The image ids of each bag of a bag set, of some sizes or all. Raises DataError where there are none."""
    folders = ["size=*"] if sizes is None else [f"size={size}" for size in sizes]
    files = [file for name in folders for file in sorted(Path(folder).glob(f"{name}/part-*.parquet"))]
    if not files:
        raise DataError(f"{folder} isn't a bag set: it has no size=K/part-*.parquet")
    bags: BagIds = []
    for file in files:
        try:
            column = pq.ParquetFile(file).read(columns=["images.list.element.image_id"])["images"]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{file} holds no bags: {error}") from None
        bags += [[image["image_id"] for image in bag] for bag in column.to_pylist()]
    return bags


def read_truematch(path: str | Path) -> BagIds:
    """Image ids, as text, of each bag. Raises DataError for what isn't a list of bags, or a bag that holds an image twice."""
    tree = read_json(path)
    lists = isinstance(tree, list) and bool(tree) and all(isinstance(bag, list) for bag in tree)
    if not lists or not all(isinstance(image_id, str | int) for bag in tree for image_id in bag):
        raise DataError(f"{path} isn't a list of bags, such as [[image id, image id, ...], ...]")
    bags = [[str(image_id) for image_id in bag] for bag in tree]
    for number, bag in enumerate(bags):
        if len(bag) < 2 or len(set(bag)) < len(bag):
            raise DataError(
                f"bag {number} of {path} has {len(bag)} images, {len(set(bag))} of them distinct: {bag[:5]}"
            )
    return bags


def bag_rows(bags: BagIds, image_ids: Sequence[str]) -> tuple[dict[int, list[tuple[int, ...]]], int]:
    """Row numbers of the bags, by bag size, and how many bags name an image that isn't there."""
    row = {image_id: number for number, image_id in enumerate(image_ids)}
    sizes: dict[int, list[tuple[int, ...]]] = {}
    absent = 0
    for bag in bags:
        if all(image_id in row for image_id in bag):
            sizes.setdefault(len(bag), []).append(tuple(row[image_id] for image_id in bag))
        else:
            absent += 1
    return dict(sorted(sizes.items())), absent
