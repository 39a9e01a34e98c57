"""Learning curves from the rows of metrics.jsonl, as geometry that the page draws in SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 150  # of the drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 312, 12, 128  # of the plotted field in it

# Key of a row -> title, unit and factor from the number in the row to that on the page.
METRICS: dict[str, tuple[str, str, float]] = {
    "reward": ("Reward", "", 1.0),
    "accuracy": ("R@1 in the bag, reward scorer", "%", 100.0),
    "rank": ("Rank in the bag, reward scorer", "", 1.0),
    "rewards/self_retrieval/mean": ("Self-retrieval", "", 1.0),
    "rewards/cider/mean": ("CIDEr-D, as papers print it", "", 1000.0),
    "entropy": ("Entropy per token", "nats", 1.0),
    "kl": ("KL to the start, per token", "nats", 1.0),
    "completions/mean_length": ("Caption length", "tokens", 1.0),
    "unique_captions": ("Different captions in a step", "%", 100.0),
    "truncated": ("Captions longer than the scorer reads", "%", 100.0),
    "grad_norm": ("Gradient norm", "", 1.0),
    "drift/mean": ("Drift per token", "nats", 1.0),
}


@dataclass(frozen=True, slots=True)
class StageMark:
    """Where bags of another size begin."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    title: str
    unit: str
    first: str  # mean over the first twentieth of the run
    last: str  # and over the last
    low: str  # the lowest value, at the lower end of the axis
    high: str
    first_step: int
    last_step: int
    raw: tuple[str, ...]  # polylines as SVG points, one per stage of the curriculum
    smooth: tuple[str, ...]  # the same, each point averaged with those before it over a twentieth of the run
    marks: tuple[StageMark, ...]


def learning_curves(metrics: Sequence[Mapping[str, float]]) -> list[Curve]:
    """A curve for each known metric with two or more finite values; rows without it, such as summaries, are skipped."""
    curves = []
    for key, (title, unit, factor) in METRICS.items():
        points = [
            (int(row["step"]), float(row[key]) * factor, row.get("bag_size"))
            for row in metrics
            if key in row and "step" in row and math.isfinite(row[key])
        ]
        if len(points) >= 2 and points[0][0] < points[-1][0]:
            curves.append(_curve(title, unit, points))
    return curves


def _curve(title: str, unit: str, points: list[tuple[int, float, float | None]]) -> Curve:
    steps, values = [point[0] for point in points], [point[1] for point in points]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    window = max(1, len(points) // 20)

    def x(step: int) -> float:
        return LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (RIGHT - LEFT)

    def polyline(stage: list[tuple[int, float, float | None]], window: int) -> str:
        places = []
        for place, (step, _, _) in enumerate(stage):
            recent = [value for _, value, _ in stage[max(0, place - window + 1) : place + 1]]
            y = BOTTOM - (sum(recent) / len(recent) - low) / (high - low) * (BOTTOM - TOP)
            places.append(f"{x(step):.1f},{y:.1f}")
        return " ".join(places)

    starts = [place for place in range(len(points)) if place == 0 or points[place][2] != points[place - 1][2]]
    stages = [points[start:end] for start, end in zip(starts, [*starts[1:], len(points)], strict=True)]
    return Curve(
        title=title,
        unit=unit,
        first=number(sum(values[:window]) / window),
        last=number(sum(values[-window:]) / window),
        low=number(low),
        high=number(high),
        first_step=steps[0],
        last_step=steps[-1],
        raw=tuple(polyline(stage, 1) for stage in stages),
        smooth=tuple(polyline(stage, window) for stage in stages),
        marks=tuple(
            StageMark(round(x(stage[0][0]), 1), f"bags of {stage[0][2]:g}")
            for stage in stages
            if stage[0][2] is not None
        ),
    )


def number(value: float) -> str:
    """Three digits that count: 0.123, 12.3, 1,230, 1.2e-06; with a true minus sign in front."""
    if value and not 1e-3 <= abs(value) < 1e6:
        text = f"{abs(value):.1e}"
    else:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        text = f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text
