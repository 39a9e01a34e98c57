"""Learning curves from the rows of metrics.jsonl, one line per run, as geometry that the page draws in SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 150  # of the drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 312, 12, 128  # of the plotted field in it

_POINTS = 1000  # of a line at most: a point for every third of a unit

# Section of the page -> key of a row -> title, unit and factor from the number in the row to that on the page.
SECTIONS: dict[str, dict[str, tuple[str, str, float]]] = {
    "Reward": {
        "reward": ("Reward", "", 1.0),
        "accuracy": ("R@1 in the bag, reward scorer", "%", 100.0),
        "rank": ("Rank in the bag, reward scorer", "", 1.0),
    },
    "Parts of the reward": {
        "rewards/self_retrieval/mean": ("Self-retrieval", "", 1.0),
        "rewards/cider/mean": ("CIDEr-D, as papers print it", "", 1000.0),
    },
    "Captions": {
        "entropy": ("Entropy per token", "nats", 1.0),
        "completions/mean_length": ("Caption length", "tokens", 1.0),
        "unique_captions": ("Different captions in a step", "%", 100.0),
        "truncated": ("Captions longer than the scorer reads", "%", 100.0),
    },
    "Drift and update": {
        "drift/mean": ("Drift per token, sampler to trainer", "nats", 1.0),
        "drift/max": ("Largest drift of a token", "nats", 1.0),
        "drift/caption_mean": ("Drift per caption", "nats", 1.0),
        "kl": ("KL to the start, per token", "nats", 1.0),
        "grad_norm": ("Gradient norm", "", 1.0),
    },
}
_PART_PREFIX, _PART_SUFFIX = "rewards/", "/mean"
_PART_SECTION = "Parts of the reward"

Rows = Sequence[Mapping[str, float]]
_Points = list[tuple[int, float, float | None]]  # step, value, bag size


@dataclass(frozen=True, slots=True)
class StageMark:
    """Where bags of another size begin."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class RunLine:
    """One run in a curve."""

    run: int  # its place among the runs
    first: str  # mean over the first twentieth of the run
    last: str  # and over the last
    raw: tuple[str, ...]  # polylines as SVG points, one per stage of the curriculum
    smooth: tuple[str, ...]  # the same, each point averaged with those before it over a twentieth of the run


@dataclass(frozen=True, slots=True)
class Curve:
    title: str
    unit: str
    low: str  # the lowest value, at the lower end of the axis
    high: str
    first_step: int
    last_step: int
    lines: tuple[RunLine, ...]
    marks: tuple[StageMark, ...]  # of the first run


def learning_curves(runs: Sequence[Rows]) -> dict[str, list[Curve]]:
    """Section -> a curve for each known metric, and each part of a reward, that a run has two or more finite values of.

    Rows without it, such as summaries, are skipped.
    """
    sections = {name: dict(metrics) for name, metrics in SECTIONS.items()}
    for rows in runs:
        for key in (key for row in rows for key in row):
            if key.startswith(_PART_PREFIX) and key.endswith(_PART_SUFFIX):
                title = key.removeprefix(_PART_PREFIX).removesuffix(_PART_SUFFIX).replace("_", " ").capitalize()
                sections[_PART_SECTION].setdefault(key, (title, "", 1.0))
    curves: dict[str, list[Curve]] = {}
    for section, metrics in sections.items():
        for key, (title, unit, factor) in metrics.items():
            points = {place: _points(rows, key, factor) for place, rows in enumerate(runs)}
            points = {place: own for place, own in points.items() if len(own) >= 2 and own[0][0] < own[-1][0]}
            if points:
                curves.setdefault(section, []).append(_curve(title, unit, points))
    return curves


def _points(rows: Rows, key: str, factor: float) -> _Points:
    return [
        (int(row["step"]), float(row[key]) * factor, row.get("bag_size"))
        for row in rows
        if key in row and "step" in row and math.isfinite(row[key])
    ]


def _curve(title: str, unit: str, runs: Mapping[int, _Points]) -> Curve:
    every = [point for points in runs.values() for point in points]
    low, high = min(value for _, value, _ in every), max(value for _, value, _ in every)
    if low == high:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    first, last = min(step for step, _, _ in every), max(step for step, _, _ in every)

    def x(step: int) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    def polyline(stage: _Points, window: int) -> str:
        sums = list(itertools.accumulate((value for _, value, _ in stage), initial=0.0))
        every = -(-len(stage) // _POINTS)
        places = []
        for place in sorted({*range(0, len(stage), every), len(stage) - 1}):
            start = max(0, place - window + 1)
            mean = (sums[place + 1] - sums[start]) / (place + 1 - start)
            places.append(f"{x(stage[place][0]):.1f},{y(mean):.1f}")
        return " ".join(places)

    lines = []
    for run, points in runs.items():
        window = max(1, len(points) // 20)
        values = [value for _, value, _ in points]
        stages = _stages(points)
        lines.append(
            RunLine(
                run=run,
                first=number(sum(values[:window]) / window),
                last=number(sum(values[-window:]) / window),
                raw=tuple(polyline(stage, 1) for stage in stages),
                smooth=tuple(polyline(stage, window) for stage in stages),
            )
        )
    return Curve(
        title=title,
        unit=unit,
        low=number(low),
        high=number(high),
        first_step=first,
        last_step=last,
        lines=tuple(lines),
        marks=tuple(
            StageMark(round(x(stage[0][0]), 1), f"bags of {stage[0][2]:g}")
            for stage in _stages(next(iter(runs.values())))
            if stage[0][2] is not None
        ),
    )


def _stages(points: _Points) -> list[_Points]:
    """Cut where the bag size changes."""
    starts = [place for place in range(len(points)) if place == 0 or points[place][2] != points[place - 1][2]]
    return [points[start:end] for start, end in zip(starts, [*starts[1:], len(points)], strict=True)]


def number(value: float) -> str:
    """Three digits that count: 0.123, 12.3, 1,230, 1.2e-06; with a true minus sign in front."""
    if value and not 1e-3 <= abs(value) < 1e6:
        text = f"{abs(value):.1e}"
    else:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        text = f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text
