"""Captions of a checkpoint for evaluation: a Ray Data pipeline through a pool of actors, each with a vLLM engine.

encoded images (--tower--> features) --vLLM--> captions     (a batch at a time, in the order of the images)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from finecap_ray.captioning import ImageCaptioner, open_checkpoint, sampling_spec
from finecap_ray.cluster import work_within
from finecap_ray.config import ResourceSettings, TowerSettings
from finecap_ray.errors import ConfigError, DataError, UnsupportedError
from finecap_ray.records import Rollout, vectors
from finecap_ray.sampling.seeds import caption_seed


@dataclass(frozen=True, slots=True)
class DecodingSpec:
    """Greedy, or of n samples the one that the captioner finds most probable, at the temperature that they are drawn at."""

    n: int = 1
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Captioned:
    """One caption per image that could be read."""

    captions: dict[str, str]  # image id -> caption
    features: dict[str, np.ndarray]  # image id -> [F] float16, of the captioner's frozen tower; empty where it has none
    tower_digest: str | None
    ended: float  # share of the captions that end with the end token, and not at the token limit
    weights: str  # digest of the captioner
    max_tokens: int  # at which captions were cut
    left_out: dict[str, int]  # images by reason
    engine_start_s: float  # before the first batch; not in `seconds`
    seconds: float


def parse_decoding(text: str, temperature: float) -> DecodingSpec:
    """`greedy`, or `best:N` (N samples at `temperature`). Raises ConfigError for another form, UnsupportedError for beam search."""
    kind, _, count = text.partition(":")
    if kind == "beam":
        raise UnsupportedError(
            "an evaluation captions greedily, or takes the best of N samples (best:N); `finecap caption --beam` searches, where "
            "the captioner is an image-text model"
        )
    if kind == "best" and count.isdigit() and int(count) >= 2:
        return DecodingSpec(int(count), temperature)
    if text != "greedy":
        raise ConfigError(f"decoding {text!r} is unknown: greedy, or best:N with N of 2 or more")
    return DecodingSpec()


class CaptionActor:
    """Ray Data batch: image_id, image -> caption and features, or the reason why there are none."""

    def __init__(
        self, checkpoint: str, tower: TowerSettings, decoding: DecodingSpec, resources: ResourceSettings, seed: int
    ) -> None:
        opened = open_checkpoint(checkpoint, tower)
        self.facts, self.seed = opened.facts, seed
        self.tower_digest = None if opened.tower is None else opened.tower.digest
        self.spec = sampling_spec(decoding.n, decoding.temperature, None, opened.facts)
        self.captioner = ImageCaptioner(opened, tower.batch_size, resources)
        self.captioner.warm_up()
        self.ready_at = time.time()

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        prepared, reasons = [], []
        for image in batch["image"]:
            try:
                prepared.append(self.captioner.prepare(image))
                reasons.append(None)
            except DataError:
                reasons.append("undecodable")
        good = [image_id for image_id, reason in zip(batch["image_id"], reasons, strict=True) if reason is None]
        features, several = [], []
        if good:
            inputs = self.captioner.engine_inputs(prepared)
            seeds = [caption_seed(self.seed, 0, image_id) for image_id in good]
            several = self.captioner.caption_inputs(good, inputs, [self.spec] * len(good), seeds)
            features = [None] * len(good) if self.tower_digest is None else inputs
        chosen = [max(rollouts, key=lambda rollout: sum(rollout.logprobs)) for rollouts in several]
        rows = dict(zip(good, zip(chosen, features, strict=True), strict=True))
        return self._table(list(batch["image_id"]), reasons, rows)

    def _table(
        self, image_ids: list[str], reasons: list[str | None], rows: dict[str, tuple[Rollout, np.ndarray | None]]
    ) -> pa.Table:
        found = [rows.get(image_id) for image_id in image_ids]
        return pa.table(
            {
                "image_id": pa.array(image_ids, pa.string()),
                "caption": pa.array([own and own[0].text for own in found], pa.string()),
                "ended": pa.array([own and own[0].finish_reason == "stop" for own in found], pa.bool_()),
                "features": pa.array([own and own[1] for own in found], pa.list_(pa.float16())),
                "reason": pa.array(reasons, pa.string()),
                "tower_digest": pa.array([self.tower_digest] * len(found), pa.string()),
                "weights": [self.facts.weights] * len(found),
                "max_tokens": [self.spec.max_tokens] * len(found),
                "ready_at": [self.ready_at] * len(found),
            }
        )


def caption_images(
    image_ids: Sequence[str],
    images: Sequence[bytes],
    checkpoint: str,
    tower: TowerSettings,
    decoding: DecodingSpec,
    resources: ResourceSettings,
    seed: int,
    batch_size: int,
    max_bad_fraction: float,
) -> Captioned:
    """Captions every image. Raises DataError when more than `max_bad_fraction` of them can't be decoded, MismatchError for
    a checkpoint of another tower."""
    called = time.time()
    blocks = [
        pa.table(
            {
                "image_id": pa.array(image_ids[start : start + batch_size], pa.string()),
                "image": pa.array(images[start : start + batch_size], pa.binary()),
            }
        )
        for start in range(0, len(image_ids), batch_size)
    ]
    made = (
        ray.data.from_arrow(blocks)
        .map_batches(
            CaptionActor,
            fn_constructor_args=(checkpoint, tower, decoding, resources, seed),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(min_size=resources.samplers, max_size=resources.samplers),
            num_cpus=1,
            num_gpus=resources.gpus,
        )
        .to_arrow_refs()
    )
    rows = pa.concat_tables(work_within(made, resources, "the caption engines", f"caption {len(image_ids)} images"))
    ended_at = time.time()
    good = rows.filter(pa.compute.is_valid(rows["caption"]))
    left_out = Counter(reason for reason in rows["reason"].to_pylist() if reason)
    check_left_out(left_out, rows.num_rows, max_bad_fraction)
    ids = good["image_id"].to_pylist()
    tower_digest = good["tower_digest"][0].as_py()
    features = {}
    if tower_digest is not None:
        features = dict(zip(ids, vectors(good["features"].combine_chunks()), strict=True))
    ready_at = max(rows["ready_at"].to_pylist())
    return Captioned(
        captions=dict(zip(ids, good["caption"].to_pylist(), strict=True)),
        features=features,
        tower_digest=tower_digest,
        ended=pa.compute.mean(good["ended"].cast(pa.float64())).as_py(),
        weights=good["weights"][0].as_py(),
        max_tokens=good["max_tokens"][0].as_py(),
        left_out=dict(left_out),
        engine_start_s=ready_at - called,
        seconds=ended_at - ready_at,
    )


def check_left_out(left_out: Counter[str], images: int, max_bad_fraction: float) -> None:
    """left_out: reason -> images. Raises DataError where those are too many of all, or all."""
    if left_out.total() == images or left_out.total() > max_bad_fraction * images:
        raise DataError(
            f"{left_out.total()} of {images} images can't be captioned ({', '.join(left_out)}), "
            f"more than data.max_bad_fraction={max_bad_fraction}"
        )
