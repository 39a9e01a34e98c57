"""Results of an evaluation as JSON, as a table for the terminal, or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from finecap_ray.console import print_whole

Format = Literal["table", "json", "markdown"]

_PERCENT = {
    "distinct_1",
    "distinct_2",
    "repeated_words",
    "trailing_space",
    "full_stop",
    "ended",
    "truncated",
    "object_precision",
    "object_recall",
    "hallucinating",
}
_COLUMNS = (
    "captions",
    "by",
    "against",
    "pools",
    "n",
    "R@1 %",
    "R@5 %",
    "R@10 %",
    "mean rank",
    "median rank",
    "chance %",
)


def print_results(results: Mapping[str, Any], form: Format, console: Console) -> None:
    """JSON and Markdown go to standard output as they are, for a file or a pipe."""
    if form == "table":
        for part in as_tables(results):
            print_whole(console, part)
    else:
        print(as_json(results) if form == "json" else as_markdown(results))


def as_json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False)


def as_markdown(results: Mapping[str, Any]) -> str:
    """The tables of `as_tables`, and what they were made with."""
    lines = [*(f"> **warning**: {text}" for text in results["warnings"]), ""]
    if results["retrieval"]:
        lines += [*_markdown_table(_COLUMNS, _retrieval_rows(results)), ""]
    lines += [*_markdown_table(("metric", "value"), _metric_rows(results)), ""]
    return "\n".join([*lines, *(f"{line}  " for line in _made_with(results)), ""])


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The headline of a run: R@1 by the judge per group of bags, before and after RL, with intervals."""

    def cell(group: Mapping[str, Any], system: str) -> str:
        if system not in group["recall_at_1"]:
            return "no captions"
        low, high = group["interval"][system]
        return f"{100 * group['recall_at_1'][system]:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    rows = []
    for name, group in summary["groups"].items():
        gain = group["recall_at_1"]["rl"] - group["recall_at_1"]["mle"]
        low, high = group["interval"]["gain"]
        gained = f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append((name, str(group["bags"]), *(cell(group, system) for system in ("mle", "rl", "human")), gained))
    columns = (f"R@1 % in bags of {summary['bag_size']}", "bags", "MLE", "RL", "human captions", "gain, points")
    warnings = [f"> **warning**: {text}\n" for text in summary.get("warnings", ())]
    return "\n".join([*warnings, *_markdown_table(columns, rows)])


def as_tables(results: Mapping[str, Any]) -> list[Table | str]:
    """What a terminal prints, in order."""
    parts: list[Table | str] = [f"warning: {text}" for text in results["warnings"]]
    if results["retrieval"]:
        parts.append(_rich_table("Retrieval, with the 95 % bootstrap interval", _COLUMNS, _retrieval_rows(results)))
    parts.append(_rich_table("Captions", ("metric", "value"), _metric_rows(results)))
    return [*parts, *_made_with(results)]


def _retrieval_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def estimate(row: Mapping[str, Any], key: str, factor: float) -> str:
        if key not in row:
            return ""
        value, low, high = (factor * row[key][part] for part in ("value", "low", "high"))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    return [
        (
            *(str(row[key]) for key in ("captions", "by", "against", "pools", "n")),
            *(estimate(row, f"recall_at_{k}", 100) for k in (1, 5, 10)),
            *(estimate(row, key, 1) for key in ("mean_rank", "median_rank")),
            f"{100 * row['chance']:.3g}",
        )
        for row in results["retrieval"]
    ]


def _metric_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, _number(name, value)) for name, value in results["caption_metrics"].items()]
    for scorer, own in results["similarity"].items():
        rows += [(f"{name}, {scorer}", _number(name, value)) for name, value in own.items() if name != "prefix"]
    return rows + [(name, f"not available: {reason}") for name, reason in results["not_available"].items()]


def _number(name: str, value: float) -> str:
    if name in _PERCENT or name.startswith("finecapeval_"):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if name == "vocabulary" else f"{value:.4f}"


def _made_with(results: Mapping[str, Any]) -> list[str]:
    prefixes = {name: own["prefix"] for name, own in results["similarity"].items()}
    lines = [
        f"{results['evaluated']}: {results['images']} images, seed {results['seed']}, tokenisation {results['tokenisation']}"
        + (f", references {results['references']}" if "references" in results else ""),
        *(
            f"{name}: {own['spec']}, digest {own['digest']}, prefix {prefixes[name]!r}"
            for name, own in results["scorers"].items()
        ),
        *(f"left out: {count} {reason}" for reason, count in results["left_out"].items()),
        f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in results['seconds'].items() if value)}",
        f"versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}",
    ]
    if results["captioner"]:
        own = results["captioner"]
        tower = "" if own["tower"] is None else f", tower {own['tower']}"
        lines.insert(1, f"captioner: weights {own['weights']}{tower}")
    return lines


def _rich_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("captions", "by", "against", "metric") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(cells)} |"
        for cells in (columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    ]
