"""Processes that work one at a time, step by step, each with a clock: what is compared then runs in the same seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import ray
from transformers import TrainerCallback

TIMEOUT_S = 900


@ray.remote(num_cpus=0)
class Turns:
    """Lets one of several processes work at a time, in order."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.changed = names, asyncio.Condition()
        self.reports: dict[str, list[float]] = {}

    async def take(self, name: str) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.names[0] == name)

    async def report(self, name: str, step_s: list[float]) -> None:
        self.reports[name] = step_s

    async def reported(self, name: str) -> list[float]:
        return self.reports[name]

    async def give(self, name: str, last: bool) -> None:
        async with self.changed:
            self.names.remove(name)
            self.names += [] if last else [name]
            self.changed.notify_all()


class Clock(TrainerCallback):
    """Seconds of every step, from its turn to the call that asks for the next."""

    def __init__(self, turns: Any, name: str) -> None:
        self.turns, self.name = turns, name
        self.step_s: list[float] = []
        self.started: float | None = None

    def on_step_begin(self, args=None, state=None, control=None, **kwargs) -> None:
        self.stop(last=False)
        ray.get(self.turns.take.remote(self.name), timeout=TIMEOUT_S)
        self.started = time.perf_counter()

    def on_train_end(self, args=None, state=None, control=None, **kwargs) -> None:
        self.stop(last=True)
        ray.get(self.turns.report.remote(self.name, self.step_s), timeout=TIMEOUT_S)

    def stop(self, last: bool) -> None:
        if self.started is not None:
            self.step_s.append(time.perf_counter() - self.started)
            ray.get(self.turns.give.remote(self.name, last), timeout=TIMEOUT_S)


def parts_of_step(parts_s: Mapping[str, float], step_s: float) -> list[str]:
    """Lines of a table: what the parts of our step take."""
    return [
        "| part of our step | s | share |",
        "|---|---:|---:|",
        *(f"| {part} | {value:.3f} | {100 * value / step_s:.0f} % |" for part, value in parts_s.items()),
        "",
    ]
