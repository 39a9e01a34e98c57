"""What the reward scorer makes of all examples, on disk: what bags are mined by, and what they carry.

<out>/embeddings/part-00000.parquet ...   a file for each page of the features, written whole or not at all

A pool of Ray actors, as for the features: a job that was killed goes on with the files that aren't there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float16

from finecap_ray.bags.conditional import without_words
from finecap_ray.config import BagSettings, ResourceSettings
from finecap_ray.records import float16_lists, vectors
from finecap_ray.scorers.embed import FeatureSet, PageActor, over_pages, page_file, write_page
from finecap_ray.sources.examples import ExampleSet

_FOLDER = "embeddings"
_WHOLE = "whole"
_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.list_(pa.float16()), nullable=False),
        pa.field("captions", pa.list_(pa.float16())),  # null: not asked for
    ]
)


def compared_captions(bags: BagSettings) -> str | None:
    """What these bags compare of the captions: nothing, the `whole`, or all but the words of that class."""
    if bags.kind == "conditional":
        return bags.word_class
    return _WHOLE if bags.compare == "image_and_captions" else None


class EmbeddingActor(PageActor):
    """Unit-norm float16 embeddings of a page, on disk."""

    def __init__(
        self, scorer: str, examples: ExampleSet, features: FeatureSet, captions: str | None, threads: int, out: Path
    ) -> None:
        from finecap_ray.scorers.scorer import load_scorer

        torch.set_num_threads(threads)
        self.scorer, self.examples, self.features = load_scorer(scorer), examples, features
        self.captions, self.folder = captions, out / _FOLDER

    def compute(self, page: int) -> bool:
        path = self.folder / page_file(page)
        if path.is_file():
            return False
        own_tower = self.scorer.tower_digest == self.features.tower_digest
        examples, features = examples_of_page(self.examples, self.features, page, pictures=not own_tower)
        captions = pa.nulls(len(examples), _SCHEMA.field("captions").type)
        if not len(examples):
            images = captions
        elif own_tower:
            images = float16_lists(self.scorer.project_features(torch.from_numpy(features.astype(np.float32))).numpy())
        else:
            images = float16_lists(self.scorer.embed_images(examples["image"].to_pylist()).numpy())
        if self.captions is not None and len(examples):
            captions = float16_lists(self._mean_captions(examples["captions"].to_pylist()))
        made = pa.table([examples["image_id"].combine_chunks(), images, captions], schema=_SCHEMA)
        write_page(path, made, {"name": self.scorer.name, "digest": self.scorer.digest})
        return True

    def _mean_captions(self, captions: list[list[str]]) -> Float[np.ndarray, "n D"]:
        """Mean of the caption embeddings of each image, 0 where it has no caption."""
        if self.captions != _WHOLE:
            captions = [[without_words(caption, self.captions) for caption in own] for own in captions]
        owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
        embedded = self.scorer.embed_texts([caption for own in captions for caption in own] or [""]).numpy()
        means = np.zeros((len(captions), embedded.shape[1]), dtype=np.float32)
        np.add.at(means, owner, embedded[: len(owner)])
        return means / np.maximum(np.bincount(owner, minlength=len(captions)), 1)[:, None]


def embed_by_scorer(
    examples: ExampleSet,
    features: FeatureSet,
    scorer: str,
    captions: str | None,
    resources: ResourceSettings,
    out: Path,
) -> int:
    """Embeds all examples that have features, and says how many pages it computed (the others were there).

    `captions` as `compared_captions` says.
    """
    (out / _FOLDER).mkdir(parents=True, exist_ok=True)
    arguments = (scorer, examples, features, captions, resources.threads, out)
    return over_pages(range(len(features)), EmbeddingActor, arguments, resources)


class EmbeddingSet:
    """What `embed_by_scorer` wrote."""

    def __init__(self, out: Path) -> None:
        self._folder = out / _FOLDER
        facts = pq.read_schema(self._folder / page_file(0)).metadata
        self.scorer: dict[str, str] = {name: facts[name.encode()].decode() for name in ("name", "digest")}

    def read(
        self, image_ids: Sequence[str], pages: Iterable[int]
    ) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"] | None]:
        """Unit-norm embeddings of these images, which are all on these pages, and the means of their captions' if there are any."""
        place = {image_id: row for row, image_id in enumerate(image_ids)}
        found: dict[str, np.ndarray] = {}
        for page in pages:
            table = pq.read_table(self._folder / page_file(page))
            inside = [place.get(image_id, -1) for image_id in table["image_id"].to_pylist()]
            to, of = zip(*((row, index) for index, row in enumerate(inside) if row >= 0), strict=True)
            for name in ("image", "captions"):
                column = table[name].combine_chunks()
                if column.null_count == 0:
                    own = vectors(column)[list(of)].astype(np.float32)
                    found.setdefault(name, np.empty((len(image_ids), own.shape[1]), dtype=np.float32))[list(to)] = own
        images = found["image"]
        images /= np.linalg.norm(images, axis=1, keepdims=True)  # float16 rounds the norm too
        return images, found.get("captions")


def examples_of_page(
    examples: ExampleSet, features: FeatureSet, page: int, split: str | None = None, pictures: bool = True
) -> tuple[pa.Table, Float16[np.ndarray, "n F"]]:
    """The examples of a page (of a split) that have features, and these."""
    table = examples.page(page * features.rows_per_page, features.rows_per_page, pictures)
    ids, matrix = features.page(page)
    row = {image_id: number for number, image_id in enumerate(ids)}
    pairs = zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    table = table.filter(pa.array([split in (None, name) and image_id in row for image_id, name in pairs]))
    return table, matrix[[row[image_id] for image_id in table["image_id"].to_pylist()]]
