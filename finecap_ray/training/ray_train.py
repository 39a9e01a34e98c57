"""Run a train function on Ray Train workers, with errors a person can read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
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

_WRAPPED = ("_base_exc", "health_check_failure", "__cause__")


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
        causes = list(_causes(failure))
        for cause in causes:
            if isinstance(cause, FinecapError):
                raise cause from None
        if any(isinstance(cause, RayActorError) for cause in causes):
            raise LostWorkerError(
                "a training worker is gone: its node was taken away, or memory ended (Ray's logs say which). --resume goes on from "
                "the last checkpoint"
            ) from None
        kind = type(getattr(failure, "controller_failure", None)).__name__
        if kind == "WorkerGroupStartupTimeoutError":  # which isn't public
            workers = "a training worker" if num_workers == 1 else f"{num_workers} training workers"
            raise DeadlineError(
                f"no room for {workers} of {resources.asked} within resources.start_timeout_s={resources.start_timeout_s:.0f} s: "
                "`ray status` tells what takes the rest; take fewer samplers and scorers, a smaller resources.gpu_share, or a "
                "larger cluster"
            ) from None
        raise


def _causes(failure: ray.train.TrainingFailedError) -> Iterator[BaseException]:
    """Of a worker's failure, or the controller's, and of each what it was raised for."""
    for error in (*getattr(failure, "worker_failures", {}).values(), getattr(failure, "controller_failure", None)):
        while error is not None:
            yield error
            # Ray wraps a worker's own error, and that of a worker which doesn't answer any more.
            error = next(filter(None, (getattr(error, name, None) for name in _WRAPPED)), None)


def _run_worker(work: ray.ObjectRef) -> None:
    worker, config = ray.get(work)
    if ray.train.get_context().get_world_size() == 1:
        # accelerate takes any LOCAL_RANK for a distributed run, and wraps a lone model in DistributedDataParallel, whose
        # buckets cost 4 to 9 % of a small model's step and share nothing with anyone.
        os.environ.pop("LOCAL_RANK", None)
    worker(config)
