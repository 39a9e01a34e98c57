"""Bags of 2 to 20 look-alikes on the photos of ../shared/data, each split by itself: how alike they are, against random ones.

    python benchmarks/photo_bags.py

Features of EfficientNet-lite0, a reward scorer trained on half of the training photos, bags of every size on each split.
`finecap bags show runs/photo_bags/bags/test` then writes the page to look at. Writes benchmarks/results/photo_bags.json
and .md: figures only, no photo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from finecap_ray.bags.build import build_bags
from finecap_ray.config import load_settings
from finecap_ray.facts import describe_bags, describe_warrant
from finecap_ray.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results"
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "flickr8k.parquet"
SIZES = (2, 3, 5, 7, 10, 15, 20)
SPLITS = ("train", "dev", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as bags.near_duplicate=0.97")
    arguments = parser.parse_args()
    settings = load_settings(
        "demo", ["name=photo_bags", "run_dir=runs/photo_bags", f"data.examples={PHOTOS}", *arguments.overrides]
    )
    console = Console(soft_wrap=True)
    pipeline = Pipeline.narrated(settings, console)
    warrant = describe_warrant(pipeline.scorer.spec)
    console.print(warrant)
    splits = {}
    for split in SPLITS:
        source = pipeline.bag_source(split, settings.bags)
        splits[split] = build_bags(source, pipeline.run_dir / "bags" / split, SIZES, settings.bags, settings.seed)
        console.print(describe_bags(splits[split]), highlight=False)
    RESULTS.mkdir(exist_ok=True)
    result = {"scorer": warrant.partition(": ")[2] or warrant, "splits": splits}
    (RESULTS / "photo_bags.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "photo_bags.md").write_text(markdown(warrant, splits), encoding="utf-8")


def markdown(warrant: str, splits: dict) -> str:
    lines = [
        "Mean cosine of the pairs of a bag, by the reward scorer's image embeddings (`python benchmarks/photo_bags.py`).",
        f"Scorer: {warrant}.",
        "",
        "| split | images | bag size | bags | left over | mined | random |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {split} | {manifest['images']} | {size} | {facts['bags']} | {facts['leftover']} | {facts['mean_similarity']:.3f} "
        f"| {facts['mean_similarity_of_random_bags']:.3f} |"
        for split, manifest in splits.items()
        for size, facts in manifest["sizes"].items()
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
