"""One HTML file that says what a run did; nothing in it is loaded from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finecap_ray import __version__
from finecap_ray.report import curves
from finecap_ray.report.contact_sheet import ReportBag, ReportImage, contact_sheet, count_outcomes
from finecap_ray.report.templates import template

__all__ = ["ReportBag", "ReportImage", "write_report"]

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
}


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    settings_yaml: str,
    metrics: Sequence[Mapping[str, float]],
    bags: Sequence[ReportBag],
) -> None:
    """Writes the report of a run to `path`.

    summary: that of `evaluation.benchmarks`: bag_size, groups (name -> bags, recall_at_1, interval,
    recall_at_1_by_reward_scorer) with the group `whole`, caption_metrics (system -> metric -> value), captions_per_s; and
    seconds (stage -> seconds). metrics: rows of metrics.jsonl. bags: those to show, in this order within each group.
    Raises DataError for an image that browsers don't show.
    """
    sheets = [contact_sheet(bag) for bag in bags]
    html = template("report.html.j2").render(
        title=title,
        version=__version__,
        summary=summary,
        settings_yaml=settings_yaml,
        caption_rows=_caption_rows(summary["caption_metrics"]),
        curves=curves.learning_curves(metrics),
        geometry=curves,
        step_seconds=_step_seconds(metrics),
        groups=_by_group(sheets),
        outcomes=count_outcomes(sheets),
    )
    Path(path).write_text(html, encoding="utf-8")


def _caption_rows(systems: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, difference) of the known metrics."""
    rows = []
    for key, (name, factor, decimals) in _CAPTION_METRICS.items():
        before, after = systems["mle"][key] * factor, systems["rl"][key] * factor
        rows.append((name, f"{before:.{decimals}f}", f"{after:.{decimals}f}", f"{after - before:+.{decimals}f}"))
    return rows


def _step_seconds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of the parts of a step, the longest first."""
    parts: dict[str, list[float]] = {}
    for row in metrics:
        for key, value in row.items():
            if key.startswith("seconds/"):
                parts.setdefault(key.removeprefix("seconds/"), []).append(value)
    means = {part: sum(values) / len(values) for part, values in parts.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def _by_group(sheets: list) -> dict[str, list]:
    groups: dict[str, list] = {}
    for sheet in sheets:
        groups.setdefault(sheet.group, []).append(sheet)
    return groups
