"""What is looked at before Ray starts: the arithmetic of the steps, what trains, and whether a training run is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from finecap_ray.cluster import absolute
from finecap_ray.config import Settings
from finecap_ray.errors import DataError
from finecap_ray.stages import STAGE_FILE
from finecap_ray.training.arithmetic import describe_mle, describe_rl

TrainingStage = Literal["mle", "rl"]


def describe_training(settings: Settings, stage: TrainingStage) -> str:
    """The batch arithmetic of a training stage. Raises ConfigError for one that can't be."""
    if stage == "mle":
        return describe_mle(settings.mle)
    check_captioner(settings)
    return describe_rl(settings.rl, mined_bags(settings))


def check_captioner(settings: Settings) -> None:
    """Raises DataError, UnsupportedError or MismatchError for a captioner that isn't there, or that trainer and sampler don't
    both run, and ConfigError where what is to train isn't part of it."""
    # Only then are transformers imported and an architecture built, which takes seconds.
    if settings.captioner.spec is not None or settings.rl.trainable.decoder == "lora":
        from finecap_ray.training.parts import check_trainable

        check_trainable(settings)


def mined_bags(settings: Settings) -> dict[int, int]:
    """Number of bags per size of the training bag set in the run folder; empty where there is none."""
    from finecap_ray.bags.bag_set import MANIFEST_FILE, read_manifest

    folder = Path(absolute(settings.run_dir)) / "bags" / "train"
    if not (folder / MANIFEST_FILE).is_file():
        return {}
    return {int(size): facts["bags"] for size, facts in read_manifest(folder)["sizes"].items()}


def refuse_existing(settings: Settings, stage: TrainingStage) -> None:
    """Raises DataError when the run folder holds this stage, finished or not."""
    if (Path(absolute(settings.run_dir)) / stage / STAGE_FILE).is_file():
        raise DataError(
            f"run folder {settings.run_dir} exists and holds {stage}: use --resume to go on, or another run_dir to start anew"
        )
