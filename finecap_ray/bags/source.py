"""What a bag set is mined from: the images of one split, their vectors in memory, their pictures and features on disk."""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finecap_ray.bags.embeddings import EmbeddingSet, examples_of_page
from finecap_ray.errors import DataError
from finecap_ray.scorers.embed import FeatureSet
from finecap_ray.sources.examples import ExampleSet

_SCRATCH = ".pictures"


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


@contextmanager
def bag_source(
    examples: ExampleSet, features: FeatureSet, embeddings: EmbeddingSet, split: str, folder: Path
) -> Iterator[BagSource]:
    """The images of a split that have features. Raises DataError where there are none.

    Meanwhile pictures and features lie in a temporary folder in `folder`: they may be larger than memory.
    """
    inside = examples.split(split)
    own = inside.filter(pc.is_in(inside["image_id"], pa.array(sorted(features.image_ids), pa.string())))
    if not len(own):
        raise DataError(f"none of the {len(inside)} images of split {split!r} can be decoded")
    image_ids, pages = own["image_id"].to_pylist(), np.unique(own["row"].to_numpy() // features.rows_per_page)
    images, captions = embeddings.read(image_ids, pages)
    for left in folder.glob(f"{_SCRATCH}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    # NFS renames a file that is still mapped instead of removing it: what can't be removed now is removed the next time.
    with TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        pictures, matrix = _lay_out(examples, features, pages, split, len(own), Path(scratch))
        with pictures:
            yield BagSource(
                image_ids=image_ids,
                images=pictures,
                captions=own["captions"].to_pylist(),
                embeddings=images,
                features=matrix,
                name=split,
                left_out={"without features": len(inside) - len(own)},
                scorer=embeddings.scorer,
                tower={"digest": features.tower_digest},
                caption_embeddings=captions,
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
    examples: ExampleSet, features: FeatureSet, pages: Iterable[int], split: str, images: int, folder: Path
) -> tuple[Pictures, np.ndarray]:
    """Pictures and features of a split, in the order of the examples."""
    ends, matrix = [], None
    with (folder / "pictures").open("wb") as file:
        for page in pages:
            table, own = examples_of_page(examples, features, page, split)
            if matrix is None:
                shape = (images, own.shape[1])
                matrix = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
            matrix[len(ends) : len(ends) + len(own)] = own
            for image in table["image"].to_pylist():
                file.write(image)
                ends.append(file.tell())
    return Pictures(folder / "pictures", ends), matrix
