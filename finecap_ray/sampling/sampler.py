"""The sampler: one caption engine in a Ray actor, which never serves captions of older weights than it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finecap_ray.cluster import get_within
from finecap_ray.config import ResourceSettings
from finecap_ray.errors import ConfigError, DeadlineError, StaleWeightsError
from finecap_ray.heap import trim_heap
from finecap_ray.records import Rollout
from finecap_ray.sampling.weights import Stored, WeightBoard, Weights, publish, stored


@ray.remote(max_restarts=3, max_task_retries=3)
class Sampler:
    """Pulls the current weights before its first caption, also after a restart."""

    def __init__(self, captioner: str, board: ActorHandle, resources: ResourceSettings, log: str) -> None:
        """`captioner` is the folder whose architecture and tokenizer are sampled from; the weights come from `board`."""
        from finecap_ray.captioners import load_captioner
        from finecap_ray.sampling.engine import CaptionEngine
        from finecap_ray.training.logs import redirect_output

        redirect_output(Path(log))
        torch.set_num_threads(resources.threads)
        model, processor = load_captioner(captioner)
        self.engine = CaptionEngine(model, processor, resources)
        del model  # the engine has read its architecture, and keeps what of it runs beside
        trim_heap()
        self.board = board
        self.timeout_s = resources.step_timeout_s

    def ready(self) -> str:
        """torch's name of the type that the engine computes in."""
        return str(self.engine.dtype).removeprefix("torch.")

    def sync(self, weights_version: int) -> None:
        """Holds weights of at least `weights_version` afterwards. Raises StaleWeightsError."""
        if self.engine.weights_version < weights_version:
            newest: Weights | None = self._from_board(self.board.latest.remote())
            if newest is None or newest.version < weights_version:
                held = "none" if newest is None else newest.version
                raise StaleWeightsError(
                    f"captions of weights {weights_version} were asked for, the board holds {held}: publish them first"
                )
            self._load(newest.version, self._from_board(newest.tensors))

    def take(self, weights_version: int, tensors: dict[str, Stored]) -> None:
        """Loads these weights, unless it has newer ones."""
        if self.engine.weights_version < weights_version:
            self._load(weights_version, tensors)

    def fingerprints(self, weights_version: int) -> dict[str, str]:
        """Of the weights it holds, of at least that version, by the names of the tensors."""
        self.sync(weights_version)
        return self.engine.fingerprints()

    def _load(self, weights_version: int, tensors: dict[str, Stored]) -> None:
        self.engine.load(weights_version, {name: held.tensor() for name, held in tensors.items()})

    def _from_board(self, reference: ray.ObjectRef):
        late = f"the weight board didn't answer within {self.timeout_s:.0f} s: its node is gone or overloaded"
        return get_within(reference, self.timeout_s, late)

    def publish_captioner(self, weights_version: int, captioner: str) -> None:
        """Puts the weights of a saved captioner of the same architecture on the board."""
        from finecap_ray.captioners import load_captioner

        model, _ = load_captioner(captioner)
        publish(self.board, weights_version, self.engine.as_held(model), self.timeout_s)

    def sample(
        self,
        weights_version: int,
        image_ids: Sequence[str],
        images: Any,
        spec,
        seeds: Sequence[int] | None,
    ) -> list[Rollout]:
        """Rollouts by weights of at least `weights_version`; see CaptionEngine.sample."""
        self.sync(weights_version)
        return self.engine.sample(image_ids, images, spec, seeds)


class SamplerPool:
    """Shares the images of a step among samplers; seeds make the outcome independent of how."""

    def __init__(self, captioner: str, resources: ResourceSettings, logs: str) -> None:
        """The engines' own output goes to files in the folder `logs`."""
        self.resources = resources
        # On this node, which outlives the others: what a restarted sampler asks must not sit on one that may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = WeightBoard.options(scheduling_strategy=here).remote()
        self._published: ray.ObjectRef = ray.put(None)  # what was sent last
        options = Sampler.options(num_cpus=1, num_gpus=resources.gpus)
        self.samplers = [
            options.remote(captioner, self.board, resources, f"{logs}/sampler-{index}.log")
            for index in range(resources.samplers)
        ]

    def wait_until_ready(self) -> str:
        """torch's name of the type that all samplers compute in.

        Raises DeadlineError naming the samplers that didn't start in time, ConfigError where `auto` isn't the same on all nodes.
        """
        waiting = [sampler.ready.remote() for sampler in self.samplers]
        ready, missing = ray.wait(waiting, num_returns=len(waiting), timeout=self.resources.start_timeout_s)
        dtypes = sorted(set(ray.get(ready)))  # raises what the start raised
        if missing:
            raise DeadlineError(
                f"{len(missing)} of {len(waiting)} samplers didn't start within {self.resources.start_timeout_s:.0f} s; "
                f"each needs {self.resources.asked}: see `ray status` for what the cluster has"
            )
        if len(dtypes) > 1:
            raise ConfigError(
                f"resources.sampler_dtype=auto is {' and '.join(dtypes)} on the nodes of the samplers, and captions must not "
                "depend on where they are sampled: set it to float32 or bfloat16"
            )
        return dtypes[0]

    def publish_captioner(self, weights_version: int, captioner: str) -> None:
        """From here on `sample` with that version captions with a saved captioner, such as a checkpoint."""
        self._get([self.samplers[0].publish_captioner.remote(weights_version, captioner)], f"load {captioner}")

    def sync(self, weights_version: int) -> None:
        """Every sampler holds weights of at least that version afterwards."""
        self._get(
            [sampler.sync.remote(weights_version) for sampler in self.samplers], f"take weights {weights_version}"
        )

    def send(self, weights_version: int, state_dict: dict[str, torch.Tensor]) -> Callable[[], None]:
        """Hands weights to every sampler and publishes them, without waiting. What is returned waits until all samplers hold
        them. The board takes them a moment later, while the samplers work: `fingerprints` waits for that."""
        tensors = stored(state_dict)
        taken = [sampler.take.remote(weights_version, tensors) for sampler in self.samplers]
        self._published = self.board.publish.remote(weights_version, tensors, *taken)
        return lambda: self._get(taken, f"take weights {weights_version}")

    def fingerprints(self, weights_version: int) -> Callable[[], list[dict[str, str]]]:
        """Asks every sampler for the fingerprints of its weights, without waiting: what is returned waits for them (one dict
        each, tensor name -> fingerprint), and until the board has what was sent."""
        asked = [sampler.fingerprints.remote(weights_version) for sampler in self.samplers]
        return lambda: self._get([self._published, *asked], "say which weights they hold")[1:]

    def sample(
        self, weights_version: int, image_ids: Sequence[str], images: Any, spec, seeds: Sequence[int] | None
    ) -> list[Rollout]:
        """As CaptionEngine.sample, over all samplers. Raises DeadlineError, StaleWeightsError."""
        shares = [share for share in np.array_split(np.arange(len(image_ids)), len(self.samplers)) if len(share)]
        calls = [
            sampler.sample.remote(
                weights_version,
                [image_ids[row] for row in share],
                _take(images, share),
                spec,
                None if seeds is None else [seeds[row] for row in share],
            )
            for sampler, share in zip(self.samplers, shares, strict=False)
        ]
        parts = self._get(calls, f"caption {len(image_ids)} images")
        return [rollout for part in parts for rollout in part]

    def timed_sample(
        self, weights_version: int, image_ids: Sequence[str], images: Any, spec
    ) -> tuple[list[Rollout], float]:
        """As `sample`, after a warm-up of a few images: the rollouts, and the seconds they took."""
        self.sample(weights_version, image_ids[:8], images[:8], spec, None)
        started = time.perf_counter()
        rollouts = self.sample(weights_version, image_ids, images, spec, None)
        return rollouts, time.perf_counter() - started

    def close(self) -> None:
        for sampler in self.samplers:
            ray.kill(sampler)
        ray.kill(self.board)

    def _get(self, references: list, doing: str) -> list:
        timeout_s = self.resources.step_timeout_s
        late = f"the samplers didn't {doing} within {timeout_s:.0f} s: their logs are in the run folder"
        return get_within(references, timeout_s, late)


def _take(images: Any, rows: np.ndarray) -> Any:
    return images[rows] if isinstance(images, np.ndarray) else [images[row] for row in rows]
