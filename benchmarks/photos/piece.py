"""One piece of the photo benchmark: a recipe with a seed, trained and evaluated on a split; what others made is linked, not redone.

ROOT/shared         features, reward scorer, judge, bags of dev and test (seed 0: every recipe and seed is asked the same)
ROOT/SEED/mle       the captioner that the recipes of this seed start from
ROOT/SEED/RECIPE    its bags where they differ, and RL; a recipe that is the last weights of another's run has no folder
ROOT/SEED/RECIPE-SPLIT.json   its captions
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from recipes import DEFAULT, MLE, RECIPES
from rich.console import Console

from finecap_ray.config import Settings, load_settings
from finecap_ray.evaluation.evaluate import Request, evaluate
from finecap_ray.pipeline import Pipeline
from finecap_ray.training.checkpoints import last_checkpoint
from finecap_ray.training.metrics_file import read_metrics

SCORERS = ("features", "scorer", "judge", "embeddings")
CURVE_STEPS = 10
CURVE = {
    "self_retrieval": "rewards/self_retrieval/mean",
    "recall_at_1": "accuracy",
    "cider": "rewards/cider/mean",
    "tokens": "completions/mean_length",
    "entropy": "entropy",
}
KEPT = ("retrieval", "caption_metrics", "similarity", "versions", "images")


@dataclass(frozen=True, slots=True)
class Piece:
    preset: str
    recipe: str  # MLE or a key of RECIPES
    seed: int
    split: str


def run_piece(piece: Piece, root: Path, overrides: list[str], console: Console) -> dict[str, Any]:
    """Trains what isn't there and evaluates it. Killed, it goes on from its last checkpoint. Returns the numbers."""
    shared = _pipeline(piece.preset, root / "shared", 0, overrides, console)
    judge, scorer, bags = shared.judge.spec, shared.scorer.spec, shared.bags(piece.split).folder

    of_seed = root / f"seed-{piece.seed}"
    start_folder = of_seed / MLE
    _link(root / "shared", start_folder, SCORERS)
    start = _pipeline(piece.preset, start_folder, piece.seed, overrides, console)
    captioner = start.mle
    if piece.recipe == MLE:
        used, weights, seconds, folder = overrides, "result", captioner.seconds, captioner.folder
    else:
        recipe = RECIPES[piece.recipe]
        run = recipe.last_weights_of or piece.recipe
        changes = RECIPES[run].changes
        own, used = of_seed / run, [*overrides, *changes]
        _link(start_folder, own, (*SCORERS, MLE))
        if not any(change.startswith("bags.") for change in changes):
            _link(of_seed / DEFAULT, own, ("bags",))
        trained = _pipeline(piece.preset, own, piece.seed, used, console).rl
        seconds = trained.seconds
        if recipe.last_weights_of:
            weights, folder = "last", last_checkpoint(trained.folder / "checkpoints")
        else:
            weights, folder = "result", trained.folder / "captioner"

    against = f"[random:100, 'bags:{bags}']"
    asked = _settings(piece.preset, root / "shared", 0, [*overrides, f"evaluation.against={against}"])
    captions = of_seed / f"{piece.recipe}-{piece.split}.json"
    found = evaluate(asked, Request(None, str(folder), (piece.split,), judge, scorer, str(captions)))
    return {
        "recipe": piece.recipe,
        "seed": piece.seed,
        "split": piece.split,
        "overrides": used,
        "weights": weights,
        "training_s": seconds,
        "captions_per_s": found["images"] / found["seconds"]["sampling"],
        "curve": [] if piece.recipe == MLE else _curve(trained.folder / "metrics.jsonl"),
    } | {key: found[key] for key in KEPT}


def _curve(metrics: Path) -> list[dict[str, float]]:
    """Means of every ten steps, of the captions sampled in training."""
    steps = [row for row in read_metrics(metrics) if CURVE["self_retrieval"] in row]
    parts = [steps[start : start + CURVE_STEPS] for start in range(0, len(steps), CURVE_STEPS)]
    return [
        {"step": part[-1]["step"]}
        | {name: mean(step[key] for step in part) for name, key in CURVE.items() if key in part[0]}
        for part in parts
    ]


def _settings(preset: str, run_dir: Path, seed: int, overrides: list[str]) -> Settings:
    return load_settings(preset, [*overrides, f"seed={seed}", f"run_dir={run_dir}"])


def _pipeline(preset: str, run_dir: Path, seed: int, overrides: list[str], console: Console) -> Pipeline:
    return Pipeline.narrated(_settings(preset, run_dir, seed, overrides), console)


def _link(source: Path, target: Path, stages: tuple[str, ...]) -> None:
    """A link can't be thrown away by a stage with other inputs, as a copy would: that is an error."""
    target.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        made, link = (source / stage).resolve(), target / stage
        if made != link.resolve() and made.is_dir() and not link.exists():
            link.symlink_to(made)
