"""What is looked at before Ray starts: the arithmetic of the steps, what trains, and whether a training run is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from finecap_ray.bags.truematch import read_truematch
from finecap_ray.config import Settings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.paths import absolute
from finecap_ray.stages import STAGE_FILE
from finecap_ray.training.arithmetic import describe_mle, describe_rl, rl_arithmetic

TrainingStage = Literal["mle", "rl"]


def describe_training(settings: Settings, stage: TrainingStage) -> str:
    """The batch arithmetic of a training stage. Raises ConfigError for one that can't be."""
    if stage == "mle":
        return describe_mle(settings.mle)
    return describe_rl(settings.rl, mined_bags(settings))


def check(settings: Settings) -> None:
    """Raises what the functions below do, and `check_models` and `read_truematch`, for a run that can't be."""
    from finecap_ray.models import check_models

    rl_arithmetic(settings.rl, {})
    if settings.bags.truematch is not None:
        read_truematch(settings.bags.truematch)
    check_models(settings)
    check_captioner(settings)
    check_workers(settings)


def check_workers(settings: Settings) -> None:
    """Raises ConfigError where Ray may put several workers of a training on one GPU."""
    workers, resources = max(settings.mle.num_workers, settings.rl.num_workers), settings.resources
    if resources.use_gpu and resources.gpu_share <= 0.5 and workers > 1:
        raise ConfigError(
            f"resources.gpu_share={resources.gpu_share:g} would put several of {workers} workers on one GPU, which NCCL refuses: "
            "set it to 1, or rl.num_workers and mle.num_workers to 1"
        )


def check_engine(use_gpu: bool, for_gpus: bool) -> None:
    """Raises ConfigError where vllm was built for other processors than it is to sample on."""
    if for_gpus != use_gpu:
        built, extra = ("GPUs", "cpu") if for_gpus else ("CPUs", "gpu")
        raise ConfigError(
            f"resources.use_gpu={str(use_gpu).lower()}, and the vllm that is installed samples on {built} only: set "
            f"resources.use_gpu={str(for_gpus).lower()}, or install the extra [{extra}] in its place"
        )


def check_captioner(settings: Settings) -> None:
    """Raises DataError, UnsupportedError or MismatchError for a captioner that isn't there, or that trainer and sampler don't
    both run, and ConfigError where what is to train isn't part of it, or its captions can't be as long as they may be."""
    # Only then are transformers imported and an architecture built, which takes seconds.
    if settings.captioner.spec is not None or settings.rl.trainable.decoder == "lora":
        from finecap_ray.training.parts import check_trainable

        check_trainable(settings)
    if settings.captioner.spec is not None:
        _check_start(settings)


def _check_start(settings: Settings) -> None:
    from finecap_ray.captioners import family_of
    from finecap_ray.captioners.loader import load_processor

    captioner = settings.captioner
    family = family_of(*load_processor(captioner.spec, captioner))
    if captioner.max_tokens > family.longest_caption:
        smaller = ", or captioner.image_size" if family.reads == "image" else ""
        raise ConfigError(
            f"captioner.max_tokens={captioner.max_tokens}: behind its longest prompt {captioner.spec} has room for "
            f"{max(0, family.longest_caption)} tokens: lower max_tokens{smaller}"
        )
    if family.reads == "image" and settings.mle.epochs:
        raise ConfigError(
            f"mle.epochs={settings.mle.epochs}: maximum likelihood trains a ClipCap, and {captioner.spec} is an image-text "
            "model: set mle.epochs=0, and RL starts from it as it is"
        )


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
