"""What a person sees while a run goes on: a line per stage, and a line per step with units under a progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from finecap_ray.stages import StageResult

_POLL_S = 0.5


class Narrator:
    """Prints the stages of a run, and the steps of the one that is running."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def started(self, name: str) -> None:
        self.console.print(Text.assemble((name, "bold"), " ..."))

    def ended(self, result: StageResult) -> None:
        how = "cached, took" if result.cached else "done in"
        self.console.print(Text.assemble((f"{result.name:<18}", "bold"), f" {how} {result.seconds:6.1f} s"))

    @contextmanager
    def steps(self, metrics: Path, total: int, line: Callable[[dict[str, Any]], str | None]) -> Iterator[None]:
        """While inside, moves a bar by the rows that are appended to a metrics file, and prints what `line` makes of each."""
        from finecap_ray.training.metrics_file import read_metrics

        seen = len(read_metrics(metrics))
        stop = threading.Event()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("steps", total=total)

            def follow() -> None:
                nonlocal seen
                while True:
                    last_look = stop.wait(_POLL_S)
                    rows = read_metrics(metrics)
                    seen = min(seen, len(rows))  # going on from a checkpoint takes rows away
                    for row in rows[seen:]:
                        text = line(row)
                        if text is not None:
                            progress.console.print(text)
                        progress.update(task, completed=row["step"])
                    seen = len(rows)
                    if last_look:
                        return

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()


def mle_line(row: dict[str, Any]) -> str | None:
    """An evaluation of MLE; the rows between are told by the bar."""
    if "eval_CIDEr" not in row:
        return None
    return (
        f"step {row['step']:5.0f}  epoch {row['epoch']:5.2f}  dev CIDEr {row['eval_CIDEr']:5.3f}  Bleu_4 {row['eval_Bleu_4']:5.3f}  "
        f"{row['eval_mean_length']:4.1f} words  {row['eval_seconds']:5.1f} s"
    )


def step_line(row: dict[str, Any]) -> str | None:
    """One RL step: reward, R@1 in the bag by the reward scorer, drift in nats per token, seconds."""
    if "reward" not in row:
        return None
    cider = f"  CIDEr {10 * row['rewards/cider/mean']:5.2f}" if "rewards/cider/mean" in row else ""
    kl = f"  KL {row['kl']:6.4f}" if "kl" in row else ""
    return (
        f"step {row['step']:4.0f}  bags of {row['bag_size']:2.0f}  reward {row['reward']:7.3f}  R@1 {100 * row['accuracy']:5.1f} %{cider}{kl}"
        f"  entropy {row['entropy']:5.2f} nats  drift {row['drift/mean']:.1e} nats  {row['step_time']:5.2f} s"
        f"  {row['captions'] / row['step_time']:5.0f} captions/s"
    )
