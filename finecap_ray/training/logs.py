"""Where training writes down what it sees: metrics.jsonl, TensorBoard events, and the engines' own output in files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from finecap_ray.training.metrics_file import read_metrics


class MetricsFile(TrainerCallback):
    """Appends every logged row to a JSON-lines file, numbers only; with `events`, to TensorBoard as well.

    A step of a row is `updates_per_step` of transformers' global steps.
    """

    def __init__(self, path: Path, events: Path | None = None, updates_per_step: int = 1) -> None:
        self.path, self.events, self.updates_per_step = path, events, updates_per_step
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Takes away what a killed run has logged since the checkpoint that training goes on from: it is about to come again."""
        if not state.is_world_process_zero:
            return
        step = state.global_step // self.updates_per_step
        if self.path.is_file():
            lines = (json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step)
            kept = self.path.with_name(f".{self.path.name}.kept")
            kept.write_text("".join(lines), encoding="utf-8")
            kept.replace(self.path)
        if self.events:
            self.writer = SummaryWriter(str(self.events), purge_step=step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        step = state.global_step // self.updates_per_step
        row = {"step": step} | {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def redirect_output(path: Path) -> None:
    """This process's stdout and stderr go to a file from here on, those of C++ libraries too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
