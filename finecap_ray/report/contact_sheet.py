"""Bags of look-alikes laid out for reading: each image with the captions of every system, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finecap_ray.report.thumbnails import data_uri


@dataclass(frozen=True, slots=True)
class System:
    """Whose captions are shown: a captioner of a run, or people."""

    key: str  # in the records: mle, rl, human; with the run's place before it where there are several (0/rl)
    label: str  # on the page: before, after, human; with the run's name before it where there are several


@dataclass(frozen=True, slots=True)
class ReportImage:
    image_id: str
    image: bytes  # encoded JPEG, PNG, GIF or WebP
    captions: Mapping[str, str]  # system -> caption
    rank: Mapping[
        str, float
    ]  # system -> rank of the image by that caption, 1 is first, ties shared; absent: not judged
    competitor: Mapping[str, str | None]  # system -> id of the image that was found instead, None where it was first


@dataclass(frozen=True, slots=True)
class ReportBag:
    bag_id: str
    similarity: float  # mean pairwise cosine of the image embeddings
    group: str
    images: tuple[ReportImage, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an image from one system to another; sign and word say it without the colour."""

    name: str
    sign: str
    meaning: str


WON = Outcome("won", "▲", "found after, not before")
KEPT = Outcome("kept", "✓", "found before and after")
REGRESSED = Outcome("regressed", "▼", "found before, not after")
LOST = Outcome("lost", "✕", "found neither before nor after")
UNKNOWN = Outcome("unknown", "·", "not judged in this bag")
OUTCOMES = (WON, KEPT, REGRESSED, LOST)


@dataclass(frozen=True, slots=True)
class Line:
    """One caption of an image."""

    system: str  # label
    caption: str
    verdict: str  # "rank 2 of 5, found image 3"
    found: bool
    competitor: int | None  # number of the image that was found instead, where it is in the bag


@dataclass(frozen=True, slots=True)
class Cell:
    number: int  # in its bag, from 1
    image_id: str
    source: str  # data URI
    outcome: Outcome
    found: str  # a sign per system, in their order: 1 found, 0 not, - not judged; the page's filters read it
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    bag_id: str
    similarity: float
    group: str
    cells: tuple[Cell, ...]
    found_before: int
    found_after: int


def contact_sheet(bag: ReportBag, systems: Sequence[System], before: str, after: str) -> Sheet:
    """A bag as it is shown; `before` and `after` are the keys of the systems that outcomes compare.

    Raises DataError for an image format that browsers don't show.
    """
    sources = {image.image_id: data_uri(image.image, image.image_id) for image in bag.images}
    numbers = {image_id: number for number, image_id in enumerate(sources, start=1)}
    cells = tuple(
        Cell(
            number=numbers[image.image_id],
            image_id=image.image_id,
            source=sources[image.image_id],
            outcome=outcome(image, before, after),
            found="".join("-" if (own := found(image, system.key)) is None else str(int(own)) for system in systems),
            lines=tuple(_line(image, system, numbers) for system in systems if system.key in image.captions),
        )
        for image in bag.images
    )
    return Sheet(
        bag_id=bag.bag_id,
        similarity=bag.similarity,
        group=bag.group,
        cells=cells,
        found_before=sum(bool(found(image, before)) for image in bag.images),
        found_after=sum(bool(found(image, after)) for image in bag.images),
    )


def count_outcomes(sheets: Sequence[Sheet]) -> dict[Outcome, int]:
    cells = [cell for sheet in sheets for cell in sheet.cells]
    return {outcome: sum(cell.outcome is outcome for cell in cells) for outcome in OUTCOMES}


def outcome(image: ReportImage, before: str, after: str) -> Outcome:
    match found(image, before), found(image, after):
        case (None, _) | (_, None):
            return UNKNOWN
        case (False, True):
            return WON
        case (True, True):
            return KEPT
        case (True, False):
            return REGRESSED
        case _:
            return LOST


def found(image: ReportImage, system: str) -> bool | None:
    """First and alone there: a shared first place has an expected rank above 1. None where the system wasn't judged."""
    return image.rank[system] == 1 if system in image.rank else None


def _line(image: ReportImage, system: System, numbers: Mapping[str, int]) -> Line:
    rank, competitor = image.rank.get(system.key), image.competitor.get(system.key)
    return Line(
        system=system.label,
        caption=image.captions[system.key],
        verdict=_verdict(rank, competitor, numbers),
        found=rank == 1,
        competitor=None if rank == 1 or competitor is None else numbers.get(competitor),
    )


def _verdict(rank: float | None, competitor: str | None, numbers: Mapping[str, int]) -> str:
    if rank is None:
        return "not judged in this bag"
    place = f"rank {rank:g} of {len(numbers)}"
    if rank == 1:
        return place
    if rank % 1:
        place += " (tie)"
    if competitor is None:
        return place
    other = f"image {numbers[competitor]}" if competitor in numbers else competitor
    return f"{place}, found {other}"
