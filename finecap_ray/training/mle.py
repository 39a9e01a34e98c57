"""Maximum likelihood: the captioner learns to write captions at all. transformers' Trainer under Ray Train.

Where `mle.evaluations` says so, dev images are captioned along the way and the weights with the best CIDEr are the result.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from finecap_ray.captioners.build import build_clipcap
from finecap_ray.captioners.loader import check_features, load_captioner
from finecap_ray.config import Settings
from finecap_ray.errors import DataError
from finecap_ray.precision import autocasts
from finecap_ray.training.arithmetic import mle_steps
from finecap_ray.training.caption_rows import CaptionDataset, LikeLengths
from finecap_ray.training.checkpoints import last_checkpoint
from finecap_ray.training.cpu import TrimHeap, suit_cpu
from finecap_ray.training.logs import MetricsFile, redirect_output
from finecap_ray.training.ray_train import run_workers

METRICS_FILE = "metrics.jsonl"
BEST_METRIC = "eval_CIDEr"
_CAPTIONED_TOGETHER = 250


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """What the frozen tower sees of some images, and what people wrote of them."""

    features: np.ndarray  # [N, F] float16
    captions: list[list[str]]


@dataclass(frozen=True, slots=True)
class MleJob:
    """What an MLE worker needs; it crosses the process boundary as one record."""

    settings: Settings
    train: CaptionedImages
    dev: CaptionedImages | None  # None where nothing is evaluated
    tower_digest: str
    out: str  # folder of the captioner it makes, and of metrics.jsonl
    logs: str


def train_mle(job: MleJob) -> None:
    """Trains a captioner and writes it into `job.out`; goes on from the last checkpoint there. Raises DataError without captions."""
    if not any(job.train.captions):
        raise DataError("MLE needs captions, and no image of the training split has one")
    if job.settings.mle.evaluations and not (job.dev and any(job.dev.captions)):
        raise DataError(
            "mle.evaluations needs images with captions in a split whose name begins with dev or val, and there is none: set it to 0"
        )
    run_workers(_worker, {"job": job}, job.settings.mle.num_workers, job.settings.resources, job.logs)


def _worker(config: dict[str, Any]) -> None:
    job: MleJob = config["job"]
    redirect_output(Path(job.logs) / "mle.log")
    torch.set_num_threads(job.settings.resources.threads)
    run_mle(mle_trainer(job), job)


def mle_trainer(job: MleJob) -> CaptionTrainer:
    """Of a new captioner, or of the one that the settings start from. Raises MismatchError where that maps other features."""
    settings, mle = job.settings, job.settings.mle
    width = job.train.features.shape[1]
    if settings.captioner.spec is None:
        texts = [text for own in job.train.captions for text in own]
        model, processor = build_clipcap(
            settings.captioner, texts, width, job.tower_digest, mle.feature_dropout, settings.seed
        )
        model.model.mapper.standardise(torch.from_numpy(job.train.features))
    else:
        model, processor = load_captioner(settings.captioner.spec)
        check_features(model, job.tower_digest, width)
    model.generation_config.max_new_tokens = settings.captioner.max_tokens
    if not settings.resources.use_gpu:
        suit_cpu(model)
    rows = CaptionDataset(
        job.train.features, job.train.captions, processor, settings.captioner.max_tokens, mle.word_noise
    )
    arguments = mle_arguments(settings, str(_checkpoints(job.out)), len(rows))
    trainer = CaptionTrainer(model.train(), processor, arguments, rows, job.dev, mle.mapper_learning_rate)
    trainer.add_callback(MetricsFile(Path(job.out) / METRICS_FILE))
    if not settings.resources.use_gpu:
        trainer.add_callback(TrimHeap(every=25))
    if mle.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(mle.patience))
    return trainer


def run_mle(trainer: CaptionTrainer, job: MleJob) -> None:
    """Trains from the last checkpoint on, if there is one, and writes the captioner."""
    trainer.train(resume_from_checkpoint=last_checkpoint(_checkpoints(job.out)))
    if trainer.is_world_process_zero():
        # Dropout on the features belongs to this stage alone.
        trainer.model.config.feature_dropout = 0.0
        trainer.model.eval().save_pretrained(job.out)
        trainer.processor.save_pretrained(job.out)


def drop_checkpoints(out: Path) -> None:
    """Of a training that ended, so that nothing goes on from there."""
    shutil.rmtree(_checkpoints(out), ignore_errors=True)


def _checkpoints(out: str | Path) -> Path:
    return Path(out) / "checkpoints"


def mle_arguments(settings: Settings, out: str, captions: int) -> TrainingArguments:
    """Of transformers' Trainer, for that many captions in the training split."""
    mle = settings.mle
    arguments: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1}
    if mle.evaluations:
        every = max(1, mle_steps(mle, captions) // mle.evaluations)
        arguments = {
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": every,
            "save_steps": every,
            "save_total_limit": 2,  # the best and the last
            "load_best_model_at_end": True,
            "metric_for_best_model": BEST_METRIC,
            "greater_is_better": True,
        }
    return TrainingArguments(
        output_dir=out,
        num_train_epochs=mle.epochs,
        per_device_train_batch_size=mle.batch_size,
        learning_rate=mle.learning_rate,
        weight_decay=mle.weight_decay,
        warmup_steps=mle.warmup_fraction,
        lr_scheduler_type="cosine",
        bf16=autocasts(mle.bf16, settings.resources.use_gpu),
        use_cpu=not settings.resources.use_gpu,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        **arguments,
    )


class EpochOrder(TrainerCallback):
    """Tells an order of rows the epoch. In an epoch that several workers resume, neither transformers nor accelerate reaches it."""

    def __init__(self, order: LikeLengths) -> None:
        self._order = order

    def on_epoch_begin(self, args, state, control, **unused: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))


class CaptionTrainer(Trainer):
    """Trains on batches of like length; its evaluation captions images greedily and measures that against people's captions."""

    def __init__(
        self,
        model,
        processor,
        arguments: TrainingArguments,
        rows: CaptionDataset,
        dev: CaptionedImages | None,
        mapper_learning_rate: float | None = None,
    ):
        self.processor, self.dev, self.mapper_learning_rate = processor, dev, mapper_learning_rate
        super().__init__(model, arguments, rows.collate, rows, eval_dataset=dev and dev.captions)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's, with the mapper's parameters in groups of their own where they have their own learning rate."""
        optimizer = super().create_optimizer(model)
        if self.mapper_learning_rate is not None:
            mapper = set(self.model.model.mapper.parameters())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in mapper]
                group["params"] = [parameter for parameter in group["params"] if parameter not in mapper]
                optimizer.add_param_group(group | {"params": own, "lr": self.mapper_learning_rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: CaptionDataset | None = None) -> LikeLengths:
        rows = train_dataset or self.train_dataset
        order = LikeLengths(rows.lengths(), self.args.per_device_train_batch_size, self.args.data_seed)
        self.add_callback(EpochOrder(order))
        return order

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        from finecap_ray.evaluation.captions import caption_metrics

        started = time.perf_counter()
        asked = [row for row, own in enumerate(self.dev.captions) if own]
        # Each worker captions its share; all of them need the whole, to agree on which weights are the best.
        pairs = gather_object(self._captions(asked[self.args.process_index :: self.args.world_size]))
        references = {str(row): self.dev.captions[row] for row in asked}
        found = caption_metrics({str(row): text for row, text in pairs}, references)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _captions(self, rows: list[int]) -> list[tuple[int, str]]:
        model, tokenizer = self.accelerator.unwrap_model(self.model).eval(), self.processor.tokenizer
        prompt = torch.tensor(self.processor.prompt_token_ids(), device=model.device)
        found = []
        for start in range(0, len(rows), _CAPTIONED_TOGETHER):
            own = rows[start : start + _CAPTIONED_TOGETHER]
            tokens = model.generate(
                input_ids=(ids := prompt.expand(len(own), -1)),
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(self.dev.features[own]).float().to(model.device),
                max_new_tokens=self.train_dataset.max_tokens,
                do_sample=False,
            )
            texts = tokenizer.batch_decode(tokens[:, len(prompt) :], skip_special_tokens=True)
            found += zip(own, texts, strict=True)
        model.train()
        return found
