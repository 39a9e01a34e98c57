"""Results of pieces -> the table of the protocol: mean over seeds, its standard error, and the gain over MLE seed by seed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from recipes import MLE, RECIPES

Numbers = dict[str, Any]


def recall(whose: str, by: str, against: str) -> Callable[[Numbers], float]:
    """R@1 in percent, of the captions `evaluated` or `human`, by `judge` or `reward scorer`."""

    def of(numbers: Numbers) -> float:
        for own in numbers["retrieval"]:
            if (own["captions"], own["by"]) == (whose, by) and own["against"].endswith(against):
                return 100 * own["recall_at_1"]["value"]
        raise KeyError(f"no retrieval of {whose} by {by} against {against}")

    return of


POOLS = {"RD100": "100 random images", "bags of 3": "bags of 3", "bags of 5": "bags of 5", "bags of 7": "bags of 7"}
GAINS: dict[str, Callable[[Numbers], float]] = {
    **{name: recall("evaluated", "judge", pool) for name, pool in POOLS.items()},
    "RD100, reward scorer": recall("evaluated", "reward scorer", POOLS["RD100"]),
    "bags of 5, reward scorer": recall("evaluated", "reward scorer", POOLS["bags of 5"]),
}
OTHERS: dict[str, Callable[[Numbers], float]] = {
    "CIDEr": lambda own: own["caption_metrics"]["CIDEr"],
    "distinct-2": lambda own: own["caption_metrics"]["distinct_2"],
    "words": lambda own: own["caption_metrics"]["mean_length"],
    "repeated words, %": lambda own: 100 * own["caption_metrics"]["repeated_words"],
    "trailing space, %": lambda own: 100 * own["caption_metrics"]["trailing_space"],
    "ended, %": lambda own: 100 * own["caption_metrics"]["ended"],
    "captions/s": lambda own: own["captions_per_s"],
    "training, min": lambda own: own["training_s"] / 60,
}


def markdown(results: list[Numbers]) -> str:
    if not results:
        return "no results yet\n"
    order = [name for name in (MLE, *RECIPES) if any(own["recipe"] == name for own in results)]
    seeds = {name: {own["seed"]: own for own in results if own["recipe"] == name} for name in order}
    split, images = results[0]["split"], results[0]["images"]
    lines = [
        f"{images} photos of {split}; R@1 in percent by the judge, mean of the seeds ± standard error; in brackets the gain over MLE of the same seeds.",
        "",
        *_table(seeds, GAINS, with_gain=True),
        "",
        "Human captions (every one a candidate): "
        + ", ".join(f"{name} {recall('human', 'judge', pool)(results[0]):.1f}" for name, pool in POOLS.items())
        + ".",
        "",
        *_table(seeds, OTHERS, with_gain=False),
    ]
    return "\n".join(lines) + "\n"


def _table(seeds: dict[str, dict[int, Numbers]], columns: dict[str, Callable], with_gain: bool) -> list[str]:
    lines = ["| recipe | seeds | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for name, own in seeds.items():
        cells = [_cell(of, own, seeds.get(MLE, {}) if with_gain and name != MLE else {}) for of in columns.values()]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def _cell(of: Callable[[Numbers], float], own: dict[int, Numbers], start: dict[int, Numbers]) -> str:
    cell = _spread([of(numbers) for numbers in own.values()], "")
    gains = [of(numbers) - of(start[seed]) for seed, numbers in own.items() if seed in start]
    return f"{cell} ({_spread(gains, '+')})" if gains else cell


def _spread(values: list[float], sign: str) -> str:
    digits = 1 if max(map(abs, values)) >= 10 or sign else 3
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{error}"
