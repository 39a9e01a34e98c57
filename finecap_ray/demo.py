"""The main job from nothing to a report, in the order a newcomer wants to read it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from finecap_ray.config import Settings
from finecap_ray.console import print_whole
from finecap_ray.pipeline import Pipeline


def run_demo(settings: Settings, console: Console, redo: bool = True) -> dict[str, Any]:
    """Runs every stage that isn't cached and writes summary.json and report.html. Returns the summary.

    Without `redo`, a training whose inputs changed since is an error (DataError) and not started anew.
    """
    pipeline = Pipeline.narrated(settings, console, redo)
    summary = pipeline.summary()
    pipeline.write_report(summary)
    for text in summary.get("warnings", ()):
        console.print(f"warning: {text}")
    print_whole(console, summary_table(summary))
    console.print("human: the mean over all captions that people wrote of an image, vague ones too")
    console.print(f"report: {settings.run_dir}/report.html   numbers: {settings.run_dir}/summary.json")
    return summary


def summary_table(summary: dict[str, Any]) -> Table:
    """R@1 by the judge per group of bags, in percent, and the caption metrics."""
    table = Table(
        title=f"R@1 in bags of {summary['bag_size']} look-alikes, by the judge (chance {100 / summary['bag_size']:.0f} %)"
    )
    for column in ("", "bags", "MLE", "RL", "gain, points", "95 % interval", "human"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, group in summary["groups"].items():
        recall, (low, high) = group["recall_at_1"], group["interval"]["gain"]
        table.add_row(
            name,
            str(group["bags"]),
            f"{100 * recall['mle']:.1f} %",
            f"{100 * recall['rl']:.1f} %",
            f"{100 * (recall['rl'] - recall['mle']):+.1f}",
            f"{100 * low:+.1f} .. {100 * high:+.1f}",
            f"{100 * recall['human']:.1f} %" if "human" in recall else "no captions",
        )
    table.add_section()
    values = summary["caption_metrics"]
    for metric in ("CIDEr", "Bleu_4", "mean_length", "repeated_words"):
        if metric not in values["mle"]:  # no image has a human caption
            continue
        table.add_row(
            metric,
            "",
            f"{values['mle'][metric]:.3f}",
            f"{values['rl'][metric]:.3f}",
            f"{values['rl'][metric] - values['mle'][metric]:+.3f}",
        )
    return table
