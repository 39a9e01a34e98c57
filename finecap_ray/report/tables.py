"""The tables of a report: R@1 with intervals, caption metrics, seconds. Numbers become text here, in percent and points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of caption_metrics, in this order -> name on the page, factor and decimals.
_CAPTION_METRICS = {
    "CIDEr": ("CIDEr-D", 100, 1),
    "Bleu_1": ("BLEU-1", 100, 1),
    "Bleu_4": ("BLEU-4", 100, 1),
    "ROUGE_L": ("ROUGE-L", 100, 1),
    "mean_length": ("Words per caption", 1, 2),
    "vocabulary": ("Vocabulary, words", 1, 0),
    "distinct_1": ("Distinct words, %", 100, 1),
    "distinct_2": ("Distinct word pairs, %", 100, 1),
    "repeated_words": ("Repeated words, %", 100, 1),
    "trailing_space": ("Ends in a space, %", 100, 1),
    "full_stop": ("Ends in a full stop, %", 100, 1),
    "ended": ("Ends by itself, not at the limit, %", 100, 1),
}


@dataclass(frozen=True, slots=True)
class Share:
    """An R@1 with its interval, in percent."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} %"

    @property
    def range(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"


@dataclass(frozen=True, slots=True)
class RecallRow:
    """One group of bags of one size in one run; shares are by the judge."""

    run: str
    size: int
    group: str
    bags: int
    before: Share
    after: Share
    human: Share | None  # of human captions
    gain: str  # points
    gain_range: str
    by_scorer: str  # "30.0 % → 90.0 %"
    human_by_scorer: str  # "70.0 %"; "" without human captions

    @property
    def chance(self) -> float:
        return 100 / self.size


def recall_rows(run: str, summary: Mapping[str, Any]) -> list[RecallRow]:
    """A row per bag size and group; `summary` is that of `evaluation.benchmarks`."""
    sizes = summary.get("bag_sizes") or {str(summary["bag_size"]): summary["groups"]}
    return [
        _recall_row(run, int(size), name, group) for size, groups in sizes.items() for name, group in groups.items()
    ]


def caption_rows(systems: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str], str]]:
    """(metric, value of each system, difference of the first two or "" where there are others) of the known metrics."""
    rows = []
    for key, (name, factor, decimals) in _CAPTION_METRICS.items():
        if all(key in own for own in systems):
            values = [own[key] * factor for own in systems]
            difference = f"{values[1] - values[0]:+.{decimals}f}" if len(values) == 2 else ""
            rows.append((name, [f"{value:.{decimals}f}" for value in values], difference.replace("-", "−")))
    return rows


def step_seconds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of the parts of a step, the longest first."""
    parts: dict[str, list[float]] = {}
    for row in metrics:
        for key, value in row.items():
            if key.startswith("seconds/"):
                parts.setdefault(key.removeprefix("seconds/"), []).append(value)
    means = {part: sum(values) / len(values) for part, values in parts.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _recall_row(run: str, size: int, name: str, group: Mapping[str, Any]) -> RecallRow:
    recall, interval, scorer = group["recall_at_1"], group["interval"], group["recall_at_1_by_reward_scorer"]

    def share(system: str) -> Share | None:
        return Share(100 * recall[system], *(100 * end for end in interval[system])) if system in recall else None

    return RecallRow(
        run=run,
        size=size,
        group=name,
        bags=group["bags"],
        before=share("mle"),
        after=share("rl"),
        human=share("human"),
        gain=points(recall["rl"] - recall["mle"]),
        gain_range=f"{points(interval['gain'][0])} to {points(interval['gain'][1])}",
        by_scorer=f"{100 * scorer['mle']:.1f} % → {100 * scorer['rl']:.1f} %",
        human_by_scorer=f"{100 * scorer['human']:.1f} %" if "human" in scorer else "",
    )
