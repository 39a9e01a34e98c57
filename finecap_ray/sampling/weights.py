"""Versioned weights through Ray's object store.

The trainer publishes; a sampler that is asked for a version it doesn't have pulls the newest one first. The board is an
actor of its own and owns the stored copy, so a restarted sampler finds the current weights even while the trainer is down.

    trainer --publish(version, tensors)--> WeightBoard --latest()--> sampler
            `---------------take(version, tensors)-----------------> sampler     (the same, while the trainer is up)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from finecap_ray.cluster import get_within


@dataclass(frozen=True, slots=True)
class Weights:
    version: int
    tensors: ray.ObjectRef  # {name: array}; names are those of the trained model's state dict


@ray.remote(num_cpus=0, max_restarts=0)
class WeightBoard:
    """Holds the newest weights of one policy."""

    def __init__(self) -> None:
        self._newest: Weights | None = None

    def publish(self, version: int, tensors: dict[str, np.ndarray], *after: None) -> None:
        """Ray doesn't call before `after` is there. Raises ValueError when `version` isn't newer than the one held: weights never go back."""
        if self._newest is not None and version <= self._newest.version:
            raise ValueError(f"weights {version} published after {self._newest.version}")
        self._newest = Weights(version, ray.put(tensors))

    def latest(self) -> Weights | None:
        return self._newest


def publish(board: ActorHandle, version: int, state_dict: dict, timeout_s: float) -> None:
    """Publishes a torch state dict and waits until the board holds it. Raises DeadlineError."""
    late = f"the weight board didn't take weights {version} within {timeout_s:.0f} s: its node is gone or overloaded"
    get_within(board.publish.remote(version, stored(state_dict)), timeout_s, late)


def stored(state_dict: dict) -> ray.ObjectRef:
    """A torch state dict as arrays in the object store, tied tensors once."""
    arrays: dict[tuple, np.ndarray] = {}

    def array(tensor: torch.Tensor) -> np.ndarray:
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        return arrays.setdefault(place, tensor.detach().cpu().numpy())

    return ray.put({name: array(tensor) for name, tensor in state_dict.items()})
