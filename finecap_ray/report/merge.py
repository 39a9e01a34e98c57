"""The bags of several runs as one set: those of the first run, with the captions and ranks of the others in them.

Runs that mined with the same scorer, images and seed have the same bags. Another run's captions are shown in the first
one's bags all the same, without a rank where that bag isn't among its own: a rank means nothing among other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HUMAN = "human"
_WORDS = {"mle": "before", "rl": "after", HUMAN: "human"}


@dataclass(frozen=True, slots=True)
class Merged:
    bags: list[dict[str, Any]]  # as bags.json has them, their captions, ranks and finds by system
    systems: list[tuple[str, str]]  # key, label
    before: str
    after: str
    notes: tuple[str, ...]


def merge_details(runs: Sequence[list[dict[str, Any]]], names: Sequence[str]) -> Merged:
    """`runs`: bags.json of each run, with its name. The first run's outcome before -> after is the one shown first.

    A later run's start is left out where its captions are those of the first run's.
    """
    if len(runs) == 1:
        present = [key for key in _WORDS if any(key in image["captions"] for bag in runs[0] for image in bag["images"])]
        return Merged(runs[0], [(key, _WORDS[key]) for key in present], "mle", "rl", ())
    systems, sources = [], []
    start = _captions(runs[0], "mle")
    for place, name in enumerate(names):
        for system in ("mle", "rl"):
            if place and system == "mle" and _captions(runs[place], "mle") == start:
                continue
            systems.append((f"{place}/{system}", f"{name}, {_WORDS[system]}"))
            sources.append((place, system))
    systems.append((HUMAN, HUMAN))
    sources.append((0, HUMAN))

    places = [{(bag["group"], frozenset(_ids(bag))): bag for bag in own} for own in runs]
    captions = {(place, system): _captions(runs[place], system) for place, system in sources}
    merged = [
        bag | {"images": [_image(bag, row, systems, sources, places, captions) for row in range(len(bag["images"]))]}
        for bag in runs[0]
    ]
    notes = []
    for place, name in enumerate(names[1:], start=1):
        common = places[0].keys() & places[place].keys()
        if len(common) < len(runs[place]):
            notes.append(
                f"{len(common)} of the {len(runs[place])} bags of {name} are bags of {names[0]} too; the others aren't shown."
            )
    return Merged(merged, systems, "0/rl", "1/rl", tuple(notes))


def _image(bag, row: int, systems, sources, places, captions) -> dict[str, Any]:
    image_id = bag["images"][row]["image_id"]
    image: dict[str, Any] = {"image_id": image_id, "captions": {}, "rank": {}, "best": {}}
    key = (bag["group"], frozenset(_ids(bag)))
    for (name, _), (place, system) in zip(systems, sources, strict=True):
        image["captions"][name] = captions[place, system].get(image_id)
        if key in places[place]:
            own = next(one for one in places[place][key]["images"] if one["image_id"] == image_id)
            if system in own["rank"]:
                image["rank"][name], image["best"][name] = own["rank"][system], own["best"][system]
    return image


def _ids(bag: dict[str, Any]) -> list[str]:
    return [image["image_id"] for image in bag["images"]]


def _captions(bags: list[dict[str, Any]], system: str) -> dict[str, str | None]:
    return {image["image_id"]: image["captions"].get(system) for bag in bags for image in bag["images"]}
