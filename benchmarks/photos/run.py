"""The photo benchmark: recipes and seeds of a preset, evaluated on photos that nobody trained on, and their table.

    python benchmarks/photos/run.py photos_small --recipes mle default --seeds 0 1 2
    python benchmarks/photos/run.py photos_small --split test

A piece (recipe, seed, split) whose numbers are in benchmarks/photos/results is not done again, so that test is read once; a
killed one goes on. Recipes are chosen on dev. Needs ../shared/data/flickr8k.parquet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from piece import Piece, run_piece
from recipes import MLE, RECIPES
from table import markdown

from finecap_ray.console import plain_console

RESULTS = Path(__file__).parent / "results"
PRESETS = ("photos_small", "photos", "photos_vlm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--recipes", nargs="+", choices=[MLE, *RECIPES], default=[MLE, *RECIPES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--root", default="runs/photos", help="folder of the runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="dotted overrides, of all recipes")
    parser.add_argument("--name", default="", help="of the results, where overrides make them others")
    arguments = parser.parse_args()
    if bool(arguments.set) != bool(arguments.name):
        parser.error("--set makes other results: give them a --name of their own, and only them")
    name = f"{arguments.preset}{arguments.name and '-' + arguments.name}"
    folder = RESULTS / name / arguments.split
    folder.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that a part of the table is a whole comparison.
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            file = folder / f"{recipe}-{seed}.json"
            if not file.is_file():
                piece = Piece(arguments.preset, recipe, seed, arguments.split)
                root = Path(arguments.root).absolute() / name
                numbers = run_piece(piece, root, arguments.set, plain_console())
                file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page = markdown([json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))])
    (folder / "table.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
