"""One HTML file that says what a run did, or how several compare; nothing in it is loaded from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finecap_ray import __version__
from finecap_ray.report import curves
from finecap_ray.report.contact_sheet import OUTCOMES, ReportBag, ReportImage, System, contact_sheet, count_outcomes
from finecap_ray.report.settings_diff import SettingsDiff
from finecap_ray.report.tables import caption_rows, recall_rows, step_seconds
from finecap_ray.report.templates import template

__all__ = ["ReportBag", "ReportImage", "ReportRun", "System", "write_report"]

DASHES = ("", "6 3", "2 2", "8 3 2 3")  # of the lines of the runs, so that they differ without colour


@dataclass(frozen=True, slots=True)
class ReportRun:
    """A run as the report reads it.

    summary: that of `evaluation.benchmarks`: bag_size, groups (name -> bags, recall_at_1, interval,
    recall_at_1_by_reward_scorer) with the group `whole`, caption_metrics (system -> metric -> value), captions_per_s; and
    seconds (stage -> seconds). metrics: rows of metrics.jsonl.
    """

    name: str
    summary: Mapping[str, Any]
    settings_yaml: str
    diff: SettingsDiff
    metrics: Sequence[Mapping[str, float]]


def write_report(
    path: str | Path,
    *,
    title: str,
    runs: Sequence[ReportRun],
    systems: Sequence[System],
    before: str,
    after: str,
    bags: Sequence[ReportBag],
    notes: Sequence[str] = (),
) -> None:
    """Writes the report of one or more runs to `path`.

    systems: whose captions the bags hold, in the order they are shown; before and after: the keys of the two whose outcomes
    are shown first. bags: those to show, in this order within each group. notes: what a reader must know of the bags.
    Raises DataError for an image that browsers don't show.
    """
    sheets = [contact_sheet(bag, systems, before, after) for bag in bags]
    keys = [system.key for system in systems]
    names, captioners = _captioners(runs)
    html = template("report.html.j2").render(
        title=title,
        version=__version__,
        runs=runs,
        warnings=list(dict.fromkeys(text for run in runs for text in run.summary.get("warnings", ()))),
        recall=[row for run in runs for row in recall_rows(run.name, run.summary)],
        caption_names=names,
        caption_rows=caption_rows(captioners),
        curves=curves.learning_curves([run.metrics for run in runs]),
        geometry=curves,
        dashes=DASHES,
        step_seconds=[step_seconds(run.metrics) for run in runs],
        sheets=sheets,
        sizes=sorted({len(sheet.cells) for sheet in sheets}),
        groups=list(dict.fromkeys(sheet.group for sheet in sheets)),
        systems=systems,
        before=keys.index(before),
        after=keys.index(after),
        outcomes=count_outcomes(sheets) if sheets else dict.fromkeys(OUTCOMES, 0),
        notes=notes,
    )
    Path(path).write_text(html, encoding="utf-8")


def _captioners(runs: Sequence[ReportRun]) -> tuple[list[str], list[Mapping[str, float]]]:
    """Names and caption metrics of every captioner: before and after of each run."""
    words = {"mle": "before", "rl": "after"}
    pairs = [
        (words[system] if len(runs) == 1 else f"{run.name}, {words[system]}", run.summary["caption_metrics"][system])
        for run in runs
        for system in words
    ]
    return [name for name, _ in pairs], [metrics for _, metrics in pairs]
