"""The records that cross a process boundary, and their Arrow schemas.

Example   one image with its captions, as imported
Bag       look-alike images with everything that training needs (no joins later)
ImageBank images by their embeddings alone
Rollout   one sampled caption, with the log-probabilities of the policy that made it
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, Self

import numpy as np
import pyarrow as pa

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)

# What the frozen tower sees of an image: one row per example, in the order of the examples.
FEATURE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("features", pa.list_(pa.float16()), nullable=False),
    ]
)

BAG_IMAGE_TYPE = pa.struct(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("embedding", pa.list_(pa.float16()), nullable=False),
        pa.field("features", pa.list_(pa.float16())),
    ]
)
BAG_SCHEMA = pa.schema(
    [
        pa.field("bag_id", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("images", pa.list_(BAG_IMAGE_TYPE), nullable=False),
    ]
)

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("weights_version", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Example:
    image_id: str
    image: bytes  # encoded JPEG, PNG or WebP
    captions: tuple[str, ...]
    split: str

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        return cls(row["image_id"], row["image"], tuple(row["captions"]), row["split"])

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BagImage:
    image_id: str
    image: bytes | None  # None where only training reads the bag
    captions: tuple[str, ...]
    embedding: np.ndarray  # [D] float16, unit-norm, of the reward scorer
    features: np.ndarray | None  # [F] float16, of the captioner's frozen tower; None where it isn't frozen


@dataclass(frozen=True, slots=True)
class Bag:
    bag_id: str
    similarity: float  # mean pairwise cosine of the image embeddings
    images: tuple[BagImage, ...]


@dataclass(frozen=True, slots=True)
class ImageBank:
    """M images by their embeddings."""

    image_ids: list[str]  # [M], each once
    embeddings: np.ndarray  # [M, D] float16, unit-norm, of the reward's scorer


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks for garbage after every 700 new objects, and for records that are made by the thousand there is none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def bags_from_arrow(table: pa.Table) -> list[Bag]:
    """The rows of a table in BAG_SCHEMA; the images may be left out of it. Vectors are views of the table's memory."""
    lists = table["images"].combine_chunks()
    images = lists.flatten()
    columns = {name: images.field(name) for name in ("image_id", "captions", "embedding", "features")}
    records = list(
        map(
            BagImage,
            columns["image_id"].to_pylist(),
            images.field("image").to_pylist() if images.type.get_field_index("image") >= 0 else repeat(None),
            map(tuple, columns["captions"].to_pylist()),
            vectors(columns["embedding"]),
            repeat(None) if columns["features"].null_count else vectors(columns["features"]),
        )
    )
    ends = np.cumsum(lists.value_lengths().to_numpy()).tolist()
    return [
        Bag(bag_id, similarity, tuple(records[start:end]))
        for bag_id, similarity, start, end in zip(
            table["bag_id"].to_pylist(), table["similarity"].to_pylist(), [0, *ends], ends, strict=False
        )
    ]


def vectors(lists: pa.ListArray) -> np.ndarray:
    """Lists of equal length as the rows of a matrix."""
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)


def float16_lists(matrix: np.ndarray) -> pa.ListArray:
    """The rows of a matrix as lists: what `vectors` takes back."""
    offsets = pa.array(np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.astype(np.float16).ravel(), pa.float16()))


@dataclass(frozen=True, slots=True)
class Rollout:
    image_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # with the end token, where the caption ended by itself
    logprobs: tuple[float, ...]  # nats, of the distribution that was sampled from
    text: str
    finish_reason: str  # "stop": ended by itself; "length": cut at the token limit
    weights_version: int
