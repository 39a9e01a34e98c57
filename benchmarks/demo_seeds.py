"""The demo with several seeds: what RL adds to R@1 by the judge, mean and standard error, seen and unseen families apart.

    python benchmarks/demo_seeds.py --seeds 0 1 2

The seed changes MLE (initialisation, order), bags (ties) and RL (order, samples). Features, scorer and judge don't depend
on it and are taken from the first run. Writes benchmarks/results/demo_seeds.json and .md; a second call only prints.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

from finecap_ray.config import load_settings
from finecap_ray.console import plain_console
from finecap_ray.demo import run_demo

RESULTS = Path(__file__).parent / "results"
SHARED_STAGES = ("features", "scorer", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--root", default="runs/demo_seeds")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, before any option")
    arguments = parser.parse_args()

    summaries = []
    for seed in arguments.seeds:
        run_dir = Path(arguments.root) / f"seed-{seed}"
        first = Path(arguments.root) / f"seed-{arguments.seeds[0]}"
        for stage in SHARED_STAGES:
            if (first / stage).is_dir() and not (run_dir / stage).is_dir():
                shutil.copytree(first / stage, run_dir / stage)
        settings = load_settings(arguments.config, [*arguments.overrides, f"seed={seed}", f"run_dir={run_dir}"])
        summaries.append(run_demo(settings, plain_console()))

    table = {group: _row([summary["groups"][group] for summary in summaries]) for group in summaries[0]["groups"]}
    cider = {system: [summary["caption_metrics"][system]["CIDEr"] for summary in summaries] for system in ("mle", "rl")}
    result = {
        "seeds": arguments.seeds,
        "overrides": arguments.overrides,
        "groups": table,
        "cider": cider,
        "cider_ratio": mean(cider["rl"]) / mean(cider["mle"]),
        "seconds": [summary["seconds"] for summary in summaries],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo_seeds.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "demo_seeds.md").write_text(_markdown(result), encoding="utf-8")
    print(_markdown(result))


def _row(groups: list[dict]) -> dict:
    """Means over seeds, in percent; the standard error of the gain is over seeds."""
    gains = [100 * (group["recall_at_1"]["rl"] - group["recall_at_1"]["mle"]) for group in groups]
    row = {"bags": groups[0]["bags"], "gain": mean(gains), "gains": gains}
    row |= {system: 100 * mean(group["recall_at_1"][system] for group in groups) for system in ("mle", "rl", "human")}
    row["gain_by_reward_scorer"] = 100 * mean(
        group["recall_at_1_by_reward_scorer"]["rl"] - group["recall_at_1_by_reward_scorer"]["mle"] for group in groups
    )
    row["standard_error"] = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return row


def _markdown(result: dict) -> str:
    lines = [
        f"R@1 in percent by the judge, mean of seeds {', '.join(map(str, result['seeds']))} (`python benchmarks/demo_seeds.py`).",
        "",
        "| bags | n | MLE | RL | gain | standard error | by the reward scorer | human captions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, row in result["groups"].items():
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.1f}"
        lines.append(
            f"| {group} | {row['bags']} | {row['mle']:.1f} | {row['rl']:.1f} | {row['gain']:+.1f} | {error} "
            f"| {row['gain_by_reward_scorer']:+.1f} | {row['human']:.1f} |"
        )
    lines += ["", f"CIDEr of RL / MLE: {100 * result['cider_ratio']:.1f} %.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
