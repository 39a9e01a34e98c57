"""The report of a run, or of several side by side, from the files in their folders. Needs no Ray that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finecap_ray.bags.stream import read_bags
from finecap_ray.config import Settings, dump_settings, load_settings
from finecap_ray.errors import DataError
from finecap_ray.report.choose import choose_bags
from finecap_ray.report.merge import merge_details
from finecap_ray.report.page import ReportBag, ReportImage, ReportRun, System, write_report
from finecap_ray.report.settings_diff import settings_diff
from finecap_ray.training.metrics_file import read_metrics

REPORT_FILE, COMPARISON_FILE, SUMMARY_FILE, CONFIG_FILE = "report.html", "compare.html", "summary.json", "config.yaml"
BAGS_FILE = "evaluation/bags.json"
_SUMMARY_KEYS = ("bag_size", "groups", "caption_metrics", "captions_per_s")


def rebuild_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of a finished run again or, of several, one that compares them: into the first one's folder, or `out`.

    Raises DataError, naming what is missing, when one isn't finished.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    for folder in folders:
        absent = [name for name in (CONFIG_FILE, SUMMARY_FILE, BAGS_FILE) if not (folder / name).is_file()]
        if absent:
            raise DataError(
                f"{folder} has no {' and no '.join(absent)}: `finecap demo` and `finecap evaluate` write them"
            )
    settings = [load_settings(folder / CONFIG_FILE) for folder in folders]
    summaries = [_read(folder / SUMMARY_FILE) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        absent = [key for key in _SUMMARY_KEYS if not isinstance(summary, dict) or key not in summary]
        if absent:
            raise DataError(
                f"{folder / SUMMARY_FILE} has no {', '.join(absent)}, as the evaluation of a run has: run `finecap evaluate` again"
            )
    path = Path(out) if out else folders[0] / (REPORT_FILE if len(folders) == 1 else COMPARISON_FILE)
    return _write(path, folders, settings, summaries)


def assemble_report(run_dir: Path, settings: Settings, summary: Mapping[str, Any]) -> Path:
    """Writes report.html. `summary` is that of the evaluation, with seconds (stage -> seconds)."""
    return _write(run_dir / REPORT_FILE, [run_dir], [settings], [summary])


def _write(
    path: Path, folders: Sequence[Path], settings: Sequence[Settings], summaries: Sequence[Mapping[str, Any]]
) -> Path:
    names = run_names(folders, settings)
    details = [_read(folder / BAGS_FILE) for folder in folders]
    merged = merge_details(details, names)
    chosen = choose_bags(merged.bags, settings[0].evaluation.report_bags, merged.before, merged.after)
    notes = list(merged.notes)
    if len(chosen) < len(merged.bags):
        notes.append(f"{len(chosen)} of {len(merged.bags)} bags, as many of each outcome (evaluation.report_bags).")
    write_report(
        path,
        title=" and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}",
        runs=[
            ReportRun(
                name, summary, dump_settings(own), settings_diff(own), read_metrics(folder / "rl" / "metrics.jsonl")
            )
            for name, summary, own, folder in zip(names, summaries, settings, folders, strict=True)
        ],
        systems=[System(key, label) for key, label in merged.systems],
        before=merged.before,
        after=merged.after,
        bags=_with_images(chosen, folders[0], settings[0]),
        notes=notes,
    )
    return path


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): `finecap evaluate` writes it again") from None


def run_names(folders: Sequence[Path], settings: Sequence[Settings]) -> list[str]:
    """The names of the runs; where two are equal, their folders' with it."""
    names = [own.name for own in settings]
    if len(set(names)) < len(names):
        names = [f"{name} ({folder.resolve().name})" for name, folder in zip(names, folders, strict=True)]
    return [name if names.count(name) == 1 else f"{name} {place}" for place, name in enumerate(names, start=1)]


def _with_images(chosen: Sequence[dict[str, Any]], run_dir: Path, settings: Settings) -> list[ReportBag]:
    groups = settings.evaluation.groups
    wanted = {(bag["group"], len(bag["images"])) for bag in chosen if bag["group"] in groups}
    images = {
        (group, size): {
            bag.bag_id: {image.image_id: image.image for image in bag.images}
            for bag in read_bags(run_dir / "bags" / groups[group], size)
        }
        for group, size in wanted
    }
    report = []
    for bag in chosen:
        own = images.get((bag["group"], len(bag["images"])), {}).get(bag["bag_id"], {})
        if any(image["image_id"] not in own for image in bag["images"]):
            raise DataError(
                f"bag {bag['bag_id']} of the evaluation isn't among the bags of group {bag['group']} in {run_dir}: "
                "run `finecap evaluate` again"
            )
        cells = tuple(_report_image(image, own[image["image_id"]]) for image in bag["images"])
        report.append(ReportBag(bag["bag_id"], bag["similarity"], bag["group"], cells))
    return report


def _report_image(details: Mapping[str, Any], image: bytes) -> ReportImage:
    own = details["image_id"]
    return ReportImage(
        image_id=own,
        image=image,
        captions={system: text for system, text in details["captions"].items() if text is not None},
        rank=details["rank"],
        competitor={system: None if best == own else best for system, best in details["best"].items()},
    )
