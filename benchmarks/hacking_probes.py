"""What the hacking probes earn beyond the human captions they are made from, by the reward of a preset, on the dev photos.

    python benchmarks/hacking_probes.py --cache FOLDER [--preset rloo]

FOLDER is that of benchmarks/human_ceiling.py: what of features and reward scorer isn't there yet is made. Each of the five
captions of a photo is scored in its mined bag of 5 with the other four as references, and so are the probes made of it. Needs
../shared/data/flickr8k.parquet. Writes benchmarks/results/hacking_probes.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from human_ceiling import DATA, RESULTS, TOWER, photo_features, photo_scorer

from finecap_ray.bags.mining import mine_bags
from finecap_ray.config import RewardSettings, load_settings
from finecap_ray.evaluation.probes import probe_gains
from finecap_ray.rewards.combine import PENALTIES, build_components, component_weights
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.scorers.scorer import Scorer
from finecap_ray.scorers.tower import load_tower

BAG_SIZE = 5
CAPTIONS_PER_PHOTO = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="folder of benchmarks/human_ceiling.py")
    parser.add_argument("--preset", default="rloo")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, cache, tower = pq.read_table(DATA / "flickr8k.parquet").to_pylist(), Path(arguments.cache), load_tower(TOWER)
    features = photo_features(rows, tower, cache)
    scorer = photo_scorer("reward scorer", rows, features, tower, cache)
    reward = load_settings(arguments.preset).rl.reward
    result = measure(rows, features, scorer, reward)
    result |= {"preset": arguments.preset, "reward": reward.model_dump(), "scorer": scorer.digest}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hacking_probes.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "hacking_probes.md").write_text(_markdown(result), encoding="utf-8")
    print(_markdown(result))


def measure(rows: list[dict], features: torch.Tensor, scorer: Scorer, reward: RewardSettings) -> dict:
    """Per probe and component the mean gain over captions, and its standard error by bags."""
    corpus = [row["captions"] for row in rows if row["split"] == "train"]
    weights = component_weights(reward)
    # the penalties are worked out also where the preset gives them no weight
    components = build_components(reward.model_copy(update=dict.fromkeys(PENALTIES, 1.0)), scorer, corpus, None)
    dev = [row for row, own in enumerate(rows) if own["split"] == "dev"]
    embeddings = scorer.project_features(features[dev]).numpy()
    bags = mine_bags(embeddings, BAG_SIZE, seed=0)
    photos = [row for bag in bags for row in bag]
    captions = [rows[dev[row]]["captions"] for row in photos]
    gains: dict[str, dict[str, list[np.ndarray]]] = {}
    for place in range(CAPTIONS_PER_PHOTO):
        honest = RewardRequest(
            texts=[own[place] for own in captions],
            ended=np.ones(len(photos), dtype=bool),
            target=np.arange(len(photos)),
            image_ids=[rows[dev[row]]["image_id"] for row in photos],
            embeddings=embeddings[photos].astype(np.float16),
            bag_of_image=np.arange(len(bags)).repeat(BAG_SIZE),
            references=[tuple(text for text in own if text != own[place]) for own in captions],
        )
        own_gains = probe_gains(honest, components, weights, scorer.embed_texts, scorer.tokenizer.context_length)
        for probe, parts in own_gains.items():
            for part, values in parts.items():
                gains.setdefault(probe, {}).setdefault(part, []).append(values)
    for parts in gains.values():
        penalties = sum(weights.get(name, 0.0) * np.stack(parts[name]) for name in PENALTIES)
        parts["without penalties"] = list(np.stack(parts["reward"]) - penalties)
    return {
        "photos": len(photos),
        "captions": len(photos) * CAPTIONS_PER_PHOTO,
        "bags": len(bags),
        "gains": {
            probe: {part: _by_bags(np.stack(values), len(bags)) for part, values in parts.items()}
            for probe, parts in gains.items()
        },
    }


def smallest_weight(gains: dict, penalty: str) -> float | None:
    """Of a penalty alone, so that the upper end of the 95 % interval of what a probe earns is 0. None: it can't do that."""
    earned, price = gains["without penalties"], -gains[penalty]["mean"]
    most = earned["mean"] + 1.96 * earned["error"]
    if most <= 0:
        return 0.0
    return most / price if price > 0 else None


def _by_bags(gains: np.ndarray, bags: int) -> dict[str, float]:
    """[captions per photo, photos] -> mean and standard error: the captions of a bag depend on each other."""
    of_bags = gains.mean(axis=0).reshape(bags, -1).mean(axis=1).astype(np.float64)
    return {"mean": of_bags.mean(), "error": of_bags.std(ddof=1) / np.sqrt(bags)}


def _markdown(result: dict) -> str:
    parts = ["reward", "without penalties"]
    parts += [part for part in next(iter(result["gains"].values())) if part not in parts]

    def cell(gain: dict) -> str:
        return f"{gain['mean']:+.4f} ± {gain['error']:.4f}"

    lines = [
        f"What a probe earns beyond the human caption it is made from, by the reward of `{result['preset']}`, by that without "
        "its penalties, and by each component before it is weighed: mean over "
        f"{result['captions']} captions of {result['photos']} dev photos in bags of {BAG_SIZE}, ± the standard error by bags "
        f"(`python benchmarks/hacking_probes.py --cache FOLDER --preset {result['preset']}`).",
        "",
        f"| probe | {' | '.join(parts)} |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for probe, gains in result["gains"].items():
        lines.append(f"| {probe} | {' | '.join(cell(gains[part]) for part in parts)} |")
    lines += [
        "",
        "The smallest weight of one penalty by which a probe's 95 % interval ends at 0 or below (0: it does without; -: none does):",
        "",
        f"| probe | {' | '.join(PENALTIES)} |",
        "|---" * (1 + len(PENALTIES)) + "|",
    ]
    for probe, gains in result["gains"].items():
        weights = [smallest_weight(gains, penalty) for penalty in PENALTIES]
        lines.append(f"| {probe} | {' | '.join('-' if weight is None else f'{weight:.3g}' for weight in weights)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
