"""The main job as stages of a run folder: what each stage reads, what it writes, and what it depends on.

    features -> scorer, judge -> bags -> rl -> evaluation -> report
        `-----> mle ---------------------^

The command line, the jobs and `finecap demo` all call these; each stage does its work in Ray processes.
"""

from __future__ import annotations

import hashlib
import json
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import ray
from rich.console import Console

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.build import build_bags
from finecap_ray.bags.embeddings import EmbeddingSet, compared_captions, embed_by_scorer
from finecap_ray.bags.source import bag_source
from finecap_ray.bags.stream import plan_run
from finecap_ray.cluster import check_shared, connect, work_within
from finecap_ray.config import CaptionerSettings, ScorerSettings, Settings, TowerSettings, dump_settings
from finecap_ray.config_models import NAMED_DECODERS
from finecap_ray.doctor import samples_on_gpus
from finecap_ray.errors import MismatchError
from finecap_ray.paths import absolute
from finecap_ray.preflight import check, check_engine
from finecap_ray.progress import Narrator, mle_line, step_line
from finecap_ray.report.assemble import SUMMARY_FILE, assemble_report
from finecap_ray.scorers.embed import FeatureSet, embed_examples
from finecap_ray.sources import ExampleSet
from finecap_ray.sources.examples import is_for_choices
from finecap_ray.sources.files import read_text
from finecap_ray.specs import absolute_spec, spec_inputs
from finecap_ray.stages import StageResult, Stages, alone
from finecap_ray.training.arithmetic import mle_steps

TRAIN_SPLIT = "train"
TRAINING_STAGES = ("mle", "rl")


@dataclass(frozen=True, slots=True)
class ScorerSource:
    spec: str  # what `load_scorer` takes
    digest: str | dict[str, str]  # of what it was made from; of what wasn't made here, as `spec_inputs` says


class Pipeline:
    """The stages of one run; a stage runs those that it needs first."""

    def __init__(self, settings: Settings, stages: Stages, narrator: Narrator) -> None:
        """Connects to Ray. Raises ConfigError for impossible batch arithmetic, adapters or models before that, and DataError for
        a kept stage that was made with other inputs, before anything in the run folder is changed."""
        check(settings)
        self.settings, self.stages, self.narrator = _with_absolute_models(settings), stages, narrator
        self.run_dir = Path(absolute(settings.run_dir))
        self.logs = str(self.run_dir / "logs")
        if rehearsal := stages.rehearsal():
            rehearsed = copy(self)
            rehearsed.stages, rehearsed.examples = rehearsal, self.examples  # which are read for their digest once
            _ = rehearsed.rl
        with alone(self.run_dir):
            (self.run_dir / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
        connect(settings.resources)
        check_shared(self.run_dir, settings.resources)

    @classmethod
    def narrated(cls, settings: Settings, console: Console, redo: bool = False) -> Pipeline:
        """A pipeline that says on the console what it does. With `redo` even training starts anew where its inputs changed."""
        narrator = Narrator(console)
        kept = () if redo else TRAINING_STAGES
        return cls(settings, Stages(absolute(settings.run_dir), narrator.started, narrator.ended, kept), narrator)

    @cached_property
    def examples(self) -> ExampleSet:
        return ExampleSet(self.settings.data.examples)

    @cached_property
    def features(self) -> FeatureSet:
        return FeatureSet(self._features.folder)

    @cached_property
    def _features(self) -> StageResult:
        settings = self.settings
        return self.stages.run(
            "features",
            {
                "examples": self.examples.digest,
                "tower": settings.tower.model_dump(exclude={"batch_size", "rows_per_file"})
                | {"weights": _weights_inputs(settings.tower)},
            },
            lambda out: embed_examples(self.examples, out, settings.tower, settings.data, settings.resources),
        )

    @cached_property
    def scorer(self) -> ScorerSource:
        """The reward scorer."""
        return self._scorer("scorer", self.settings.scorer)

    @cached_property
    def judge(self) -> ScorerSource:
        """The scorer that evaluates, and never rewards."""
        return self._scorer("judge", self.settings.judge)

    @cached_property
    def mle(self) -> StageResult:
        """The captioner trained by maximum likelihood: where RL starts."""
        from finecap_ray.training.mle import METRICS_FILE, CaptionedImages, MleJob, drop_checkpoints, train_mle

        def captioned(rows: list[dict]) -> CaptionedImages:
            return CaptionedImages(self._matrix(rows), [row["captions"] for row in rows])

        def work(out: Path) -> None:
            rows = self.rows(TRAIN_SPLIT)
            dev = _by_hash(self.rows_for_choices())[: mle.dev_images] if mle.evaluations else []
            job = MleJob(
                self.settings,
                captioned(rows),
                captioned(dev) if dev else None,
                self.features.tower_digest,
                str(out),
                self.logs,
            )
            steps = mle_steps(mle, sum(len(row["captions"]) for row in rows))
            with self.narrator.steps(out / METRICS_FILE, steps, mle_line):
                train_mle(job)

        mle = self.settings.mle
        if mle.epochs == 0:
            return self._start
        inputs = {
            "features": self._features.digest,
            "captioner": _captioner_inputs(self.settings.captioner),
            "mle": mle.model_dump(),
            "seed": self.settings.seed,
        }
        result = self.stages.run("mle", inputs, work)
        if not result.cached:  # not before the stage counts as done
            drop_checkpoints(result.folder)
        return result

    @cached_property
    def _start(self) -> StageResult:
        """`captioner.spec` as a folder of its own, with its prompt, image size and longest caption."""

        def work(out: Path) -> None:
            saving = _save_start.remote(self.settings.captioner, str(out))
            work_within(saving, self.settings.resources, "the process that loads the captioner", "save it")

        return self.stages.run("mle", {"captioner": _captioner_inputs(self.settings.captioner)}, work)

    def bags(self, split: str) -> StageResult:
        """The bag set of a split: every size for training, the evaluation's for the others."""
        settings = self.settings
        training = split == TRAIN_SPLIT
        sizes = settings.bags.sizes if training else settings.evaluation.bag_sizes
        # Evaluation bags are disjoint look-alikes, also beside a control.
        changes = {} if training else {"max_bags_per_image": 1, "kind": "look_alike"}
        bag_settings = settings.bags.model_copy(update=changes)

        self.examples.split(split)  # an unknown split is told of before any work
        embedded = self._embeddings(compared_captions(bag_settings))

        def work(out: Path) -> None:
            embeddings = EmbeddingSet(embedded.folder)
            with bag_source(self.examples, self.features, embeddings, split, out) as source:
                build_bags(source, out, sizes, bag_settings, settings.seed)

        inputs = {
            "features": self._features.digest,
            "scorer": self.scorer.digest,
            "split": split,
            "sizes": sizes,
            "bags": bag_settings.model_dump(),
            "listed": bag_settings.truematch
            and hashlib.sha256(read_text(bag_settings.truematch).encode()).hexdigest()[:16],
            "seed": settings.seed,
        }
        return self.stages.run(f"bags/{split}", inputs, work)

    @cache  # noqa: B019 (a pipeline lives as long as its process)
    def _embeddings(self, captions: str | None) -> StageResult:
        """Of all examples by the reward scorer; `captions` as `compared_captions` says."""

        def work(out: Path) -> None:
            embed_by_scorer(self.examples, self.features, self.scorer.spec, captions, self.settings.resources, out)

        inputs = {
            "features": self._features.digest,
            "rows_per_page": self.settings.tower.rows_per_file,  # of which a file is made
            "scorer": self.scorer.digest,
            "captions": captions,
        }
        return self.stages.run(f"embeddings/{captions or 'images'}", inputs, work)

    @cached_property
    def rl(self) -> StageResult:
        from finecap_ray.training.loop import train_rl

        check_engine(self.settings.resources.use_gpu, samples_on_gpus())
        bags = self.bags(TRAIN_SPLIT)
        inputs = {
            "mle": self.mle.digest,
            "bags": bags.digest,
            "scorer": self.scorer.digest,
            "rl": self.settings.rl.model_dump(exclude={"save_every", "keep_checkpoints", "drift_bound", "num_workers"}),
            "seed": self.settings.seed,
        }

        def work(out: Path) -> None:
            references = [row["captions"] for row in self.rows(TRAIN_SPLIT)]
            steps = len(plan_run(read_manifest(bags.folder), self.settings.rl, self.settings.seed))
            with self.narrator.steps(out / "metrics.jsonl", steps, step_line):
                train_rl(self.settings, str(self.mle.folder), str(bags.folder), self.scorer.spec, references, str(out))

        return self.stages.run("rl", inputs, work)

    @cached_property
    def evaluation(self) -> StageResult:
        """The start and the result of RL on held-out bags, by the judge and by the reward scorer."""
        from finecap_ray.evaluation.benchmarks import evaluate_run

        groups = {name: self.bags(split) for name, split in self.settings.evaluation.groups.items()}
        inputs = {
            "judge": self.judge.digest,
            "captioners": {"mle": self.mle.digest, "rl": self.rl.digest},
            "bags": {name: bags.digest for name, bags in groups.items()},
            "evaluation": self.settings.evaluation.model_dump(
                include={"bag_size", "more_bag_sizes", "groups", "bootstrap_samples"}
            ),
            "sampler_dtype": self.settings.resources.sampler_dtype,
        }
        return self.stages.run(
            "evaluation",
            inputs,
            lambda out: evaluate_run(
                self.settings,
                {name: str(bags.folder) for name, bags in groups.items()},
                {"mle": str(self.mle.folder), "rl": str(self.rl.folder / "captioner")},
                judge=self.judge.spec,
                scorer=self.scorer.spec,
                out=out,
                logs=self.logs,
            ),
        )

    def rows(self, split: str) -> list[dict]:
        """Id, captions and split of the examples of a split that have features. Raises DataError when there are none."""
        found = self.examples.split(split).to_pylist()
        return [row for row in found if row["image_id"] in self.features.image_ids]

    def _matrix(self, rows: list[dict]) -> np.ndarray:
        return self.features.matrix([row["image_id"] for row in rows])

    def _scorer(self, name: str, scorer: ScorerSettings) -> ScorerSource:
        if scorer.spec is not None:
            return ScorerSource(absolute_spec(scorer.spec), spec_inputs(scorer.spec))

        def work(out: Path) -> None:
            rows, dev = _half(self.rows(TRAIN_SPLIT), scorer.half), self.rows_for_choices()
            training = _train_scorer.options(num_gpus=self.settings.resources.gpus).remote(
                scorer,
                self.settings.tower,
                self.examples if scorer.looks_at_images else None,
                (rows, self._matrix(rows)),
                (dev, self._matrix(dev)),
                str(out),
                self.settings.resources.threads,
            )
            facts = work_within(training, self.settings.resources, f"the process of the {name}", "train it")
            if facts["tower_digest"] not in ("", self.features.tower_digest):
                raise MismatchError(
                    f"features were made by tower {self.features.tower_digest}, the scorer was built on {facts['tower_digest']}: "
                    f"remove {self.features.folder}, and they are made again"
                )

        result = self.stages.run(name, {"features": self._features.digest, "scorer": scorer.model_dump()}, work)
        return ScorerSource(str(result.folder), result.digest)

    def rows_for_choices(self) -> list[dict]:
        """Of every split that recipes may be chosen on."""
        return [row for split in self.examples.splits() if is_for_choices(split) for row in self.rows(split)]

    def summary(self) -> dict:
        """Of the evaluation, and the seconds of every stage that was asked for."""
        summary = json.loads((self.evaluation.folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        return summary | {"seconds": {result.name: round(result.seconds, 1) for result in self.stages.results}}

    def write_report(self, summary: dict) -> None:
        """summary.json and report.html, in the run folder."""
        (self.run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2), encoding="utf-8")
        assemble_report(self.run_dir, self.settings, summary)


def _weights_inputs(tower: TowerSettings) -> str | dict[str, str]:
    return spec_inputs(tower.weights) if tower.weights.endswith(".safetensors") else tower.weights


def _captioner_inputs(captioner: CaptionerSettings) -> dict:
    return captioner.model_dump() | {
        "spec": captioner.spec and spec_inputs(captioner.spec),
        "decoder": captioner.decoder if captioner.decoder in NAMED_DECODERS else spec_inputs(captioner.decoder),
    }


def _with_absolute_models(settings: Settings) -> Settings:
    """Local models as processes elsewhere find them."""
    tower, captioner = settings.tower, settings.captioner
    changed = {"spec": captioner.spec and absolute_spec(captioner.spec)}
    if captioner.decoder not in NAMED_DECODERS:
        changed["decoder"] = absolute_spec(captioner.decoder)
    if tower.weights.endswith(".safetensors"):
        tower = tower.model_copy(update={"weights": absolute_spec(tower.weights)})
    return settings.model_copy(update={"tower": tower, "captioner": captioner.model_copy(update=changed)})


def _half(rows: list[dict], half: str) -> list[dict]:
    """The first or second half by image id: reward scorer and judge don't see the same images."""
    rows = _by_hash(rows)
    middle = len(rows) // 2
    return {"first": rows[:middle], "second": rows[middle:], "all": rows}[half]


def _by_hash(rows: list[dict]) -> list[dict]:
    """In an order that has nothing to do with what the images show, and is the same whatever other images there are."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["image_id"].encode()).digest())


@ray.remote(num_cpus=1, max_retries=0, max_calls=1)
def _save_start(captioner: CaptionerSettings, out: str) -> None:
    from finecap_ray.captioners import load_captioner

    for part in load_captioner(captioner.spec, captioner):
        part.save_pretrained(out)


@ray.remote(num_cpus=1, max_retries=0, max_calls=1)
def _train_scorer(
    settings: ScorerSettings,
    tower: TowerSettings,
    examples: ExampleSet | None,
    train: tuple[list[dict], np.ndarray],
    dev: tuple[list[dict], np.ndarray],
    out: str,
    threads: int,
) -> dict:
    """train, dev: rows and their features, [N, F] float16. `examples` where the images themselves are looked at."""
    import torch

    from finecap_ray.scorers.images import CaptionedFeatures
    from finecap_ray.scorers.tower import load_tower
    from finecap_ray.scorers.train import train_scorer

    torch.set_num_threads(threads)
    read = [
        CaptionedFeatures(
            torch.from_numpy(features.astype(np.float32)),
            [row["captions"] for row in rows],
            () if examples is None else examples.pictures([row["row"] for row in rows]),
        )
        for rows, features in (train, dev)
    ]
    return train_scorer(settings, load_tower(tower), *read, Path(out))
