"""Evaluate captions, of a checkpoint or from a file, by a judge and against human captions.

examples ──> judge, reward scorer: embed the images ──────┐
    `──> sampler (Ray Data, vLLM) or file ──> captions ──┴──> retrieval in pools, CLIPScore
                                                 `─────────> caption metrics, objects      (meanwhile, in this process)
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from finecap_ray.captioning import connect_to_caption, run_folder
from finecap_ray.cluster import connect, work_within
from finecap_ray.config import Settings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.caption_files import read_captions, read_references
from finecap_ray.evaluation.judging import SAME_SCORER, JudgeFacts, judge_facts, started_judges
from finecap_ray.evaluation.pools import PoolSet, find_pools
from finecap_ray.evaluation.provenance import versions
from finecap_ray.evaluation.sample import Captioned, DecodingSpec, caption_images, parse_decoding
from finecap_ray.evaluation.text_metrics import TextMetrics, text_metrics
from finecap_ray.paths import absolute
from finecap_ray.settings_file import read_tree
from finecap_ray.sources import ExampleSet
from finecap_ray.specs import absolute_spec

JUDGE, REWARD_SCORER, HUMAN = "judge", "reward scorer", "human"
NO_JUDGE = (
    "no judge was given, so nothing but the reward scorer (or nobody) says whether captions tell images apart: "
    "give --judge a scorer that had no part in the reward"
)
NO_IMAGES = "no images were given with the references, so nothing says whether captions tell images apart"
SEVERAL = "{count} of {images} images have several captions: the caption metrics and CLIPScore are those of the first"


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be evaluated; one of `captions` and `checkpoint` is None."""

    captions: str | None  # file, as `read_captions` takes it
    checkpoint: str | None  # captioner folder
    splits: tuple[str, ...] | None  # of the examples; None: those of evaluation.groups, or the images of the file
    judge: str | None  # what load_scorer takes
    reward_scorer: str | None
    captions_out: str | None = None  # file for the captions of the checkpoint, as `read_captions` takes it


@dataclass(frozen=True, slots=True)
class _Images:
    examples: ExampleSet
    rows: list[dict[str, Any]]  # to evaluate on, without their pictures
    others: list[dict[str, Any]]  # that may compete
    left_out: dict[str, int]

    def pictures(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        return self.examples.pictures([row["row"] for row in rows])


def evaluate(settings: Settings, request: Request) -> dict[str, Any]:
    """The results as JSON can hold them; see the README for their keys.

    Raises ConfigError for a request that names both or neither of captions and checkpoint, DataError for captions and images
    that don't fit.
    """
    started = time.perf_counter()
    if (request.captions is None) == (request.checkpoint is None):
        raise ConfigError("give either captions (a file) or a checkpoint")
    given = None if request.captions is None else read_captions(request.captions)
    evaluation = settings.evaluation
    decoding = parse_decoding(evaluation.decoding, evaluation.temperature)
    found = _examples(settings, request, given)
    rows, others, left_out = found.rows, found.others, found.left_out
    find_all_pools(settings, rows, others)  # a mistake in them is told before an engine starts

    if given is None:
        connect_to_caption(settings.resources)
    else:
        connect(settings.resources)
    asked = ((JUDGE, request.judge), (REWARD_SCORER, request.reward_scorer))
    scorers = {name: absolute_spec(spec) for name, spec in asked if spec}
    sampled = None
    if given is None:
        with started_judges(scorers, settings.resources) as actors:
            judge_facts(
                actors, settings.resources
            )  # before captions are made, which can take hours; and their GPU is needed then
        sampled = _sample(settings, rows, found.pictures(rows), absolute(request.checkpoint), decoding)
        left_out |= {f"images: {reason}": count for reason, count in sampled.left_out.items()}
        given = {image_id: [caption] for image_id, caption in sampled.captions.items()}
        if request.captions_out is not None:
            text = json.dumps(sampled.captions, indent=1, ensure_ascii=False)
            Path(request.captions_out).write_text(text + "\n", encoding="utf-8")
        rows = [row for row in rows if row["image_id"] in given]
    given = {row["image_id"]: given[row["image_id"]] for row in rows}
    asked_at = time.perf_counter()
    pools, incomplete = find_all_pools(settings, rows, others)
    competing = {image_id for own in pools for pool in own.pools for image_id in pool.image_ids}
    shown = rows + [row for row in others if row["image_id"] in competing]
    human = {row["image_id"]: list(row["captions"]) for row in rows if row["captions"]}
    answers = {}
    with started_judges(scorers, settings.resources) as actors:
        facts = judge_facts(actors, settings.resources)
        pictures = (
            None if all(_has_features(own, sampled) for own in facts.values()) else ray.put(found.pictures(shown))
        )
        for name, actor in actors.items():
            answers[name] = [
                _show(actor, facts[name], shown, pictures, sampled),  # whose error is the one to tell
                actor.answer.remote(given, human, pools, evaluation.bootstrap_samples, settings.seed),
            ]
        metrics = _text_metrics(settings, given, rows, found)
        answers = {
            name: work_within(own, settings.resources, f"the {name}", "judge")[1] for name, own in answers.items()
        }

    ended = {} if sampled is None else {"ended": sampled.ended}
    return _results(settings, request.captions or request.checkpoint, given, metrics) | {
        "warnings": [*_judge_warnings(facts), *_several(given)],
        "left_out": left_out | incomplete,
        "retrieval": [
            {"captions": whose, "by": name} | numbers
            for name, reply in answers.items()
            for whose, own in (("evaluated", reply.retrieval), (HUMAN, reply.human))
            for numbers in own
        ],
        "caption_metrics": metrics.values | ended,
        "similarity": {name: reply.similarity for name, reply in answers.items()},
        "scorers": {name: {"spec": scorers[name], "digest": own.digest} for name, own in facts.items()},
        "captioner": None
        if sampled is None
        else {"weights": sampled.weights, "tower": sampled.tower_digest, "max_tokens": sampled.max_tokens},
        "seconds": {
            "engine start": sampled.engine_start_s if sampled else 0.0,
            "sampling": sampled.seconds if sampled else 0.0,
            "caption metrics": metrics.seconds,
            "scoring and metrics": time.perf_counter() - asked_at,
            "together": time.perf_counter() - started,
        },
    }


def evaluate_texts(settings: Settings, captions: str, references: str) -> dict[str, Any]:
    """Caption metrics of a captions file against a file of references, without images: the same results, with no retrieval.

    Raises DataError where no caption has a reference.
    """
    given, human = read_captions(captions), read_references(references)
    both = {image_id: own for image_id, own in given.items() if image_id in human}
    if not both:
        raise DataError(
            f"none of the {len(given)} captions of {captions} has a reference in {references}: the ids are such as "
            f"{next(iter(given))!r} there and {next(iter(human))!r} here"
        )
    first = {image_id: own[0] for image_id, own in both.items()}
    metrics = text_metrics(settings.evaluation, first, human)
    left_out = {
        "captions without a reference": len(given) - len(both),
        "references without a caption": len(human) - len(both),
    }
    return _results(settings, captions, both, metrics) | {
        "references": references,
        "warnings": [NO_IMAGES, *_several(both)],
        "left_out": {reason: count for reason, count in left_out.items() if count},
        "seconds": {"caption metrics": metrics.seconds},
    }


def _results(
    settings: Settings, evaluated: str, captions: Mapping[str, Sequence[str]], metrics: TextMetrics
) -> dict[str, Any]:
    """What the results of every evaluation hold, those of one without images as they are."""
    return {
        "evaluated": evaluated,
        "images": len(captions),
        "warnings": [],
        "left_out": {},
        "retrieval": [],
        "caption_metrics": metrics.values,
        "similarity": {},
        "not_available": metrics.not_available,
        "tokenisation": settings.evaluation.tokenisation,
        "scorers": {},
        "captioner": None,
        "seconds": {},
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json", include={"seed", "data", "tower", "evaluation"}),
        "versions": versions(),
    }


def default_scorers(settings: Settings, captioner: str | None) -> tuple[str | None, str | None]:
    """Judge and reward scorer of the settings or, where those are trained, of the run that a captioner lies in; without a
    captioner, of the run of the settings, if it is of these examples."""
    folder = _run_on(settings) if captioner is None else run_folder(captioner)
    specs = []
    for name, scorer in (("judge", settings.judge), ("scorer", settings.scorer)):
        trained = None if folder is None else folder / name
        specs.append(scorer.spec or (str(trained) if trained is not None and trained.is_dir() else None))
    return specs[0], specs[1]


def _run_on(settings: Settings) -> Path | None:
    """The run folder of the settings, where it holds a run on their examples."""
    folder = Path(absolute(settings.run_dir))
    if not (folder / "config.yaml").is_file():
        return None
    made_with = (read_tree(folder / "config.yaml").get("data") or {}).get("examples", "")
    return folder if absolute(made_with) == absolute(settings.data.examples) else None


def find_all_pools(
    settings: Settings, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> tuple[list[PoolSet], dict[str, int]]:
    """The pools of every specification in evaluation.against, and what was left out by reason.

    Where two specifications give pools of one name, such as two files of bags of five, theirs stand before it.
    """
    ids, more = ([row["image_id"] for row in part] for part in (rows, others))
    found = {one: find_pools(one, ids, settings.seed, more) for one in settings.evaluation.against}
    left_out = sum((Counter(one.left_out) for one in found.values()), Counter())
    named = Counter(own.name for one in found.values() for own in one.sets)
    sets = [
        own if named[own.name] == 1 else replace(own, name=f"{spec}: {own.name}")
        for spec, one in found.items()
        for own in one.sets
    ]
    return sets, dict(left_out)


def _examples(settings: Settings, request: Request, given: Mapping[str, Sequence[str]] | None) -> _Images:
    """The images to evaluate on: of the splits, and those that a captions file has captions of. Of a file also the others of the
    splits, which may compete in its bags."""
    examples = ExampleSet(settings.data.examples)
    every = examples.rows.to_pylist()
    splits = request.splits
    if splits is None and given is None:
        splits = tuple(settings.evaluation.groups.values())
    inside = [row for row in every if splits is None or row["split"] in splits]
    rows = [row for row in inside if given is None or row["image_id"] in given]
    if not rows:
        raise DataError(
            f"no image of {settings.data.examples} is in the splits {', '.join(splits or ('any',))}"
            f"{f' and has a caption in {request.captions}' if given else ''}; its splits are {', '.join(examples.splits())}"
            + (
                f", its ids such as {every[0]['image_id']!r}, those of the file such as {next(iter(given))!r}"
                if given
                else ""
            )
        )
    absent = [] if given is None else sorted(given.keys() - {row["image_id"] for row in every})
    if absent:
        raise DataError(
            f"{len(absent)} of {len(given)} captions are of images that {settings.data.examples} doesn't hold, such as "
            f"{', '.join(absent[:5])}"
        )
    left_out = {}
    if given is not None:
        left_out["captions of images in other splits"] = len(given) - len(rows)
        if splits is not None:
            left_out["images without a caption in the file"] = len(inside) - len(rows)
    return _Images(
        examples,
        rows,
        [] if given is None else [row for row in inside if row["image_id"] not in given],
        {reason: count for reason, count in left_out.items() if count},
    )


def _sample(
    settings: Settings, rows: list[dict[str, Any]], pictures: list[bytes], checkpoint: str, decoding: DecodingSpec
) -> Captioned:
    return caption_images(
        [row["image_id"] for row in rows],
        pictures,
        checkpoint,
        settings.tower,
        decoding,
        settings.resources,
        settings.seed,
        settings.evaluation.batch_size,
        settings.data.max_bad_fraction,
    )


def _has_features(facts: JudgeFacts, sampled: Captioned | None) -> bool:
    """Whether the captioner's tower, whose features are there already, is the scorer's own."""
    return sampled is not None and sampled.tower_digest is not None and facts.tower_digest == sampled.tower_digest


def _show(
    actor: ActorHandle,
    facts: JudgeFacts,
    rows: list[dict[str, Any]],
    pictures: ray.ObjectRef | None,
    sampled: Captioned | None,
) -> ray.ObjectRef:
    """The images, as features where that does."""
    ids = [row["image_id"] for row in rows]
    if _has_features(facts, sampled):
        return actor.show.remote(ids, None, np.stack([sampled.features[image_id] for image_id in ids]))
    return actor.show.remote(ids, pictures, None)


def _text_metrics(
    settings: Settings, given: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]], found: _Images
) -> TextMetrics:
    human = {row["image_id"]: row["captions"] for row in rows}
    images = None
    if settings.evaluation.vlm_judge:
        images = dict(zip(human, found.pictures(rows), strict=True))
    return text_metrics(settings.evaluation, {image_id: own[0] for image_id, own in given.items()}, human, images)


def _several(captions: Mapping[str, Sequence[str]]) -> list[str]:
    count = sum(len(own) > 1 for own in captions.values())
    return [SEVERAL.format(count=count, images=len(captions))] if count else []


def _judge_warnings(facts: Mapping[str, JudgeFacts]) -> list[str]:
    if JUDGE not in facts:
        return [NO_JUDGE]
    if REWARD_SCORER in facts and facts[JUDGE].digest == facts[REWARD_SCORER].digest:
        return [SAME_SCORER.format(digest=facts[JUDGE].digest)]
    return []
