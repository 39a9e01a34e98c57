"""Bags of look-alikes laid out for reading: each image with its captions before and after, and what became of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finecap_ray.errors import DataError

BEFORE, AFTER = "mle", "rl"
SYSTEMS = {BEFORE: "before", AFTER: "after", "human": "human"}  # name in the records -> name on the page
_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}


@dataclass(frozen=True, slots=True)
class ReportImage:
    image_id: str
    image: bytes  # encoded JPEG, PNG, GIF or WebP
    captions: Mapping[str, str]  # system (mle, rl, perhaps human) -> caption
    rank: Mapping[str, float]  # system -> rank of the image by that caption, 1 is first, ties shared
    competitor: Mapping[str, str | None]  # system -> id of the image that was found instead, None where it was first


@dataclass(frozen=True, slots=True)
class ReportBag:
    bag_id: str
    similarity: float  # mean pairwise cosine of the image embeddings
    group: str
    images: tuple[ReportImage, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training did to an image; sign and word say it without the colour."""

    name: str
    sign: str
    meaning: str


WON = Outcome("won", "▲", "found after training only")
KEPT = Outcome("kept", "✓", "found before and after")
REGRESSED = Outcome("regressed", "▼", "found before training only")
LOST = Outcome("lost", "✕", "found neither before nor after")
OUTCOMES = (WON, KEPT, REGRESSED, LOST)


@dataclass(frozen=True, slots=True)
class Line:
    """One caption of an image."""

    system: str
    caption: str
    verdict: str  # "rank 2 of 5, found image 3"
    found: bool


@dataclass(frozen=True, slots=True)
class Cell:
    number: int  # in its bag, from 1
    image_id: str
    source: str  # data URI
    outcome: Outcome
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    bag_id: str
    similarity: float
    group: str
    cells: tuple[Cell, ...]
    found_before: int
    found_after: int


def contact_sheet(bag: ReportBag) -> Sheet:
    """A bag as it is shown. Raises DataError for an image format that browsers don't show."""
    numbers = {image.image_id: number for number, image in enumerate(bag.images, start=1)}
    cells = tuple(
        Cell(
            number=numbers[image.image_id],
            image_id=image.image_id,
            source=data_uri(image.image, image.image_id),
            outcome=outcome(image),
            lines=tuple(
                Line(
                    label,
                    image.captions[system],
                    _verdict(image.rank[system], image.competitor[system], numbers),
                    _found(image, system),
                )
                for system, label in SYSTEMS.items()
                if image.captions.get(system) is not None
            ),
        )
        for image in bag.images
    )
    return Sheet(
        bag_id=bag.bag_id,
        similarity=bag.similarity,
        group=bag.group,
        cells=cells,
        found_before=sum(_found(image, BEFORE) for image in bag.images),
        found_after=sum(_found(image, AFTER) for image in bag.images),
    )


def count_outcomes(sheets: Sequence[Sheet]) -> dict[Outcome, int]:
    cells = [cell for sheet in sheets for cell in sheet.cells]
    return {outcome: sum(cell.outcome is outcome for cell in cells) for outcome in OUTCOMES}


def outcome(image: ReportImage) -> Outcome:
    match _found(image, BEFORE), _found(image, AFTER):
        case (False, True):
            return WON
        case (True, True):
            return KEPT
        case (True, False):
            return REGRESSED
        case _:
            return LOST


def data_uri(image: bytes, image_id: str) -> str:
    for signature, kind in _SIGNATURES.items():
        if image.startswith(signature):
            return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"
    raise DataError(f"image {image_id} begins with {image[:4]!r}: a report shows JPEG, PNG, GIF and WebP")


def _found(image: ReportImage, system: str) -> bool:
    """First and alone there: a shared first place has an expected rank above 1."""
    return image.rank[system] == 1


def _verdict(rank: float, competitor: str | None, numbers: Mapping[str, int]) -> str:
    place = f"rank {rank:g} of {len(numbers)}"
    if rank == 1:
        return place
    if rank % 1:
        place += " (tie)"
    if competitor is None:
        return place
    other = f"image {numbers[competitor]}" if competitor in numbers else competitor
    return f"{place}, found {other}"
