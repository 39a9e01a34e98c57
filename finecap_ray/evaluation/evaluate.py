"""Evaluate captions, of a checkpoint or from a file, by a judge and against human captions.

examples ──> judge, reward scorer: embed the images ──────┐
    `──> sampler (Ray Data, vLLM) or file ──> captions ──┴──> retrieval in pools, CLIPScore
                                                 `─────────> caption metrics, objects      (meanwhile, in this process)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from finecap_ray.captioning import run_folder
from finecap_ray.cluster import absolute, connect, get_within
from finecap_ray.config import Settings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.captions import caption_metrics, text_statistics
from finecap_ray.evaluation.finecapeval import aspect_coverage, read_finecapeval
from finecap_ray.evaluation.java_metrics import NotAvailable, java_metrics
from finecap_ray.evaluation.judging import Judge, JudgeFacts
from finecap_ray.evaluation.objects import object_precision, read_synonyms
from finecap_ray.evaluation.pools import PoolSet, find_pools
from finecap_ray.evaluation.provenance import versions
from finecap_ray.evaluation.sample import Captioned, caption_images, parse_decoding
from finecap_ray.sources import read_examples

JUDGE, REWARD_SCORER, HUMAN = "judge", "reward scorer", "human"
NO_JUDGE = (
    "no judge was given, so nothing but the reward scorer (or nobody) says whether captions tell images apart: "
    "give --judge a scorer that had no part in the reward"
)
SAME_SCORER = "the judge is the reward scorer ({digest}): a caption that fools one fools the other; give another judge"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be evaluated; one of `captions` and `checkpoint` is None."""

    captions: str | None  # JSON file, image id -> caption (or a list of candidates)
    checkpoint: str | None  # captioner folder
    splits: tuple[str, ...] | None  # of the examples; None: those of evaluation.groups, or the images of the file
    judge: str | None  # what load_scorer takes
    reward_scorer: str | None


def evaluate(settings: Settings, request: Request) -> dict[str, Any]:
    """The results as JSON can hold them; see the README for their keys.

    Raises ConfigError for a request that names both or neither of captions and checkpoint, DataError for captions and images
    that don't fit.
    """
    if (request.captions is None) == (request.checkpoint is None):
        raise ConfigError("give either captions (a file) or a checkpoint")
    given = None if request.captions is None else read_captions(request.captions)
    evaluation = settings.evaluation
    decoding = parse_decoding(evaluation.decoding, evaluation.temperature)
    rows, others = _examples(settings, request, given)
    find_all_pools(settings, rows, others)  # a mistake in them is told before an engine starts

    connect(settings.resources)
    started = time.perf_counter()
    scorers = {name: spec for name, spec in ((JUDGE, request.judge), (REWARD_SCORER, request.reward_scorer)) if spec}
    actors = {
        name: Judge.remote(absolute(spec) if Path(spec).is_dir() else spec, settings.resources.threads)
        for name, spec in scorers.items()
    }
    try:
        sampled, left_out = None, {}
        if given is None:
            sampled = _sample(settings, rows, absolute(request.checkpoint), decoding)
            left_out = {f"images: {reason}": count for reason, count in sampled.left_out.items()}
            given = {image_id: [caption] for image_id, caption in sampled.captions.items()}
            rows = [row for row in rows if row["image_id"] in given]
        given = {row["image_id"]: given[row["image_id"]] for row in rows}
        asked_at = time.perf_counter()
        pools, incomplete = find_all_pools(settings, rows, others)
        competing = {image_id for own in pools for pool in own.pools for image_id in pool.image_ids}
        shown = rows + [row for row in others if row["image_id"] in competing]
        human = {row["image_id"]: list(row["captions"]) for row in rows if row["captions"]}
        facts = {name: _get(settings, actor.facts.remote(), f"load the {name}") for name, actor in actors.items()}
        answers = {}
        for name, actor in actors.items():
            _show(actor, facts[name], shown, sampled)
            answers[name] = actor.answer.remote(given, human, pools, evaluation.bootstrap_samples, settings.seed)
        first = {image_id: own[0] for image_id, own in given.items()}
        metrics, unavailable, metrics_s = _caption_metrics(settings, first, human)
        answers = {name: _get(settings, own, f"answer as {name}") for name, own in answers.items()}
    finally:
        for actor in actors.values():
            ray.kill(actor)

    if sampled is not None:
        metrics["ended"] = sampled.ended
    return {
        "evaluated": request.captions or request.checkpoint,
        "images": len(rows),
        "warnings": _warnings(facts),
        "left_out": left_out | incomplete,
        "retrieval": [
            {"captions": whose, "by": name} | numbers
            for name, reply in answers.items()
            for whose, own in (("evaluated", reply.retrieval), (HUMAN, reply.human))
            for numbers in own
        ],
        "caption_metrics": metrics,
        "similarity": {name: reply.similarity for name, reply in answers.items()},
        "not_available": unavailable,
        "tokenisation": evaluation.tokenisation,
        "scorers": {name: {"spec": scorers[name], "digest": own.digest} for name, own in facts.items()},
        "captioner": None if sampled is None else {"weights": sampled.weights, "tower": sampled.tower_digest},
        "seconds": {
            "engine start": sampled.engine_start_s if sampled else 0.0,
            "sampling": sampled.seconds if sampled else 0.0,
            "caption metrics": metrics_s,
            "scoring and metrics": time.perf_counter() - asked_at,
            "together": time.perf_counter() - started,
        },
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json", include={"seed", "data", "tower", "evaluation"}),
        "versions": versions(),
    }


def default_scorers(settings: Settings, captioner: str | None) -> tuple[str | None, str | None]:
    """Judge and reward scorer of the settings or, where those are trained, of the run that a captioner lies in."""
    folder = Path(settings.run_dir) if captioner is None else run_folder(captioner)
    specs = []
    for name, scorer in (("judge", settings.judge), ("scorer", settings.scorer)):
        trained = None if folder is None else folder / name
        specs.append(scorer.spec or (str(trained) if trained is not None and trained.is_dir() else None))
    return specs[0], specs[1]


def find_all_pools(
    settings: Settings, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> tuple[list[PoolSet], dict[str, int]]:
    """The pools of every specification in evaluation.against, and what was left out by reason."""
    ids, more = ([row["image_id"] for row in part] for part in (rows, others))
    found = [find_pools(one, ids, settings.seed, more) for one in settings.evaluation.against]
    left_out = {reason: count for one in found for reason, count in one.left_out.items()}
    return [own for one in found for own in one.sets], left_out


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Candidates by image id of a captions file: {id: caption} or {id: [captions]}. Raises DataError for another form."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise DataError(f'{path} must hold captions by image id, such as {{"cat.jpg": "a cat"}}')
    captions = {str(key): [own] if isinstance(own, str) else own for key, own in tree.items()}
    wrong = [
        key
        for key, own in captions.items()
        if not isinstance(own, list) or not own or any(not isinstance(one, str) for one in own)
    ]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} of {len(captions)} entries are no caption and no list of them, such as {wrong[0]}"
        )
    return captions


def _examples(
    settings: Settings, request: Request, given: Mapping[str, Sequence[str]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images to evaluate on: of the splits, and those that a captions file has captions of. Of a file also the others of the
    splits, which may compete in its bags."""
    examples = read_examples(settings.data.examples).to_pylist()
    splits = request.splits
    if splits is None and given is None:
        splits = tuple(settings.evaluation.groups.values())
    inside = [row for row in examples if splits is None or row["split"] in splits]
    rows = [row for row in inside if given is None or row["image_id"] in given]
    if not rows:
        there = ", ".join(sorted({row["split"] for row in examples}))
        raise DataError(
            f"no image of {settings.data.examples} is in the splits {', '.join(splits or ('any',))}"
            f"{' and has a caption in the file' if given else ''}; its splits are {there}"
        )
    if given is not None and splits is None and len(rows) < len(given):
        absent = sorted(given.keys() - {row["image_id"] for row in rows})
        raise DataError(
            f"{len(absent)} of {len(given)} captions are of images that {settings.data.examples} doesn't hold, such as "
            f"{', '.join(absent[:5])}"
        )
    return rows, [] if given is None else [row for row in inside if row["image_id"] not in given]


def _sample(settings: Settings, rows: list[dict[str, Any]], checkpoint: str, decoding) -> Captioned:
    return caption_images(
        [row["image_id"] for row in rows],
        [row["image"] for row in rows],
        checkpoint,
        settings.tower,
        decoding,
        settings.resources,
        settings.seed,
        settings.evaluation.batch_size,
        settings.data.max_bad_fraction,
    )


def _show(actor, facts: JudgeFacts, rows: list[dict[str, Any]], sampled: Captioned | None) -> None:
    """The images, as features where the captioner's tower is the scorer's own: they are there already."""
    ids = [row["image_id"] for row in rows]
    if sampled is not None and facts.tower_digest == sampled.tower_digest:
        actor.show.remote(ids, None, np.stack([sampled.features[image_id] for image_id in ids]))
    else:
        actor.show.remote(ids, [row["image"] for row in rows], None)


def _caption_metrics(
    settings: Settings, captions: Mapping[str, str], human: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, str], float]:
    """Metrics of one caption per image, those that can't be had with the reason, and the seconds they took."""
    started, evaluation = time.perf_counter(), settings.evaluation
    referred = {image_id: text for image_id, text in captions.items() if image_id in human}
    if not referred:
        reason = "no image has a human caption"
        return dict(text_statistics(list(captions.values()))), {"metrics against references": reason}, 0.0
    metrics = caption_metrics(referred, human, evaluation.tokenisation)
    metrics |= object_precision(referred, human, read_synonyms(evaluation.synonyms))
    unavailable = {}
    if evaluation.java_metrics:
        for name, value in java_metrics(referred, human, evaluation.tokenisation, evaluation.java_metrics).items():
            if isinstance(value, NotAvailable):
                unavailable[name] = value.reason
            else:
                metrics[name] = value
    if evaluation.finecapeval:
        covered = aspect_coverage(captions, read_finecapeval(evaluation.finecapeval), evaluation.finecapeval_matching)
        metrics |= {f"finecapeval_{aspect}": value for aspect, value in covered.items()}
    return metrics, unavailable, time.perf_counter() - started


def _warnings(facts: Mapping[str, JudgeFacts]) -> list[str]:
    if JUDGE not in facts:
        return [NO_JUDGE]
    if REWARD_SCORER in facts and facts[JUDGE].digest == facts[REWARD_SCORER].digest:
        return [SAME_SCORER.format(digest=facts[JUDGE].digest)]
    return []


def _get(settings: Settings, reference, doing: str) -> Any:
    timeout_s = settings.resources.start_timeout_s + settings.resources.step_timeout_s
    late = f"a scorer didn't {doing} within {timeout_s:.0f} s: see `ray status` for free CPUs, or raise resources.step_timeout_s"
    return get_within(reference, timeout_s, late)
