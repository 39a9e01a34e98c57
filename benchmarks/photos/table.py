"""Results of pieces -> the table of the protocol: means over seeds, seed by seed with intervals, gains over MLE, and learning curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from piece import CURVE_STEPS
from recipes import MLE, RECIPES

Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recall:
    """R@1 in percent, of the captions `evaluated` or `human`, by `judge` or `reward scorer`."""

    whose: str
    by: str
    against: str

    def __call__(self, numbers: Numbers) -> float:
        return 100 * self._found(numbers)["recall_at_1"]["value"]

    def interval(self, numbers: Numbers) -> str:
        """Of 95 %, by bootstrap over bags."""
        found = self._found(numbers)["recall_at_1"]
        return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"

    def count(self, numbers: Numbers) -> int:
        return self._found(numbers)["n"]

    def _found(self, numbers: Numbers) -> Numbers:
        for own in numbers["retrieval"]:
            if (own["captions"], own["by"]) == (self.whose, self.by) and own["against"].endswith(self.against):
                return own
        raise KeyError(f"no retrieval of {self.whose} by {self.by} against {self.against}")


POOLS = {"RD100": "100 random images", "bags of 3": "bags of 3", "bags of 5": "bags of 5", "bags of 7": "bags of 7"}
GAINS = {name: Recall("evaluated", "judge", pool) for name, pool in POOLS.items()} | {
    f"{name}, reward scorer": Recall("evaluated", "reward scorer", pool) for name, pool in POOLS.items()
}
OTHERS: dict[str, Callable[[Numbers], float | None]] = {
    "CIDEr": lambda own: own["caption_metrics"]["CIDEr"],
    "CLIPScore, judge": lambda own: own["similarity"]["judge"]["CLIPScore"],
    "hallucinating, %": lambda own: 100 * own["caption_metrics"]["hallucinating"],
    "distinct-2": lambda own: own["caption_metrics"]["distinct_2"],
    "words": lambda own: own["caption_metrics"]["mean_length"],
    "repeated words, %": lambda own: 100 * own["caption_metrics"]["repeated_words"],
    "trailing space, %": lambda own: 100 * own["caption_metrics"]["trailing_space"],
    "ended, %": lambda own: 100 * own["caption_metrics"]["ended"],
    "captions/s": lambda own: own["captions_per_s"],
    "training, min": lambda own: own["training_s"] / 60,
}

CURVES: dict[str, tuple[str, float]] = {  # a name of piece.CURVE, and in what unit
    "self-retrieval, nats": ("self_retrieval", 1),
    "R@1, %": ("recall_at_1", 100),
    "CIDEr": ("cider", 10),  # its reward is a tenth
    "tokens": ("tokens", 1),
    "entropy, nats": ("entropy", 1),
}


def markdown(results: list[Numbers]) -> str:
    if not results:
        return "no results yet\n"
    order = [name for name in (MLE, *RECIPES) if any(own["recipe"] == name for own in results)]
    seeds = {name: {own["seed"]: own for own in results if own["recipe"] == name} for name in order}
    start = seeds.get(MLE, {})
    split, images = results[0]["split"], results[0]["images"]
    lines = [
        f"{images} photos of {split}; R@1 in percent by the judge, mean of the seeds ± standard error; in brackets the gain over MLE of the same seeds.",
        "",
        *_table(seeds, GAINS, start),
        "",
        "Seed by seed, with 95 % intervals by bootstrap over bags ("
        + ", ".join(f"{name}: n = {GAINS[name].count(results[0])}" for name in POOLS)
        + "):",
        "",
        *_seed_by_seed(seeds, start),
        "",
        "Human captions (every one a candidate), mean of the evaluations: "
        + ", ".join(f"{name} {mean(map(Recall('human', 'judge', pool), results)):.1f}" for name, pool in POOLS.items())
        + ".",
        "",
        *_table(seeds, OTHERS, {}),
        "",
        f"Learning curves, of what is sampled in training: means of {CURVE_STEPS} steps, and of the seeds. Bags grow with the curriculum, so R@1 in them falls.",
        "",
        *_curves(seeds),
    ]
    return "\n".join(lines) + "\n"


def _seed_by_seed(seeds: dict[str, dict[int, Numbers]], start: dict[int, Numbers]) -> list[str]:
    lines = [f"| recipe | seed | {' | '.join(GAINS)} |", "|---|---:|" + "---:|" * len(GAINS)]
    for name, own in seeds.items():
        for seed, numbers in own.items():
            own_start = None if name == MLE else start.get(seed)
            cells = [_cell_of_one(of, numbers, own_start) for of in GAINS.values()]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
    return lines


def _cell_of_one(of: Recall, numbers: Numbers, start: Numbers | None) -> str:
    gain = "" if start is None else f"{of(numbers) - of(start):+.1f}; "
    return f"{of(numbers):.1f} ({gain}{of.interval(numbers)})"


def _table(rows: dict[str, dict[int, Numbers]], columns: dict[str, Callable], start: dict[int, Numbers]) -> list[str]:
    """Each row of one recipe, by seed; the gains are over `start` of the same seeds."""
    lines = ["| recipe | seeds | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for name, own in rows.items():
        others = {seed: numbers for seed, numbers in start.items() if numbers is not own.get(seed)}
        cells = [_cell(of, own, others) for of in columns.values()]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def _cell(of: Callable[[Numbers], float | None], own: dict[int, Numbers], start: dict[int, Numbers]) -> str:
    values = [of(numbers) for numbers in own.values()]
    if None in values:  # JSON's word for what was not a number
        return ""
    cell = _spread(values, "")
    gains = [of(numbers) - of(start[seed]) for seed, numbers in own.items() if seed in start]
    return f"{cell} ({_spread(gains, '+')})" if gains else cell


def _curves(seeds: dict[str, dict[int, Numbers]]) -> list[str]:
    lines = [f"| recipe | seeds | last step | {' | '.join(CURVES)} |", "|---|---:|---:|" + "---:|" * len(CURVES)]
    for name, own in seeds.items():
        if name == MLE or RECIPES[name].last_weights_of:  # none, and another's
            continue
        curves = [numbers["curve"] for numbers in own.values()]
        points = list(zip(*curves, strict=False))
        for point in points[:: len(points) // 6 or 1]:
            cells = [
                f"{unit * mean(one[key] for one in point):.3g}" if key in point[0] else ""
                for key, unit in CURVES.values()
            ]
            lines.append(f"| {name} | {len(curves)} | {point[0]['step']} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float], sign: str) -> str:
    digits = 1 if max(map(abs, values)) >= 10 or sign else 3
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}"
