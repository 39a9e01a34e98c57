"""The weights that a run ends with: a moving average of those it had on its way, and of that and its start a mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from finecap_ray.errors import MismatchError
from finecap_ray.training.parts import read_trained, trained

AVERAGE_FILE = "average.safetensors"  # in a checkpoint, beside the weights that go on training


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights that train, copied into the model when training ends: a_0 = w_0, a_t = decay a_{t-1} + (1 - decay) w_t.

    w_t are the weights after optimizer step t (of LoRA both factors, each by itself), so 1 / (1 - decay) steps count, and of a shorter run the
    start does too. WARP (Rame 2024, arXiv:2406.16768) finds that such averages keep more of the start for the same reward.
    Samplers and checkpoints have the weights that train.
    """

    def __init__(self, decay: float) -> None:
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] | None = None

    def on_train_begin(self, args, state, control, model=None, **unused: Any) -> None:
        own = trained(model)
        if self._average is None:
            self._average = {name: tensor.clone() for name, tensor in own.items()}
        self._average = {name: tensor.to(own[name].device) for name, tensor in self._average.items()}

    def on_step_end(self, args, state, control, model=None, **unused: Any) -> None:
        own = trained(model)
        self._update(list(self._average.values()), [own[name] for name in self._average], None)

    def on_train_end(self, args, state, control, model=None, **unused: Any) -> None:
        for name, tensor in trained(model).items():
            tensor.copy_(self._average[name])

    def save(self, folder: str | Path) -> None:
        save_file(self._average, str(Path(folder) / AVERAGE_FILE))

    def load(self, folder: str | Path, model: torch.nn.Module) -> None:
        """Raises MismatchError where the checkpoint has no average of what this model trains."""
        average, fits = read_trained(Path(folder) / AVERAGE_FILE, trained(model))
        if not fits:
            raise MismatchError(
                f"the checkpoint {folder} has no average of the weights that train: resume with the rl.average_decay and "
                "rl.trainable it was made with"
            )
        self._average = average


@torch.no_grad()
def mix_into(start: PreTrainedModel, weights: Mapping[str, Tensor], share: float) -> None:
    """Interpolates in place: start = (1 - share) start + share weights.

    WiSE-FT (Wortsman 2022, arXiv:2109.01903). `weights` are those of the captioner by name, LoRA merged. Tied weights are mixed once.
    """
    for name, parameter in start.named_parameters():
        parameter.lerp_(weights[name].to(parameter), share)
