"""Evaluate the captioners of a run on bags of look-alikes: R@1 by a judge, the reward scorer beside it, and caption metrics.

The judge never rewarded a caption. The gap between its gain and the reward scorer's is the measure of reward hacking.
Human captions stand beside them, vague ones too, so that trained captions may do better. Each of the captions that people wrote of an
image is a candidate of its own, and the image counts with their mean; one that nobody captioned counts for the captioners alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.stream import read_bags
from finecap_ray.cluster import work_within
from finecap_ray.config import ResourceSettings, Settings
from finecap_ray.evaluation.captions import caption_metrics, text_statistics
from finecap_ray.evaluation.judging import SAME_SCORER, BagReply, judge_facts, started_judges
from finecap_ray.evaluation.provenance import versions
from finecap_ray.evaluation.retrieval import bootstrap_gain_interval, bootstrap_interval
from finecap_ray.records import Bag, BagImage, Rollout
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.sampling.spec import SamplingSpec

HUMAN = "human"
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class _Held:
    """A held-out bag and the group it is counted in."""

    group: str
    bag: Bag


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
    held = {
        size: [_Held(group, bag) for group, folder in bag_sets.items() for bag in read_bags(folder, size)]
        for size in settings.evaluation.bag_sizes
    }
    every = [own for one in held.values() for own in one]
    images = list({image.image_id: image for own in every for image in own.bag.images}.values())
    judges = {"judge": judge, "reward scorer": scorer}
    rollouts, captions_per_s = _sample(settings, images, captioners, logs)
    captions = _captions(rollouts, images)
    (out / "captions.json").write_text(json.dumps(captions, indent=1, ensure_ascii=False), encoding="utf-8")
    candidates = {system: {key: (text,) for key, text in captions[system].items()} for system in rollouts}
    references = {image.image_id: image.captions for image in images if image.captions}
    if references:
        candidates[HUMAN] = references
    tower = read_manifest(next(iter(bag_sets.values())))["tower"]["digest"]
    members = [tuple(image.image_id for image in own.bag.images) for own in every]
    with started_judges(judges, settings.resources) as actors:  # the engine's GPU is free again
        replies, digests = _ask(actors, settings.resources, images, tower, candidates, members)

    results, start = {}, 0
    for size, own in held.items():
        rows = range(start, start + len(own))
        groups = {WHOLE: list(rows)}
        for row, one in zip(rows, own, strict=True):
            groups.setdefault(one.group, []).append(row)
        results[size] = {group: _group(settings, members_of, replies) for group, members_of in groups.items()}
        start += len(own)
    headline = results[settings.evaluation.bag_size]
    same = digests["judge"] == digests["reward scorer"]
    summary = {
        "warnings": [SAME_SCORER.format(digest=digests["judge"])] if same else [],
        "bags": headline[WHOLE]["bags"],
        "bag_size": settings.evaluation.bag_size,
        "recall_at_1": headline[WHOLE]["recall_at_1"],
        "interval": headline[WHOLE]["interval"],
        "groups": headline,
        "bag_sizes": {str(size): own for size, own in results.items()},
        "caption_metrics": {system: _metrics(own, references) for system, own in rollouts.items()},
        "captions_per_s": captions_per_s,
        "made_with": {
            "seed": settings.seed,
            "tokenisation": "coco",
            "scorers": {name: {"spec": spec, "digest": digests[name]} for name, spec in judges.items()},
            "versions": versions(),
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    details = _details(every, captions, replies["judge"])
    (out / "bags.json").write_text(json.dumps(details, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def _group(settings: Settings, rows: list[int], replies: Mapping[str, BagReply]) -> dict[str, Any]:
    evaluation, seed = settings.evaluation, settings.seed
    judged, by_scorer = (_valued(replies[name], rows) for name in ("judge", "reward scorer"))
    interval = {
        system: bootstrap_interval(values, evaluation.bootstrap_samples, seed) for system, values in judged.items()
    }
    interval["gain"] = bootstrap_gain_interval(judged["mle"], judged["rl"], evaluation.bootstrap_samples, seed)
    return {
        "bags": len(rows),
        "recall_at_1": {system: float(np.concatenate(values).mean()) for system, values in judged.items()},
        "interval": interval,
        "recall_at_1_by_reward_scorer": {
            system: float(np.concatenate(values).mean()) for system, values in by_scorer.items()
        },
    }


def _valued(reply: BagReply, rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """Per system what its captions add to R@1, of the bags that it has a caption in."""
    values = {system: [hits[row][~np.isnan(hits[row])] for row in rows] for system, hits in reply.hits.items()}
    values = {system: [own for own in bags if own.size] for system, bags in values.items()}
    return {system: bags for system, bags in values.items() if bags}


def _metrics(rollouts: Sequence[Rollout], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    captions = {one.image_id: one.text for one in rollouts if one.image_id in references}
    ended = {"ended": sum(one.finish_reason == "stop" for one in rollouts) / len(rollouts)}
    if not captions:
        return text_statistics([one.text for one in rollouts]) | ended
    return caption_metrics(captions, references, "coco") | ended


def _details(every: Sequence[_Held], captions: dict[str, dict[str, str]], judged: BagReply) -> list[dict]:
    """What a report shows of each bag."""
    return [
        {
            "bag_id": own.bag.bag_id,
            "group": own.group,
            "size": len(own.bag.images),
            "similarity": own.bag.similarity,
            "images": [
                {
                    "image_id": image.image_id,
                    "captions": {system: texts.get(image.image_id) for system, texts in captions.items()},
                    "rank": {
                        system: float(ranks[row][place])
                        for system, ranks in judged.ranks.items()
                        if not np.isnan(ranks[row][place])
                    },
                    "best": {
                        system: own.bag.images[best[row][place]].image_id
                        for system, best in judged.best.items()
                        if best[row][place] >= 0
                    },
                }
                for place, image in enumerate(own.bag.images)
            ],
        }
        for row, own in enumerate(every)
    ]


def _captions(rollouts: Mapping[str, Sequence[Rollout]], images: Sequence[BagImage]) -> dict[str, dict[str, str]]:
    """System -> image -> caption, the first one that people wrote among the systems."""
    captions = {system: {one.image_id: one.text for one in own} for system, own in rollouts.items()}
    return captions | {HUMAN: {image.image_id: image.captions[0] for image in images if image.captions}}


def _ask(
    actors: Mapping[str, ActorHandle],
    resources: ResourceSettings,
    images: Sequence[BagImage],
    tower: str,
    candidates: Mapping[str, Mapping[str, Sequence[str]]],
    bags: Sequence[Sequence[str]],
) -> tuple[dict[str, BagReply], dict[str, str]]:
    """What each scorer says of every caption in its bag, and the scorers' digests."""
    ids = [image.image_id for image in images]
    features = np.stack([image.features for image in images])
    facts = judge_facts(actors, resources)
    shown, replies = [], {}
    for name, actor in actors.items():
        own_tower = facts[name].tower_digest == tower
        shown.append(
            actor.show.remote(
                ids, None if own_tower else [one.image for one in images], features if own_tower else None
            )
        )
        replies[name] = actor.judge_bags.remote(candidates, bags)
    # What couldn't be shown is the error to tell.
    answers = work_within([*shown, *replies.values()], resources, " and ".join(replies), f"judge {len(bags)} bags")
    return dict(zip(replies, answers[len(shown) :], strict=True)), {name: own.digest for name, own in facts.items()}


def _sample(
    settings: Settings, images: Sequence[BagImage], captioners: dict[str, str], logs: str
) -> tuple[dict[str, list[Rollout]], float]:
    """Greedy captions of every image by every captioner, and captions per second of the last one (the engine is warm by then)."""
    from finecap_ray.captioners import family_of
    from finecap_ray.captioners.loader import load_processor

    ids = [image.image_id for image in images]
    inputs = family_of(*load_processor(next(iter(captioners.values())))).images_of(images)
    spec = SamplingSpec(captions_per_image=1, max_tokens=settings.captioner.max_tokens, temperature=0.0)
    # All images go in one call: not a step, but a piece of work.
    resources = settings.resources.model_copy(update={"step_timeout_s": settings.resources.work_timeout_s})
    pool = SamplerPool(next(iter(captioners.values())), resources, logs)
    rollouts = {}
    try:
        pool.wait_until_ready()
        for version, (system, captioner) in enumerate(captioners.items()):
            pool.publish_captioner(version, captioner)
            pool.sync(version)
            rollouts[system], seconds = pool.timed_sample(version, ids, inputs, spec)
    finally:
        pool.close()
    return rollouts, len(ids) / seconds
