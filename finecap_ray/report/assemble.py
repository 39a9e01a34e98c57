"""The report of a run from the files in its folder: evaluation, bags, metrics, settings. Needs no Ray that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finecap_ray.bags.stream import read_bags
from finecap_ray.config import Settings, dump_settings, load_settings
from finecap_ray.errors import DataError
from finecap_ray.report.contact_sheet import AFTER, BEFORE
from finecap_ray.report.page import ReportBag, ReportImage, write_report
from finecap_ray.training.metrics_file import read_metrics

REPORT_FILE, SUMMARY_FILE, CONFIG_FILE = "report.html", "summary.json", "config.yaml"


def rebuild_report(run_dir: str | Path) -> Path:
    """Writes the report of a finished run again. Raises DataError, naming what is missing, when it isn't finished."""
    run_dir = Path(run_dir)
    absent = [name for name in (CONFIG_FILE, SUMMARY_FILE) if not (run_dir / name).is_file()]
    if absent:
        raise DataError(f"{run_dir} has no {' and no '.join(absent)}: `finecap demo` and `finecap evaluate` write both")
    settings = load_settings(run_dir / CONFIG_FILE)
    return assemble_report(run_dir, settings, json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8")))


def assemble_report(run_dir: Path, settings: Settings, summary: Mapping[str, Any]) -> Path:
    """Writes report.html. `summary` is that of the evaluation, with seconds (stage -> seconds)."""
    details = json.loads((run_dir / "evaluation" / "bags.json").read_text(encoding="utf-8"))
    path = run_dir / REPORT_FILE
    write_report(
        path,
        title=settings.name,
        summary=summary,
        settings_yaml=dump_settings(settings),
        metrics=read_metrics(run_dir / "rl" / "metrics.jsonl"),
        bags=_with_images(choose_bags(details, settings.evaluation.report_bags), run_dir, settings),
    )
    return path


def choose_bags(details: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` bags, as many of each group, and in it of those that gained, stayed and lost by training; evenly spaced in each.

    The number of images that were found, after minus before, tells the three apart and orders the result within a group.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for bag in details:
        groups.setdefault(bag["group"], []).append(bag)
    chosen = []
    for bags, share in zip(groups.values(), _shares([len(bags) for bags in groups.values()], count), strict=True):
        ranked = sorted(bags, key=lambda bag: (-_gain(bag), bag["bag_id"]))
        kinds = [
            [bag for bag in ranked if _gain(bag) > 0],
            [bag for bag in ranked if _gain(bag) < 0],
            [bag for bag in ranked if _gain(bag) == 0],
        ]
        picks = [
            _spaced(kind, part) for kind, part in zip(kinds, _shares([len(kind) for kind in kinds], share), strict=True)
        ]
        chosen += sorted((bag for kind in picks for bag in kind), key=lambda bag: (-_gain(bag), bag["bag_id"]))
    return chosen


def _gain(bag: Mapping[str, Any]) -> int:
    return sum((image["rank"][AFTER] == 1) - (image["rank"][BEFORE] == 1) for image in bag["images"])


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` handed out one by one in turn, to those that have room."""
    shares = [0] * len(sizes)
    while sum(shares) < min(count, sum(sizes)):
        for place, size in enumerate(sizes):
            if shares[place] < size and sum(shares) < count:
                shares[place] += 1
    return shares


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, the first one and then at equal distances."""
    return [items[place * len(items) // count] for place in range(count)]


def _with_images(chosen: Sequence[dict[str, Any]], run_dir: Path, settings: Settings) -> list[ReportBag]:
    groups = settings.evaluation.groups
    images = {
        group: {
            bag.bag_id: {image.image_id: image.image for image in bag.images}
            for bag in read_bags(run_dir / "bags" / groups[group], settings.evaluation.bag_size)
        }
        for group in {bag["group"] for bag in chosen if bag["group"] in groups}
    }
    report = []
    for bag in chosen:
        own = images.get(bag["group"], {}).get(bag["bag_id"], {})
        if any(image["image_id"] not in own for image in bag["images"]):
            raise DataError(
                f"bag {bag['bag_id']} of the evaluation isn't among the bags of group {bag['group']} in {run_dir}: "
                "run `finecap evaluate` again"
            )
        report.append(
            ReportBag(
                bag["bag_id"],
                bag["similarity"],
                bag["group"],
                tuple(_report_image(image, own[image["image_id"]]) for image in bag["images"]),
            )
        )
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
