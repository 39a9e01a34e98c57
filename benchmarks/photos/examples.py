"""What a recipe gained and lost: images that the judge finds in their bag by one captioner's caption and not by the other's.

    python benchmarks/photos/examples.py ROOT/seed-0/mle-dev.json ROOT/seed-0/default-dev.json \\
        --judge ROOT/shared/judge --bags ROOT/shared/bags/dev

with ROOT the folder of a benchmark's runs, such as runs/photos/photos_small. Drawn at random among all such images of the bags of
five, so that they are no better than the rest.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from finecap_ray.config import load_settings
from finecap_ray.evaluation.caption_files import read_captions
from finecap_ray.evaluation.judging import PoolJudge
from finecap_ray.evaluation.pools import read_bag_ids
from finecap_ray.sources import read_examples

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class Change:
    bag: tuple[str, ...]
    own: int  # place in the bag
    picked: dict[str, int]  # BEFORE, AFTER -> place of the image that the judge picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--judge", required=True)
    parser.add_argument("--bags", required=True, help="bag set folder, or a file in TrueMatch's form")
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--config", default="photos_small", help="whose examples hold the photos")
    arguments = parser.parse_args()

    captions = {BEFORE: read_captions(arguments.before), AFTER: read_captions(arguments.after)}
    bags = [bag for bag in read_bag_ids(arguments.bags) if len(bag) == arguments.size]
    wanted = {image_id for bag in bags for image_id in bag}
    settings = load_settings(arguments.config)
    examples = read_examples(settings.data.examples).to_pylist()
    rows = {row["image_id"]: row for row in examples if row["image_id"] in wanted}
    judge = PoolJudge(arguments.judge, settings.resources.threads)
    judge.show(list(rows), [row["image"] for row in rows.values()], None)
    reply = judge.judge_bags(captions, bags)
    gains, losses = [], []
    for number, bag in enumerate(bags):
        for own in range(len(bag)):
            before, after = (reply.hits[system][number][own] for system in (BEFORE, AFTER))
            if before == after:
                continue
            change = Change(bag, own, {system: int(reply.best[system][number][own]) for system in captions})
            (gains if after > before else losses).append(change)
    images = sum(len(bag) for bag in bags)
    print(
        f"{len(bags)} bags of {arguments.size}: of {images} images {len(gains)} are found now and {len(losses)} no longer."
    )
    random = np.random.default_rng(0)
    for title, changes in (("Gains", gains), ("Losses", losses)):
        print(f"\n### {title}")
        for place in random.permutation(len(changes))[: arguments.count]:
            _show(changes[place], captions)


def _show(change: Change, captions: dict[str, dict[str, list[str]]]) -> None:
    """The other images of the bag by what the captioner says of them now: people's captions stay with the photos."""
    image_id = change.bag[change.own]
    print(f"\n**{image_id}**\n")
    for system, picked in change.picked.items():
        verdict = "found" if picked == change.own else f"{change.bag[picked]} is taken for it"
        print(f"- {system}: {captions[system][image_id][0]} ({verdict})")
    others = [other for other in change.bag if other != image_id]
    print("- its bag: " + "; ".join(f"{other}: {captions[AFTER][other][0]}" for other in others))


if __name__ == "__main__":
    main()
