"""What a bag set is mined from: the images of one split, their vectors in memory, their pictures and features on disk."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Float16

from finecap_ray.bags.conditional import without_words
from finecap_ray.config import BagSettings, ResourceSettings
from finecap_ray.errors import DataError
from finecap_ray.scorers.embed import FeatureSet, over_pages
from finecap_ray.sources.examples import ExampleSet


@dataclass(frozen=True, slots=True)
class BagSource:
    """Images of one split, row by row. `images` and `features` are read where a bag wants them: they may lie on disk."""

    image_ids: list[str]
    images: Sequence[bytes]
    captions: list[list[str]]
    embeddings: np.ndarray  # [N, D] float32, unit-norm, of the reward scorer
    features: np.ndarray | None  # [N, F] float16, of the captioner's frozen tower
    name: str
    left_out: dict[str, int]
    scorer: dict[str, str]  # name and digest
    tower: dict[str, str]  # digest; empty where the captioner has no frozen tower
    caption_embeddings: np.ndarray | None = None
    """[N, D] mean embedding of an image's captions, 0 where it has none; for bags that compare captions too."""


class EmbeddingActor:
    """Ray Data batch: the number of a page -> what the reward scorer makes of its images that are in the split."""

    def __init__(
        self, scorer: str, examples: ExampleSet, features: FeatureSet, split: str, bags: BagSettings, threads: int
    ) -> None:
        from finecap_ray.scorers.scorer import load_scorer

        torch.set_num_threads(threads)
        self.scorer, self.examples, self.features = load_scorer(scorer), examples, features
        self.split, self.bags = split, bags

    def __call__(self, pages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        [page] = pages["page"]
        table, features = _page(self.examples, self.features, int(page), self.split)
        if self.scorer.tower_digest == self.features.tower_digest:
            images = self.scorer.project_features(torch.from_numpy(features.astype(np.float32)))
        else:
            images = self.scorer.embed_images(table["image"].to_pylist())
        made = {"image_id": table["image_id"].to_numpy(), "image": images.numpy()}
        if _compares_captions(self.bags):
            captions = table["captions"].to_pylist()
            if self.bags.kind == "conditional":
                captions = [[without_words(caption, self.bags.word_class) for caption in own] for own in captions]
            made["captions"] = _mean_captions(self.scorer, captions, images.shape[1])
        facts = {"name": self.scorer.name, "digest": self.scorer.digest}
        return made | {name: np.full(len(table), fact) for name, fact in facts.items()}


@contextmanager
def bag_source(
    examples: ExampleSet,
    features: FeatureSet,
    scorer: str,
    split: str,
    bags: BagSettings,
    resources: ResourceSettings,
    folder: Path,
) -> Iterator[BagSource]:
    """The images of a split that have features, as the reward scorer sees them.

    Meanwhile pictures and features lie in a temporary folder in `folder`: they may be larger than memory.
    """
    inside = examples.split(split)
    own = inside.filter(pc.is_in(inside["image_id"], pa.array(sorted(features.image_ids), pa.string())))
    if not len(own):
        raise DataError(f"none of the {len(inside)} images of split {split!r} can be decoded")
    image_ids, pages = own["image_id"].to_pylist(), np.unique(own["row"].to_numpy() // features.rows_per_page)
    place = {image_id: row for row, image_id in enumerate(image_ids)}
    arguments = (scorer, examples, features, split, bags, resources.threads)
    vectors: dict[str, np.ndarray] = {}  # image and captions
    facts: dict[str, str] = {}
    for made in over_pages(pages.tolist(), EmbeddingActor, arguments, resources):
        rows = [place[image_id] for image_id in made["image_id"]]
        for name in made.keys() & {"image", "captions"}:
            vectors.setdefault(name, np.empty((len(own), made[name].shape[1]), dtype=np.float32))[rows] = made[name]
        facts = {name: str(made[name][0]) for name in ("name", "digest")}
    with TemporaryDirectory(prefix=".pictures", dir=folder) as scratch:
        pictures, matrix = _lay_out(examples, features, pages.tolist(), split, len(own), Path(scratch))
        with pictures:
            yield BagSource(
                image_ids=image_ids,
                images=pictures,
                captions=own["captions"].to_pylist(),
                embeddings=vectors["image"],
                features=matrix,
                name=split,
                left_out={"without features": len(inside) - len(own)},
                scorer=facts,
                tower={"digest": features.tower_digest},
                caption_embeddings=vectors.get("captions"),
            )


class Pictures(Sequence[bytes]):
    """Encoded images one after the other in a file, which is mapped into memory."""

    def __init__(self, path: Path, ends: list[int]) -> None:
        self._file, self._ends = path.open("rb"), [0, *ends]
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self._bytes[self._ends[row] : self._ends[row + 1]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes.close()
        self._file.close()


def _lay_out(
    examples: ExampleSet, features: FeatureSet, pages: list[int], split: str, images: int, folder: Path
) -> tuple[Pictures, np.ndarray]:
    """Pictures and features of a split, in the order of the examples."""
    ends, matrix = [], None
    with (folder / "pictures").open("wb") as file:
        for page in pages:
            table, own = _page(examples, features, page, split)
            if matrix is None:
                shape = (images, own.shape[1])
                matrix = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
            matrix[len(ends) : len(ends) + len(own)] = own
            for image in table["image"].to_pylist():
                file.write(image)
                ends.append(file.tell())
    return Pictures(folder / "pictures", ends), matrix


def _page(
    examples: ExampleSet, features: FeatureSet, page: int, split: str
) -> tuple[pa.Table, Float16[np.ndarray, "n F"]]:
    """The examples of a page that are in the split and have features, and these."""
    table = examples.page(page * features.rows_per_page, features.rows_per_page)
    ids, matrix = features.page(page)
    row = {image_id: number for number, image_id in enumerate(ids)}
    pairs = zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    table = table.filter(pa.array([name == split and image_id in row for image_id, name in pairs]))
    return table, matrix[[row[image_id] for image_id in table["image_id"].to_pylist()]]


def _compares_captions(bags: BagSettings) -> bool:
    return bags.kind == "conditional" or bags.compare == "image_and_captions"


def _mean_captions(scorer, captions: list[list[str]], width: int) -> Float[np.ndarray, "n D"]:
    """Mean of the caption embeddings of each image, 0 where it has no caption."""
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    means = np.zeros((len(captions), width), dtype=np.float32)
    if len(owner):
        np.add.at(means, owner, scorer.embed_texts([caption for own in captions for caption in own]).numpy())
    return means / np.maximum(np.bincount(owner, minlength=len(captions)), 1)[:, None]
