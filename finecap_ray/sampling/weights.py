"""Versioned weights through Ray's object store.

The trainer publishes; a sampler that is asked for a version it doesn't have pulls the newest one first. The board is an
actor of its own and owns the stored copy, so a restarted sampler finds the current weights even while the trainer is down.

    trainer --publish(version, tensors)--> WeightBoard --latest()--> sampler
            `---------------take(version, tensors)-----------------> sampler     (the same, while the trainer is up)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from finecap_ray.cluster import get_within

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Weights:
    version: int
    tensors: ray.ObjectRef  # {name: Stored}; names are those of the trained model's state dict


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the object store, which hands out arrays without a copy. numpy has no bfloat16: its bits are int16 there."""

    array: np.ndarray
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stored:
        own = tensor.detach().cpu()
        bits = own.view(torch.int16) if own.dtype == torch.bfloat16 else own
        return cls(bits.numpy(), own.dtype)

    def tensor(self) -> torch.Tensor:
        """Without a copy: nobody writes to it."""
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it can't be written to
            return torch.from_numpy(self.array).view(self.dtype)


@ray.remote(num_cpus=0, max_restarts=0)
class WeightBoard:
    """Holds the newest weights of one policy."""

    def __init__(self) -> None:
        self._newest: Weights | None = None

    def publish(self, version: int, tensors: dict[str, Stored], *after: None) -> None:
        """Ray doesn't call before `after` is there. Raises ValueError when `version` isn't newer than the one held: weights never go back."""
        if self._newest is not None and version <= self._newest.version:
            raise ValueError(f"weights {version} published after {self._newest.version}")
        self._newest = None  # else the store would hold these weights twice, and the ones before
        self._newest = Weights(version, ray.put(tensors))

    def latest(self) -> Weights | None:
        return self._newest


def publish(board: ActorHandle, version: int, state_dict: dict, timeout_s: float) -> None:
    """Publishes a torch state dict and waits until the board holds it. Raises DeadlineError."""
    late = f"the weight board didn't take weights {version} within {timeout_s:.0f} s: its node is gone or overloaded"
    get_within(board.publish.remote(version, stored(state_dict)), timeout_s, late)


def stored(state_dict: dict) -> ray.ObjectRef:
    """A torch state dict in the object store, tied tensors once."""
    held: dict[tuple, Stored] = {}
    return ray.put({name: _once(held, tensor, Stored.of) for name, tensor in state_dict.items()})


def as_engine_holds(
    state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype, beside: str | None
) -> dict[str, torch.Tensor]:
    """The weights of a model that trains as an engine of that type holds them: half the bytes to send where that is bfloat16.

    They are in the memory of the CPU. Names that begin with `beside` run beside the engine, as they are trained. Tied tensors stay
    tied.
    """
    held: dict[tuple, torch.Tensor] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    return {
        name: tensor.cpu() if beside is not None and name.startswith(beside) else _once(held, tensor, cast)
        for name, tensor in state_dict.items()
    }


def _once(made: dict[tuple, T], tensor: torch.Tensor, make: Callable[[torch.Tensor], T]) -> T:
    """make(tensor); of tensors that are the same memory the first one's."""
    place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if place not in made:
        made[place] = make(tensor)
    return made[place]
