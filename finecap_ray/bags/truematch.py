"""Bags in the format of the TrueMatch benchmark: a JSON list of bags, each a list of image ids.

finecap bags export FOLDER OUT.json          finecap bags build bags.truematch=bags.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from finecap_ray.bags.bag_set import part_path, read_manifest, shelves
from finecap_ray.errors import DataError, MismatchError

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
    bags: BagIds = []
    for size in sizes or found:
        for part in range(-(-found[size].bags // found[size].rows_per_part)):
            with pq.ParquetFile(part_path(folder, size, part)) as file:
                table = file.read(columns=["images.list.element.image_id"])
            bags += [[image["image_id"] for image in images] for images in table["images"].to_pylist()]
    write_truematch(bags, out)
    return len(bags)


def read_truematch(path: str | Path) -> BagIds:
    """Image ids, as text, of each bag. Raises DataError for what isn't a list of bags, or a bag that holds an image twice."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(tree, list) or not tree or not all(isinstance(bag, list) for bag in tree):
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
