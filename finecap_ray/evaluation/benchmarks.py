"""Evaluate captioners on bags of look-alikes: R@1 by a judge, the reward scorer beside it, and caption metrics.

The judge never rewarded a caption. The gap between its gain and the reward scorer's is the measure of reward hacking.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from finecap_ray.bags.stream import read_bags
from finecap_ray.config import Settings
from finecap_ray.evaluation.captions import caption_metrics
from finecap_ray.evaluation.retrieval import bootstrap_gain_interval, bootstrap_interval
from finecap_ray.records import Bag
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.sampling.spec import SamplingSpec

HUMAN = "human"  # the first human caption of each image: a ceiling for the scorers' own mistakes
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """Per caption of each system: what it adds to R@1, its rank, and the image that was put first."""

    hits: dict[str, np.ndarray]  # [C] float
    ranks: dict[str, np.ndarray]  # [C] float
    best: dict[str, np.ndarray]  # [C] int: row of the most similar image in the bag


def evaluate_run(
    settings: Settings,
    bag_sets: dict[str, str],
    captioners: dict[str, str],
    judge: str,
    scorer: str,
    out: Path,
    logs: str,
) -> dict[str, Any]:
    """Captions every held-out image greedily with every captioner; writes captions.json, bags.json and summary.json into `out`."""
    groups = {group: read_bags(folder, settings.evaluation.bag_size) for group, folder in bag_sets.items()}
    bags = [bag for group in groups.values() for bag in group]
    captions, captions_per_s = _sample(settings, bags, captioners, logs)
    images = [image for bag in bags for image in bag.images]
    captions[HUMAN] = {image.image_id: image.captions[0] for image in images if image.captions}
    (out / "captions.json").write_text(json.dumps(captions, indent=1, ensure_ascii=False), encoding="utf-8")

    texts = {system: [own.get(image.image_id, "") for image in images] for system, own in captions.items()}
    sizes = [len(bag.images) for bag in bags]
    features = np.stack([image.features for image in images])
    encoded = [image.image for image in images]
    threads = settings.resources.threads
    by_judge, by_scorer = ray.get(
        [_judge.remote(spec, features, encoded, sizes, texts, threads) for spec in (judge, scorer)]
    )

    members = {WHOLE: range(len(bags))}
    start = 0
    for group, own in groups.items():
        members[group] = range(start, start + len(own))
        start += len(own)
    offsets = np.cumsum([0, *sizes])
    per_bag = {
        name: {
            system: [hits[offsets[bag] : offsets[bag + 1]] for bag in range(len(bags))]
            for system, hits in reply.hits.items()
        }
        for name, reply in {"judge": by_judge, "scorer": by_scorer}.items()
    }
    results = {group: _group(settings, [*rows], per_bag) for group, rows in members.items()}
    references = {image.image_id: list(image.captions) for image in images if image.captions}
    metrics = {
        system: caption_metrics({key: own[key] for key in references}, references, "coco")
        for system, own in captions.items()
        if system != HUMAN
    }
    whole = results[WHOLE]
    summary = {
        "bags": whole["bags"],
        "bag_size": settings.evaluation.bag_size,
        "recall_at_1": whole["recall_at_1"],
        "interval": whole["interval"],
        "groups": results,
        "caption_metrics": metrics,
        "captions_per_s": captions_per_s,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    (out / "bags.json").write_text(
        json.dumps(_details(bags, members, offsets, captions, by_judge), indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return summary


def _group(settings: Settings, rows: list[int], per_bag: dict[str, dict[str, list[np.ndarray]]]) -> dict[str, Any]:
    evaluation, seed = settings.evaluation, settings.seed
    judged = {system: [values[row] for row in rows] for system, values in per_bag["judge"].items()}
    interval = {
        system: bootstrap_interval(values, evaluation.bootstrap_samples, seed) for system, values in judged.items()
    }
    interval["gain"] = bootstrap_gain_interval(judged["mle"], judged["rl"], evaluation.bootstrap_samples, seed)
    return {
        "bags": len(rows),
        "recall_at_1": {system: float(np.concatenate(values).mean()) for system, values in judged.items()},
        "interval": interval,
        "recall_at_1_by_reward_scorer": {
            system: float(np.concatenate([values[row] for row in rows]).mean())
            for system, values in per_bag["scorer"].items()
        },
    }


def _details(
    bags: list[Bag],
    members: dict[str, range],
    offsets: np.ndarray,
    captions: dict[str, dict[str, str]],
    judged: JudgeReply,
) -> list[dict]:
    group_of = {row: group for group, rows in members.items() if group != WHOLE for row in rows}
    details = []
    for row, bag in enumerate(bags):
        ids = [image.image_id for image in bag.images]
        details.append(
            {
                "bag_id": bag.bag_id,
                "group": group_of[row],
                "similarity": bag.similarity,
                "images": [
                    {
                        "image_id": image_id,
                        "captions": {system: own.get(image_id) for system, own in captions.items()},
                        "rank": {system: float(ranks[offsets[row] + place]) for system, ranks in judged.ranks.items()},
                        "best": {system: ids[best[offsets[row] + place]] for system, best in judged.best.items()},
                    }
                    for place, image_id in enumerate(ids)
                ],
            }
        )
    return details


def _sample(
    settings: Settings, bags: list[Bag], captioners: dict[str, str], logs: str
) -> tuple[dict[str, dict[str, str]], float]:
    """Greedy captions of every image by every captioner, and captions per second of the last one (the engine is warm by then)."""
    images = [image for bag in bags for image in bag.images]
    ids, features = [image.image_id for image in images], np.stack([image.features for image in images])
    spec = SamplingSpec(captions_per_image=1, max_tokens=settings.captioner.max_tokens, temperature=0.0)
    pool = SamplerPool(next(iter(captioners.values())), settings.resources, logs)
    captions = {}
    try:
        pool.wait_until_ready()
        for version, (system, captioner) in enumerate(captioners.items()):
            pool.publish_captioner(version, captioner)
            pool.sync(version)
            rollouts, seconds = pool.timed_sample(version, ids, features, spec)
            captions[system] = {rollout.image_id: rollout.text for rollout in rollouts}
    finally:
        pool.close()
    return captions, len(ids) / seconds


@ray.remote(num_cpus=1, max_retries=0)
def _judge(
    spec: str, features: np.ndarray, images: list[bytes], sizes: list[int], texts: dict[str, list[str]], threads: int
) -> JudgeReply:
    """Every caption against the images of its own bag."""
    import torch

    from finecap_ray.evaluation.retrieval import recall_per_caption
    from finecap_ray.rewards.self_retrieval import bag_scope, retrieval_rank
    from finecap_ray.scorers.scorer import load_scorer

    torch.set_num_threads(threads)
    scorer = load_scorer(spec)
    if scorer.tower_digest:
        embedded = scorer.project_features(torch.from_numpy(features.astype(np.float32)))
    else:
        embedded = torch.cat([scorer.embed_images(images[start : start + 64]) for start in range(0, len(images), 64)])
    bag = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    target, scope = torch.arange(len(embedded)), bag_scope(bag, bag)
    hits, ranks, best = {}, {}, {}
    start = torch.cumsum(torch.tensor([0, *sizes[:-1]]), 0)[bag]
    for system, own in texts.items():
        text = scorer.embed_texts(own)
        hits[system] = recall_per_caption(text, embedded, target, scope).numpy()
        ranks[system] = retrieval_rank(text, embedded, target, scope).numpy()
        best[system] = ((text @ embedded.T).masked_fill(~scope, -torch.inf).argmax(dim=1) - start).numpy()
    return JudgeReply(hits, ranks, best)
