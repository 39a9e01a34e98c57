"""One HTML file with sample bags of every size of a bag set; nothing in it is loaded from anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finecap_ray.bags.bag_set import Shelf, read_manifest, shelves
from finecap_ray.bags.stream import take_bags
from finecap_ray.records import Bag, bags_from_arrow
from finecap_ray.report.templates import template
from finecap_ray.report.thumbnails import data_uri

PAGE_FILE = "bags.html"


@dataclass(frozen=True, slots=True)
class ShownImage:
    image_id: str
    source: str  # data URI
    caption: str
    similarity: float  # mean cosine to the other images of the bag


@dataclass(frozen=True, slots=True)
class ShownBag:
    bag_id: str
    rank: int  # 1: the bag most alike
    similarity: float  # mean over its pairs
    least: float  # cosine of the pair least alike
    most: float
    images: tuple[ShownImage, ...]


def write_bag_page(folder: str | Path, out: str | Path | None, bags_per_size: int) -> Path:
    """Writes the page to `out` (default: bags.html in the bag set) and returns its path.

    The samples lie at equal distances from the bag most alike to the one least alike. Raises DataError where there is no
    bag set, or an image that can't be decoded.
    """
    manifest = read_manifest(folder)
    path = Path(folder) / PAGE_FILE if out is None else Path(out)
    samples = {str(size): sample(folder, size, shelf, bags_per_size) for size, shelf in shelves(manifest).items()}
    html = template("bags.html.j2").render(manifest=manifest, samples=samples)
    path.write_text(html, encoding="utf-8")
    return path


def sample(folder: str | Path, size: int, shelf: Shelf, count: int) -> list[ShownBag]:
    rows = np.unique(np.linspace(0, shelf.bags - 1, min(count, shelf.bags)).round().astype(int)).tolist()
    bags = bags_from_arrow(take_bags(folder, size, shelf, rows, None))
    return [_shown(bag, row + 1) for bag, row in zip(bags, rows, strict=True)]


def _shown(bag: Bag, rank: int) -> ShownBag:
    embeddings = np.stack([image.embedding for image in bag.images]).astype(np.float32)
    cosines = embeddings @ embeddings.T
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    others = (cosines.sum(axis=1) - np.diag(cosines)) / (len(cosines) - 1)
    images = tuple(
        ShownImage(
            image.image_id,
            data_uri(image.image, image.image_id),
            image.captions[0] if image.captions else "",
            float(similarity),
        )
        for image, similarity in zip(bag.images, others, strict=True)
    )
    return ShownBag(bag.bag_id, rank, bag.similarity, float(pairs.min()), float(pairs.max()), images)
