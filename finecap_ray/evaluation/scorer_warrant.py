"""`finecap scorer evaluate`: the warrant of a scorer, measured on images that it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from finecap_ray.cluster import connect, work_within
from finecap_ray.config import Settings
from finecap_ray.errors import DataError
from finecap_ray.evaluation.pools import random_pools
from finecap_ray.evaluation.ranking import place_captions, retrieval_numbers
from finecap_ray.evaluation.warrant import binding_accuracy, kendall_tau, swap_attributes
from finecap_ray.scorers.embed import check_decodable, why_undecodable
from finecap_ray.sources import ExampleSet
from finecap_ray.sources.examples import is_for_choices
from finecap_ray.specs import absolute_spec

_EXPERT_COLUMNS = ("image_id", "caption", "ratings")


@dataclass(frozen=True, slots=True)
class WarrantImages:
    """Images with captions that people wrote; every caption is a question of its own."""

    image_ids: Sequence[str]
    images: Sequence[bytes]
    captions: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Rating:
    image_id: str
    caption: str
    ratings: tuple[int, ...]


def read_ratings(path: str | Path) -> list[Rating]:
    """Human ratings of (image, caption) pairs: a parquet file with image_id, caption and ratings. Raises DataError for another form."""
    try:
        table = pq.read_table(path, columns=list(_EXPERT_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} can't be read: ratings are parquet with {', '.join(_EXPERT_COLUMNS)} ({error})"
        ) from None
    rows = table.to_pylist()
    wrong = sum(
        row["image_id"] is None
        or not isinstance(row["caption"], str)
        or not isinstance(row["ratings"], list)
        or not all(isinstance(own, int) for own in row["ratings"])
        for row in rows
    )
    if wrong:
        raise DataError(
            f"{path}: {wrong} of {len(rows)} rows lack an image, a caption, or a list of ratings in whole numbers"
        )
    return [Rating(str(row["image_id"]), row["caption"], tuple(row["ratings"])) for row in rows]


def measure_scorers(settings: Settings, specs: Mapping[str, str], ratings: str | None) -> dict[str, dict[str, Any]]:
    """The warrant of each scorer (name -> what load_scorer takes) on the images of the dev splits.

    Images that can't be decoded are left out and counted. Raises DataError past `data.max_bad_fraction`, and when no example is
    in a split whose name begins with `dev` or `val`.
    """
    examples = ExampleSet(settings.data.examples)
    rows = examples.rows.to_pylist()
    dev = [row for row in rows if is_for_choices(row["split"])]
    if not dev:
        raise DataError(
            "a scorer is measured on images of a split whose name begins with dev or val, and there is none; the splits are "
            f"{', '.join(examples.splits())}"
        )
    rated = [] if ratings is None else read_ratings(ratings)
    wanted = {rating.image_id for rating in rated}
    shown = _decodable(examples, dev, settings.data.max_bad_fraction)
    pairs = _decodable(examples, [row for row in rows if row["image_id"] in wanted], settings.data.max_bad_fraction)
    connect(settings.resources)
    evaluation, threads = settings.evaluation, settings.resources.threads
    stored = [ray.put(own) for own in (shown, rated, pairs)]
    calls = {
        name: _warrant.options(num_gpus=settings.resources.gpus).remote(
            absolute_spec(spec),
            *stored,
            evaluation.bootstrap_samples,
            settings.seed,
            threads,
        )
        for name, spec in specs.items()
    }
    answers = work_within(list(calls.values()), settings.resources, ", ".join(calls), f"score {len(dev)} images")
    left_out = {"undecodable": len(dev) - len(shown.image_ids)}
    return {name: answer | {"left_out": left_out} for name, answer in zip(calls, answers, strict=True)}


def _decodable(examples: ExampleSet, rows: Sequence[Mapping[str, Any]], max_bad_fraction: float) -> WarrantImages:
    """Those of the rows whose picture can be decoded. Raises DataError where too many can't."""
    pictures = examples.pictures([row["row"] for row in rows])
    reasons = [why_undecodable(picture) for picture in pictures]
    bad = {row["image_id"]: reason for row, reason in zip(rows, reasons, strict=True) if reason is not None}
    check_decodable(bad, len(rows), max_bad_fraction)
    good = [(row, picture) for row, picture in zip(rows, pictures, strict=True) if row["image_id"] not in bad]
    return WarrantImages(
        [row["image_id"] for row, _ in good], [picture for _, picture in good], [row["captions"] for row, _ in good]
    )


@ray.remote(num_cpus=1, max_retries=0, max_calls=1)
def _warrant(
    spec: str,
    dev: WarrantImages,
    ratings: Sequence[Rating],
    pairs: WarrantImages,
    samples: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    import torch

    from finecap_ray.scorers.scorer import load_scorer

    torch.set_num_threads(threads)
    scorer = load_scorer(spec)

    def embed(shown: WarrantImages) -> dict[str, Any]:
        ids = shown.image_ids
        return dict(zip(ids, scorer.embed_images(list(shown.images), ids), strict=True)) if ids else {}

    captions = dict(zip(dev.image_ids, dev.captions, strict=True))
    return {"spec": spec} | measure_warrant(scorer, captions, embed(dev), ratings, embed(pairs), samples, seed)


def measure_warrant(
    scorer: Any,
    captions: Mapping[str, Sequence[str]],
    images: Mapping[str, Any],
    ratings: Sequence[Rating],
    rated: Mapping[str, Any],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """R@1 on 100 random distractors (on all images where there are fewer), tau-b and tau-c, binding, share truncated.

    captions: image id -> its human captions, each a question of its own; images, rated: image id -> embedding [D], unit-norm,
    of the scorer. Raises DataError when no image has a caption.
    """
    import torch

    texts = list(dict.fromkeys(text for own in captions.values() for text in own))
    if not texts:
        raise DataError(f"none of the {len(captions)} dev images has a caption to measure a scorer with")
    place = {text: row for row, text in enumerate(texts)}
    ids = list(images)
    asked = {image_id: [place[text] for text in own] for image_id, own in captions.items()}
    pools = random_pools(ids, min(100, len(ids)), seed)
    rows = {image_id: row for row, image_id in enumerate(ids)}
    placed = place_captions(pools.pools, rows, torch.stack(list(images.values())), asked, scorer.embed_texts(texts))
    warrant: dict[str, Any] = {
        "digest": scorer.digest,
        "logit_scale": scorer.logit_scale,
        "retrieval": retrieval_numbers(pools, placed, samples, seed),
        "truncated": scorer.truncated(texts).mean().item(),
        "captions": len(texts),
    }

    def cosines(pairs: Sequence[tuple[str, str]], embedded: Mapping[str, Any]) -> Any:
        """Of (image id, text)."""
        shown = torch.stack([embedded[image_id] for image_id, _ in pairs])
        return (scorer.embed_texts([text for _, text in pairs]) * shown).sum(dim=-1).numpy()

    own = [(image_id, text) for image_id, several in captions.items() for text in several]
    swaps = [(image_id, text, other) for image_id, text in own if (other := swap_attributes(text)) is not None]
    warrant["binding_captions"] = len(swaps)
    if swaps:
        clean, swapped = (cosines([(swap[0], swap[which]) for swap in swaps], images) for which in (1, 2))
        warrant["binding"] = binding_accuracy(clean, swapped)
    found = [rating for rating in ratings if rating.image_id in rated]
    warrant["rated_captions"], warrant["without_image"] = len(found), len(ratings) - len(found)
    if found:
        liked = cosines([(rating.image_id, rating.caption) for rating in found], rated)
        every = [(score, value) for score, rating in zip(liked, found, strict=True) for value in rating.ratings]
        warrant["tau_b"], warrant["tau_c"] = kendall_tau([score for score, _ in every], [value for _, value in every])
    return warrant


def describe(warrant: Mapping[str, Any]) -> list[str]:
    """A warrant in lines for a person."""
    found = warrant["retrieval"]
    recall = found["recall_at_1"]
    lines = [
        f"digest {warrant['digest']}, logit scale {warrant['logit_scale']:.1f}",
        f"R@1 {100 * recall['value']:.1f} % ({100 * recall['low']:.1f} to {100 * recall['high']:.1f}) of {found['n']} human captions "
        f"among {found['against']} (chance {100 * found['chance']:.3g} %)",
        f"longer than it reads: {100 * warrant['truncated']:.1f} % of {warrant['captions']} captions",
    ]
    if warrant["left_out"]["undecodable"]:
        lines.append(f"left out: {warrant['left_out']['undecodable']} images that can't be decoded")
    if warrant["binding_captions"]:
        lines.append(
            f"binding: prefers {100 * warrant['binding']:.1f} % of {warrant['binding_captions']} captions to their copy with swapped attributes (chance 50 %)"
        )
    else:
        lines.append("binding: no caption has two attributes to swap")
    if warrant["rated_captions"]:
        lines.append(
            f"human ratings: Kendall tau-b {warrant['tau_b']:.3f}, tau-c {warrant['tau_c']:.3f}, of {warrant['rated_captions']} rated captions"
            + (f" ({warrant['without_image']} more have no image here)" if warrant["without_image"] else "")
        )
    elif warrant["without_image"]:
        lines.append(f"human ratings: none of the {warrant['without_image']} rated captions has its image here")
    else:
        lines.append("human ratings: none given (--ratings FILE)")
    return lines
