"""What a format module gives the importer: a plan of tasks, and how a worker reads one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Found:
    """One image as it lies in a source, not yet looked at."""

    image_id: str
    split: str
    captions: tuple[Any, ...] = ()  # as they stand in the source: may be empty, or not text
    image: bytes = b""
    problem: str | None = None  # why there is no image
    url: str | None = None  # where it can be had from, should the user ask for that


@dataclass(frozen=True, slots=True)
class Source:
    tasks: list[dict[str, Any]]  # each is read by one worker; JSON values only
    read: Callable[[dict[str, Any]], Iterator[Found]]  # a function of a module, so that workers can import it


MISSING_FILE = "missing file"
NO_IMAGE = "row without an image"
UNREADABLE_FILE = "file can't be read"
IMAGES_PER_TASK = 64  # of the formats with a file for each image
