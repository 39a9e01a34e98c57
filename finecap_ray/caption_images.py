"""`finecap caption`: image files -> captions, a batch at a time through a pool of actors, each with a caption engine.

    files --read--> encoded images --actor: engine, scorer--> captions --> standard output, parquet or JSON lines

At no time are all images or captions in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from finecap_ray.captioning import ImageCaptioner, connect_to_caption, open_checkpoint, sampling_spec
from finecap_ray.config import ResourceSettings, Settings, TowerSettings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.images import decode_image
from finecap_ray.records import Rollout
from finecap_ray.sampling.seeds import caption_seed
from finecap_ray.sources.folder import IMAGE_SUFFIXES
from finecap_ray.specs import absolute_spec

_NAMED = 10  # files that an error lists
_ROWS_TOGETHER = 1024  # written at a time
_UNREADABLE, _UNDECODABLE = "unreadable", "undecodable"
_SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "captions": pa.list_(pa.string()),
        "logprobs": pa.list_(pa.float32()),  # of the whole caption, in nats
        "scores": pa.list_(pa.float32()),  # cosine by the scorer; null without one
    }
)
_ANSWER = _SCHEMA.append(pa.field("left_out", pa.string()))


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """What is asked of every image. `best` and `beam` exclude each other: what they find is ranked, and n captions are kept."""

    n: int = 1
    temperature: float | None = None  # None: 0 (greedy) for one caption, 1 for several
    max_tokens: int | None = None  # None: what the captioner was trained with
    best: int | None = None  # of so many samples
    beam: int | None = None  # width of a beam search
    scorer: str | None = None  # ranks by the cosine with the image; None: the captioner's own log-prob does

    @property
    def candidates(self) -> int:
        return self.best or self.beam or self.n

    def check(self) -> None:
        """Raises ConfigError for what excludes each other."""
        if self.best is not None and self.beam is not None:
            raise ConfigError("--best ranks samples and --beam searches: give one of them")
        if self.beam is not None and self.temperature is not None:
            raise ConfigError("a beam search samples nothing: leave out --temperature")
        if self.n > self.candidates:
            raise ConfigError(
                f"n={self.n} captions can't be kept of {self.candidates}: ask for as many in --best or --beam"
            )
        if self.scorer is not None and self.candidates < 2:
            raise ConfigError("a scorer has nothing to choose from: give --best, --beam or several captions (-n)")


def image_files(paths: Sequence[str]) -> list[str]:
    """The files, and the image files of the folders with their subfolders, by name. Raises DataError for a folder without any."""
    found = []
    for path in paths:
        if not Path(path).is_dir():
            found.append(path)
            continue
        inside = sorted(one for one in Path(path).rglob("*") if one.suffix[1:].lower() in IMAGE_SUFFIXES)
        if not inside:
            raise DataError(
                f"no image in {path}: looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and its subfolders"
            )
        found += map(str, inside)
    return found


def check_images(paths: Sequence[str]) -> None:
    """Raises DataError naming the files that aren't images: for few files, before anything starts."""
    reasons = [(path, _problem(path)) for path in paths]
    bad = [f"  {path}: {reason}" for path, reason in reasons if reason]
    if bad:
        raise DataError(f"{len(bad)} of {len(paths)} files can't be captioned:\n" + "\n".join(bad))


def caption_files(
    paths: Sequence[str], captioner: str, settings: Settings, request: CaptionRequest
) -> Iterator[dict[str, Any]]:
    """Of each image a row: image (its path), captions, logprobs, scores; in the order of the paths.

    Raises DataError at the end where more than data.max_bad_fraction of the images can't be read, naming the first ten.
    """
    request.check()
    if request.scorer is not None:
        from finecap_ray.scorers.scorer import check_scorer

        check_scorer(request.scorer)
        request = replace(request, scorer=absolute_spec(request.scorer))
    connect_to_caption(settings.resources)
    resources, batch_size = settings.resources, settings.evaluation.batch_size
    blocks = [
        pa.table({"image": list(paths[start : start + batch_size])}) for start in range(0, len(paths), batch_size)
    ]
    answers = (
        ray.data.from_arrow(blocks)
        .map_batches(_read, fn_args=(str(Path.cwd()),), batch_size=batch_size, batch_format="pyarrow")
        .map_batches(
            FileCaptioner,
            fn_constructor_args=(captioner, settings.tower, resources, request, settings.seed),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.samplers),
            num_cpus=1,
            num_gpus=resources.gpus,
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    bad: list[tuple[str, str]] = []
    for table in answers:
        for row in table.to_pylist():
            reason = row.pop("left_out")
            if reason is None:
                yield row
            else:
                bad.append((row["image"], reason))
    if len(bad) > settings.data.max_bad_fraction * len(paths):
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in bad).items())
        raise DataError(
            f"{len(bad)} of {len(paths)} files can't be captioned ({counts}), more than data.max_bad_fraction="
            f"{settings.data.max_bad_fraction}; the first are\n" + "\n".join(f"  {path}" for path, _ in bad[:_NAMED])
        )


def write_captions(rows: Iterator[dict[str, Any]], out: str | Path) -> int:
    """Writes rows as they come, parquet or JSON lines by the name's suffix, and returns their number.

    The file has its name once it is whole; the rows before an error are kept beside it. Raises ConfigError for another suffix.
    """
    check_out(out)
    target, count = Path(out), 0
    unfinished = target.with_name(f".{target.name}.unfinished")
    parquet = target.suffix == ".parquet"
    waiting: list[dict[str, Any]] = []

    def write() -> None:
        if parquet:
            file.write_table(pa.Table.from_pylist(waiting, _SCHEMA))
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in waiting)
        waiting.clear()

    with pq.ParquetWriter(unfinished, _SCHEMA) if parquet else unfinished.open("w", encoding="utf-8") as file:
        try:
            for row in rows:
                waiting.append(row)
                count += 1
                if len(waiting) == _ROWS_TOGETHER:
                    write()
        except DataError as error:
            raise DataError(f"{error}\n{count} images that were captioned are in {unfinished}") from error
        finally:
            if waiting:
                write()
    unfinished.replace(target)
    return count


def check_out(out: str | Path) -> None:
    if Path(out).suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out}: give a name that ends in .parquet or .jsonl")


def _read(batch: pa.Table, folder: str) -> pa.Table:
    """Encoded images of paths, relative ones from `folder`; null where a file can't be read."""

    def content(path: str) -> bytes | None:
        try:
            return Path(folder, path).read_bytes()
        except OSError:
            return None

    return batch.append_column("content", pa.array(map(content, batch["image"].to_pylist()), pa.large_binary()))


class FileCaptioner:
    """Ray Data batch: image (path), content -> captions, or the reason why there are none."""

    def __init__(
        self, captioner: str, tower: TowerSettings, resources: ResourceSettings, request: CaptionRequest, seed: int
    ) -> None:
        from finecap_ray.sampling.beam import check_beam
        from finecap_ray.scorers import load_scorer

        checkpoint = open_checkpoint(captioner, tower)
        self.request, self.seed = request, seed
        temperature = 1.0 if request.best and request.temperature is None else request.temperature
        self.spec = sampling_spec(
            1 if request.beam else request.candidates, temperature, request.max_tokens, checkpoint.facts
        )
        if request.beam:
            check_beam(request.beam, checkpoint.family.reads)
        self.scorer = None if request.scorer is None else load_scorer(request.scorer)
        self.captioner = ImageCaptioner(checkpoint, tower.batch_size, resources)

    def __call__(self, batch: pa.Table) -> pa.Table:
        paths, contents = batch["image"].to_pylist(), batch["content"].to_pylist()
        answers: dict[str, dict[str, Any]] = {}
        good, images, prepared = [], [], []
        for path, content in zip(paths, contents, strict=True):
            try:
                if content is None:
                    answers[path] = {"left_out": _UNREADABLE}
                    continue
                prepared.append(self.captioner.prepare(content))
            except DataError:
                answers[path] = {"left_out": _UNDECODABLE}
                continue
            good.append(path)
            images.append(content)
        if good:
            several = self._candidates(good, self.captioner.engine_inputs(prepared))
            answers |= dict(zip(good, self._kept(images, several), strict=True))
        return pa.Table.from_pylist([{"image": path} | answers[path] for path in paths], _ANSWER)

    def _candidates(self, paths: list[str], inputs: Any) -> list[list[Rollout]]:
        if self.request.beam:
            from finecap_ray.sampling.beam import beam_search

            return beam_search(self.captioner.engine, paths, inputs, self.request.beam, self.spec.max_tokens)
        seeds = [caption_seed(self.seed, 0, path) for path in paths]
        return self.captioner.caption_inputs(paths, inputs, [self.spec] * len(paths), seeds)

    def _kept(self, images: list[bytes], several: list[list[Rollout]]) -> Iterator[dict[str, Any]]:
        """Of each image the captions that are kept, the best first where they are ranked: each text once then."""
        scores = None if self.scorer is None else self._scores(images, several)
        for row, rollouts in enumerate(several):
            order = np.arange(len(rollouts))
            logprobs = [sum(rollout.logprobs) for rollout in rollouts]
            if scores is not None:
                order = np.argsort(-scores[row], kind="stable")
            elif self.request.best:
                order = np.argsort(-np.array(logprobs), kind="stable")
            if scores is not None or self.request.best or self.request.beam:
                first = {rollouts[place].text: place for place in order[::-1]}
                order = [place for place in order if first[rollouts[place].text] == place]
            kept = order[: self.request.n]
            yield {
                "captions": [rollouts[place].text for place in kept],
                "logprobs": [logprobs[place] for place in kept],
                "scores": None if scores is None else [float(scores[row][place]) for place in kept],
            }

    def _scores(self, images: list[bytes], several: list[list[Rollout]]) -> list[np.ndarray]:
        """Of each image the cosines of its captions with it."""
        shown = self.scorer.embed_images(images)
        read = iter(self.scorer.embed_texts([rollout.text for rollouts in several for rollout in rollouts]))
        return [
            np.array([float(next(read) @ image) for _ in rollouts])
            for image, rollouts in zip(shown, several, strict=True)
        ]


def _problem(path: str) -> str | None:
    try:
        decode_image(Path(path).read_bytes())
    except (DataError, OSError) as error:
        return str(error)
    return None
