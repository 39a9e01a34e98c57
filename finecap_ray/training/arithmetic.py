"""What a step is made of: bags x images x captions -> sequences, per step and per worker. Pure; done before Ray starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finecap_ray.bags.curriculum import bags_per_step, band_rows, step_sizes
from finecap_ray.config import MleSettings, RlSettings
from finecap_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StageArithmetic:
    """A full step of one stage of the curriculum; `per worker` is the worker that has most."""

    bag_size: int
    epochs: int
    bags: int  # whole bags in a step
    images: int
    sequences: int  # captions sampled, scored and learnt from in a step
    bags_per_worker: int
    sequences_per_worker: int
    micro_batches: int  # forward passes of a worker in a step
    steps_per_epoch: int | None  # None where the bags aren't mined yet


def rl_arithmetic(rl: RlSettings, bag_counts: Mapping[int, int]) -> list[StageArithmetic]:
    """One entry per stage of the curriculum. `bag_counts`: bags of each size, of those that are known.

    Raises ConfigError, with the numbers, for steps that can't be.
    """
    # As many as the trainer makes of `images_per_step`; a step of whole bags may be a little smaller.
    per_worker = rl.images_per_step * rl.captions_per_image // rl.num_workers
    micro_batches = -(-per_worker // rl.micro_batch)
    stages = []
    for stage in rl.curriculum:
        size = stage.bag_size
        bags = bags_per_step(size, rl.images_per_step, rl.num_workers)
        most = -(-bags // rl.num_workers)
        fewest, steps = bags // rl.num_workers, None
        if size in bag_counts:
            own = len(band_rows(bag_counts[size], stage.band))
            steps = step_sizes(own, size, rl.images_per_step, rl.num_workers).count
        if fewest * size * rl.captions_per_image < micro_batches:
            raise ConfigError(
                f"a worker's smallest share of a full step is {fewest} bags x {size} images x {rl.captions_per_image} captions = "
                f"{fewest * size * rl.captions_per_image} sequences, fewer than its {micro_batches} micro-batches "
                f"({per_worker} sequences of a full step / rl.micro_batch {rl.micro_batch}): raise rl.micro_batch"
            )
        stages.append(
            StageArithmetic(
                bag_size=size,
                epochs=stage.epochs,
                bags=bags,
                images=bags * size,
                sequences=bags * size * rl.captions_per_image,
                bags_per_worker=most,
                sequences_per_worker=most * size * rl.captions_per_image,
                micro_batches=micro_batches,
                steps_per_epoch=steps,
            )
        )
    return stages


def describe_rl(rl: RlSettings, bag_counts: Mapping[int, int]) -> str:
    """A line per stage of the curriculum, and the number of steps where it is known. Raises as `rl_arithmetic`."""
    stages = rl_arithmetic(rl, bag_counts)
    lines = [_stage_line(stage, rl) for stage in stages]
    known = [stage.steps_per_epoch * stage.epochs for stage in stages if stage.steps_per_epoch is not None]
    if len(known) == len(stages):
        stop = f", stopped after {rl.max_steps} (rl.max_steps)" if rl.max_steps and rl.max_steps < sum(known) else ""
        lines.append(f"together {sum(known)} steps{stop}")
    return "\n".join(lines)


def mle_steps(mle: MleSettings, captions: int) -> int:
    """Optimizer steps of a whole MLE on that many captions."""
    return mle.epochs * -(-captions // (mle.batch_size * mle.num_workers))


def describe_mle(mle: MleSettings) -> str:
    return (
        f"{mle.batch_size} captions per worker x {_count(mle.num_workers, 'worker')} = "
        f"{mle.batch_size * mle.num_workers} sequences per step, {_count(mle.epochs, 'epoch')}"
    )


def _stage_line(stage: StageArithmetic, rl: RlSettings) -> str:
    steps = (
        "steps known once the bags are mined"
        if stage.steps_per_epoch is None
        else f"{stage.steps_per_epoch} steps each"
    )
    return (
        f"{stage.bags} bags x {stage.bag_size} images x {rl.captions_per_image} captions = {stage.sequences} sequences per step; "
        f"{_count(rl.num_workers, 'worker')}: {stage.bags_per_worker} bags, {stage.sequences_per_worker} sequences per worker in "
        f"{_count(stage.micro_batches, 'micro-batch', 'micro-batches')}; {_count(stage.epochs, 'epoch')}, {steps}"
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
