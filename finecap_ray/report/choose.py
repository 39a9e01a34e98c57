"""Which bags a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BEFORE, AFTER = "mle", "rl"


def choose_bags(
    details: Sequence[dict[str, Any]], count: int, before: str = BEFORE, after: str = AFTER
) -> list[dict[str, Any]]:
    """`count` bags, as many of each group, and in it of those that gained, stayed and lost from `before` to `after`.

    Evenly spaced in each. The number of images that were found, after minus before, tells the three apart and orders the
    result within a group.
    """

    def gain(bag: Mapping[str, Any]) -> int:
        return sum((image["rank"].get(after) == 1) - (image["rank"].get(before) == 1) for image in bag["images"])

    groups: dict[str, list[dict[str, Any]]] = {}
    for bag in details:
        groups.setdefault(bag["group"], []).append(bag)
    chosen = []
    for bags, share in zip(groups.values(), _shares([len(bags) for bags in groups.values()], count), strict=True):
        ranked = sorted(bags, key=lambda bag: (-gain(bag), bag["bag_id"]))
        kinds = [
            [bag for bag in ranked if gain(bag) > 0],
            [bag for bag in ranked if gain(bag) < 0],
            [bag for bag in ranked if gain(bag) == 0],
        ]
        picks = [
            _spaced(kind, part) for kind, part in zip(kinds, _shares([len(kind) for kind in kinds], share), strict=True)
        ]
        chosen += sorted((bag for kind in picks for bag in kind), key=lambda bag: (-gain(bag), bag["bag_id"]))
    return chosen


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` handed out one by one in turn, to those that have room."""
    shares = [0] * len(sizes)
    while sum(shares) < min(count, sum(sizes)):
        for place, size in enumerate(sizes):
            if shares[place] < size and sum(shares) < count:
                shares[place] += 1
    return shares


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, the first one and then at equal distances."""
    return [items[place * len(items) // count] for place in range(count)]
