"""Run a train function on Ray Train workers, with errors a person can read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

from finecap_ray.config import ResourceSettings
from finecap_ray.errors import DeadlineError, FinecapError, LostWorkerError
from finecap_ray.training.workers import WAITS


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    num_workers: int,
    resources: ResourceSettings,
    logs: str,
) -> None:
    """Runs `worker(config)` on every worker and waits. A FinecapError of a worker is raised here as itself.

    Raises DeadlineError when there is no room for the workers within `resources.start_timeout_s`, LostWorkerError when one dies.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(resources.start_timeout_s)
    # By reference: Ray Train's controller, which passes it on, would load all model code to unpack it.
    work = ray.put((worker, config))
    trainer = TorchTrainer(
        partial(_run_worker, work),
        torch_config=TorchConfig(
            backend="nccl" if resources.use_gpu else "gloo", timeout_s=int(WAITS * resources.step_timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"CPU": 1, "GPU": resources.gpus} if resources.use_gpu else None,
        ),
        run_config=ray.train.RunConfig(
            storage_path=str(Path(logs).resolve()),
            name="ray_train",
            # A training goes on from its checkpoint when the user says so. Ray would try again, without a word and an end.
            failure_config=ray.train.FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as failure:
        stopped = getattr(failure, "controller_failure", None)
        errors = [*getattr(failure, "worker_failures", {}).values(), stopped]
        for error in errors:
            cause = getattr(error, "_base_exc", error)
            while cause is not None:
                if isinstance(cause, FinecapError):
                    raise cause from None
                cause = cause.__cause__
        if any(map(_is_of_a_dead_worker, errors)):
            raise LostWorkerError(
                "a training worker is gone: its node was taken away, or memory ended (Ray's logs say which). --resume goes on from "
                "the last checkpoint"
            ) from None
        if type(stopped).__name__ == "WorkerGroupStartupTimeoutError":  # which isn't public
            workers = "a training worker" if num_workers == 1 else f"{num_workers} training workers"
            raise DeadlineError(
                f"no room for {workers} of {resources.asked} within resources.start_timeout_s={resources.start_timeout_s:.0f} s: "
                "`ray status` tells what takes the rest; take fewer samplers and scorers, a smaller resources.gpu_share, or a "
                "larger cluster"
            ) from None
        raise


def _is_of_a_dead_worker(error: BaseException | None) -> bool:
    """And not of a sampler or scorer that a worker misses."""
    error = getattr(error, "health_check_failure", error)  # one of two ways in which Ray says it
    return isinstance(error, RayActorError) and "class_name: RayTrainWorker" in str(error)


def _run_worker(work: ray.ObjectRef) -> None:
    worker, config = ray.get(work)
    if ray.train.get_context().get_world_size() == 1:
        # accelerate takes any LOCAL_RANK for a distributed run, and wraps a lone model in DistributedDataParallel, whose
        # buckets cost 4 to 9 % of a small model's step and share nothing with anyone.
        os.environ.pop("LOCAL_RANK", None)
    worker(config)
