"""Maximum likelihood: the captioner learns to write captions at all. transformers' Trainer under Ray Train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from finecap_ray.captioners.build import build_clipcap
from finecap_ray.captioners.loader import check_features, load_captioner
from finecap_ray.config import Settings
from finecap_ray.errors import DataError
from finecap_ray.training.logs import MetricsFile, redirect_output
from finecap_ray.training.ray_train import run_workers


@dataclass(frozen=True, slots=True)
class MleJob:
    """What an MLE worker needs; it crosses the process boundary as one record."""

    settings: Settings
    features: np.ndarray  # [N, F] float16
    captions: list[list[str]]
    tower_digest: str
    out: str  # folder of the captioner it makes
    logs: str


def train_mle(job: MleJob) -> None:
    """Trains a captioner and writes it into `job.out`. Raises DataError when no image has a caption."""
    if not any(job.captions):
        raise DataError("MLE needs captions, and no image of the training split has one")
    run_workers(_worker, {"job": job}, job.settings.mle.num_workers, job.settings.resources, job.logs)


def _worker(config: dict[str, Any]) -> None:
    job: MleJob = config["job"]
    settings, mle = job.settings, job.settings.mle
    redirect_output(Path(job.logs) / "mle.log")
    torch.set_num_threads(settings.resources.threads)
    if settings.captioner.spec is None:
        texts = [text for own in job.captions for text in own]
        model, processor = build_clipcap(
            settings.captioner, texts, job.features.shape[1], job.tower_digest, mle.feature_dropout, settings.seed
        )
        model.model.mapper.standardise(torch.from_numpy(job.features))
    else:
        model, processor = load_captioner(settings.captioner.spec)
        check_features(model, job.tower_digest, job.features.shape[1])

    dataset = CaptionDataset(job.features, job.captions, processor, settings.captioner.max_tokens)
    arguments = TrainingArguments(
        output_dir=str(Path(job.out) / "trainer"),
        num_train_epochs=mle.epochs,
        per_device_train_batch_size=mle.batch_size,
        learning_rate=mle.learning_rate,
        weight_decay=mle.weight_decay,
        warmup_steps=mle.warmup_fraction,
        lr_scheduler_type="cosine",
        bf16=mle.bf16,
        use_cpu=not settings.resources.use_gpu,
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    trainer = Trainer(
        model=model.train(),
        args=arguments,
        train_dataset=dataset,
        data_collator=dataset.collate,
        callbacks=[MetricsFile(Path(job.logs) / "mle_metrics.jsonl")],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        # Dropout on the features belongs to this stage alone.
        model.config.feature_dropout = 0.0
        model.eval().save_pretrained(job.out)
        processor.save_pretrained(job.out)


class CaptionDataset(torch.utils.data.Dataset):
    """One row per (image, caption): prompt placeholders, the caption's tokens and the end token; only the latter two are learnt."""

    def __init__(self, features: np.ndarray, captions: list[list[str]], processor, max_tokens: int) -> None:
        self.features = torch.from_numpy(features)
        self.prompt = processor.prompt_token_ids()
        self.pad = processor.tokenizer.pad_token_id
        end = processor.tokenizer.eos_token_id
        pairs = [(image, text) for image, own in enumerate(captions) for text in own]
        tokens = processor.tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
        self.rows = [(image, [*ids[: max_tokens - 1], end]) for (image, _), ids in zip(pairs, tokens, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, tokens = self.rows[index]
        return {"input_ids": tokens, "image": image}

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """[B, P + T]: padded on the right, labels -100 where nothing is to be learnt."""
        longest = max(len(row["input_ids"]) for row in batch)
        prefix = len(self.prompt)
        ids = torch.full((len(batch), prefix + longest), self.pad)
        ids[:, :prefix] = torch.tensor(self.prompt)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, caption in enumerate(batch):
            end = prefix + len(caption["input_ids"])
            ids[row, prefix:end] = torch.tensor(caption["input_ids"])
            labels[row, prefix:end] = ids[row, prefix:end]
            mask[row, :end] = 1
        features = self.features[[caption["image"] for caption in batch]].float()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": features}
