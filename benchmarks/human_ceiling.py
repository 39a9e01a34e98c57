"""The ceiling of a photo benchmark: five human captions of each dev photo as candidates, R@1 in mined dev bags.

    python benchmarks/human_ceiling.py --cache FOLDER

Trains reward scorer and judge as the photo protocol has it (open_clip dual encoders on EfficientNet-lite0, each on one half
of train, in the order of image ids), on features that are computed once and kept in the cache with them. What the humans
lose is the scorers' own mistake. Needs ../shared/data/flickr8k.parquet. Writes benchmarks/results/human_ceiling.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from finecap_ray.bags.mining import bag_similarity, mine_bags
from finecap_ray.config import JudgeSettings, ScorerSettings, TowerSettings
from finecap_ray.evaluation.pools import Pool, PoolSet, random_pools
from finecap_ray.evaluation.ranking import place_captions, retrieval_numbers
from finecap_ray.evaluation.scorer_warrant import measure_warrant, read_ratings
from finecap_ray.scorers.images import CaptionedFeatures
from finecap_ray.scorers.scorer import FACTS_FILE, Scorer, load_scorer
from finecap_ray.scorers.tower import FrozenTower, load_tower
from finecap_ray.scorers.train import train_scorer

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
SIZES = (3, 5, 7)
TOWER = TowerSettings(model="tf_efficientnet_lite0", image_size=224)
# The towers are frozen, with two-layer heads; the judge's text tower is trained from scratch, which takes more steps.
SCORERS = {
    "reward scorer": ScorerSettings(epochs=15),
    "judge": JudgeSettings(epochs=40, batch_size=128, feature_dropout=0.4),
}
BOOTSTRAP = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="folder of features and scorers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = Path(arguments.cache)
    rows = pq.read_table(DATA / "flickr8k.parquet").to_pylist()
    tower = load_tower(TOWER)
    features = photo_features(rows, tower, cache)
    scorers = {name: photo_scorer(name, rows, features, tower, cache) for name in SCORERS}

    dev = [row for row, own in enumerate(rows) if own["split"] == "dev"]
    ids = [rows[row]["image_id"] for row in dev]
    captions = {rows[row]["image_id"]: rows[row]["captions"] for row in dev}
    mined_by = scorers["reward scorer"].project_features(features[dev]).numpy()
    pools = [random_pools(ids, 100, seed=0)]
    similarity = {}
    for size in SIZES:
        bags = mine_bags(mined_by, size, seed=0)
        similarity[f"bags of {size}"] = float(np.mean([bag_similarity(mined_by, bag) for bag in bags]))
        members = tuple(Pool(tuple(ids[row] for row in bag), tuple(range(size))) for bag in bags)
        pools.append(PoolSet(f"bags of {size}", size, members, dependent=True))

    texts = list(dict.fromkeys(text for own in captions.values() for text in own))
    place = {text: row for row, text in enumerate(texts)}
    asked = {image_id: [place[text] for text in own] for image_id, own in captions.items()}
    every = [row["image_id"] for row in rows]
    ratings = read_ratings(DATA / "flickr8k_expert.parquet")
    rows_of = {image_id: row for row, image_id in enumerate(ids)}
    result: dict = {"images": len(ids), "captions": len(texts), "similarity": similarity, "by": {}, "warrant": {}}
    for name, scorer in scorers.items():
        images, embedded = scorer.project_features(features[dev]), scorer.embed_texts(texts)
        result["by"][name] = [
            retrieval_numbers(own, place_captions(own.pools, rows_of, images, asked, embedded), BOOTSTRAP, seed=0)
            for own in pools
        ]
        of_dev, of_all = (
            dict(zip(names, own, strict=True))
            for names, own in ((ids, images), (every, scorer.project_features(features)))
        )
        result["warrant"][name] = measure_warrant(scorer, captions, of_dev, ratings, of_all, BOOTSTRAP, seed=0)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "human_ceiling.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "human_ceiling.md").write_text(_markdown(result), encoding="utf-8")
    print(_markdown(result))


def photo_features(rows: list[dict], tower: FrozenTower, cache: Path) -> torch.Tensor:
    file = cache / f"features-{tower.digest}.npz"
    if not file.is_file():
        images = [row["image"] for row in rows]
        parts = [tower.embed(images[start : start + 32]) for start in range(0, len(images), 32)]
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=torch.cat(parts).half().numpy(), ids=[row["image_id"] for row in rows])
    saved = np.load(file)
    assert list(saved["ids"]) == [row["image_id"] for row in rows], f"{file} holds the features of other photos"
    return torch.from_numpy(saved["features"].astype(np.float32))


def photo_scorer(name: str, rows: list[dict], features: torch.Tensor, tower: FrozenTower, cache: Path) -> Scorer:
    folder, settings = cache / name.replace(" ", "_"), SCORERS[name]
    if not (folder / FACTS_FILE).is_file():
        train = sorted(
            (row for row, own in enumerate(rows) if own["split"] == "train"), key=lambda row: rows[row]["image_id"]
        )
        middle = len(train) // 2
        half = train[:middle] if settings.half == "first" else train[middle:]
        dev = [row for row, own in enumerate(rows) if own["split"] == "dev"]
        every = CaptionedFeatures(features, [row["captions"] for row in rows])
        train_scorer(settings, tower, every.rows(half), every.rows(dev), folder)
    scorer = load_scorer(folder)
    assert scorer.tower_digest == tower.digest, f"{folder} stands on another tower: remove it to train it anew"
    return scorer


def _markdown(result: dict) -> str:
    def cell(numbers: dict) -> str:
        value, low, high = (100 * numbers["recall_at_1"][part] for part in ("value", "low", "high"))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    by = result["by"]
    lines = [
        f"R@1 in percent of {result['captions']} human captions of {result['images']} dev photos, with the 95 % bootstrap "
        "interval (`python benchmarks/human_ceiling.py --cache FOLDER`).",
        "",
        f"| against | pools | n | chance | {' | '.join(by)} |",
        "|---" * (4 + len(by)) + "|",
    ]
    for row, numbers in enumerate(next(iter(by.values()))):
        cells = " | ".join(cell(own[row]) for own in by.values())
        lines.append(
            f"| {numbers['against']} | {numbers['pools']} | {numbers['n']} | {100 * numbers['chance']:.1f} | {cells} |"
        )
    lines += [
        "",
        "| warrant | tau-b | tau-c | rated captions | binding % | of captions | truncated % |",
        "|---" * 7 + "|",
    ]
    for name, own in result["warrant"].items():
        lines.append(
            f"| {name} | {own['tau_b']:.3f} | {own['tau_c']:.3f} | {own['rated_captions']} | {100 * own['binding']:.1f} "
            f"| {own['binding_captions']} | {100 * own['truncated']:.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
