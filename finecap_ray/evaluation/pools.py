"""Which images compete for a caption: bags of look-alikes, random distractors, all images, or the sets of ImageCoDe.

bags:FILE.json     TrueMatch's form, a list of bags, each a list of image ids; or a bag set folder
random:SIZE        every image among SIZE - 1 others drawn at random (RD100 is random:100)
all                every image among all
imagecode:FILE     ImageCoDe's form, {set: {place: description}} with images named SET/img0 to SET/img9, or so with an ending
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext

import numpy as np

from finecap_ray.bags.truematch import bag_set_ids, read_truematch
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.sources.files import read_json

IMAGECODE_SIZE = 10


@dataclass(frozen=True, slots=True)
class Pool:
    """Images that compete, and the places of those whose captions are asked about."""

    image_ids: tuple[str, ...]
    asked: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoolSet:
    """Pools of one size that are reported together."""

    name: str  # "bags of 5"
    size: int
    pools: tuple[Pool, ...]
    dependent: (
        bool  # the captions of a pool are alike in difficulty: an interval draws whole pools, else single captions
    )


@dataclass(frozen=True, slots=True)
class FoundPools:
    """What a specification gave: pool sets, and what was left out of them by reason."""

    sets: tuple[PoolSet, ...]
    left_out: dict[str, int]


def find_pools(against: str, image_ids: Sequence[str], seed: int, others: Sequence[str] = ()) -> FoundPools:
    """The pools of a specification, over the images that have captions. In bags and sets `others` may compete too.

    Raises ConfigError for a specification of no known form, DataError for a file that isn't as it says, or for too few images.
    """
    kind, _, what = against.partition(":")
    match kind:
        case "bags" if what:
            return _among(read_bag_ids(what), image_ids, others, "bags", what)
        case "random" if what.isdecimal():
            return FoundPools((random_pools(image_ids, int(what), seed),), {})
        case "all" if not what:
            return FoundPools((all_images(image_ids),), {})
        case "imagecode" if what:
            described = read_imagecode(what)
            named = {splitext(image_id)[0]: image_id for image_id in (*image_ids, *others)}
            sets = {
                name: tuple(named.get(own := f"{name}/img{place}", own) for place in range(IMAGECODE_SIZE))
                for name in described
            }
            asked = {name: tuple(own) for name, own in described.items()}
            return _among(list(sets.values()), image_ids, others, "ImageCoDe sets", what, list(asked.values()))
    raise ConfigError(f"{against!r} is unknown: bags:FILE, random:SIZE, all, or imagecode:FILE")


def read_bag_ids(path: str | Path) -> list[tuple[str, ...]]:
    """The image ids of each bag of a TrueMatch file or of a bag set folder (every size). Raises DataError for another form."""
    return [tuple(bag) for bag in (bag_set_ids(path) if Path(path).is_dir() else read_truematch(path))]


def read_imagecode(path: str | Path) -> dict[str, dict[int, str]]:
    """Descriptions of an ImageCoDe file: set -> place of the image described, 0 to 9 -> its description."""
    tree = read_json(path)
    described = isinstance(tree, dict) and bool(tree) and all(isinstance(own, dict) for own in tree.values())
    if not described or not all(place.isdecimal() for own in tree.values() for place in own):
        raise DataError(f"{path} isn't {{set: {{place: description}}}} (ImageCoDe's form)")
    sets = {name: {int(place): str(text) for place, text in own.items()} for name, own in tree.items()}
    outside = [name for name, own in sets.items() if any(not 0 <= place < IMAGECODE_SIZE for place in own)]
    if outside:
        raise DataError(
            f"{path}: {len(outside)} sets describe an image past 0 to {IMAGECODE_SIZE - 1}, such as {outside[0]}"
        )
    return sets


def random_pools(image_ids: Sequence[str], size: int, seed: int) -> PoolSet:
    """Every image once among size - 1 random others. What is over from the last pool is filled up with images not asked about.

    Raises DataError for fewer images than a pool needs.
    """
    if not 2 <= size <= len(image_ids):
        raise DataError(
            f"pools of {size} random images need 2 or more and at most the {len(image_ids)} images there are: ask for another size"
        )
    order = np.random.default_rng(seed).permutation(len(image_ids))
    pools = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        asked = len(rows)
        filled = [*rows, *order[: size - asked]]
        pools.append(Pool(tuple(image_ids[row] for row in filled), tuple(range(asked))))
    return PoolSet(f"{size} random images", size, tuple(pools), dependent=False)


def all_images(image_ids: Sequence[str]) -> PoolSet:
    if len(image_ids) < 2:
        raise DataError(f"retrieval among all images needs 2 or more, there are {len(image_ids)}")
    pool = Pool(tuple(image_ids), tuple(range(len(image_ids))))
    return PoolSet(f"all {len(image_ids)} images", len(image_ids), (pool,), dependent=False)


def _among(
    bags: Sequence[tuple[str, ...]],
    image_ids: Sequence[str],
    others: Sequence[str],
    kind: str,
    path: str,
    asked: Sequence[tuple[int, ...]] | None = None,
) -> FoundPools:
    """The bags whose images are all there and ask about one that has a caption, by size; the others are counted."""
    captioned = set(image_ids)
    there = captioned.union(others)
    by_size: dict[int, list[Pool]] = {}
    left_out: Counter[str] = Counter()
    for row, bag in enumerate(bags):
        places = tuple(range(len(bag))) if asked is None else asked[row]
        if not there.issuperset(bag):
            left_out[f"{kind} with an image that isn't there"] += 1
        elif captioned.isdisjoint(bag[place] for place in places):
            left_out[f"{kind} that ask about no image with a caption"] += 1
        else:
            by_size.setdefault(len(bag), []).append(Pool(bag, places))
    if not by_size:
        absent = sorted({image_id for bag in bags for image_id in bag} - there)
        if not absent:
            raise DataError(f"none of the {len(bags)} {kind} of {path} asks about an image that has a caption")
        raise DataError(
            f"none of the {len(bags)} {kind} of {path} has all its images among the {len(there)} there are; "
            f"absent are, for example, {', '.join(absent[:5])}"
        )
    sets = tuple(
        PoolSet(f"{kind} of {size}", size, tuple(pools), dependent=True) for size, pools in sorted(by_size.items())
    )
    return FoundPools(sets, dict(left_out))
