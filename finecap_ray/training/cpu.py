"""What makes training a captioner faster on a CPU, and keeps its memory from growing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from finecap_ray.captioners.clipcap import ClipCapPreTrainedModel
from finecap_ray.heap import trim_heap


def suit_cpu(model: PreTrainedModel) -> None:
    """For a model that is about to train in this thread.

    Numbers below 1e-38 become 0, which a CPU computes slowly and no result depends on: a step's gradients are shared out over
    thousands of tokens, and attention's backward pass took five times as long over them. And a ClipCap's attention is eager: a
    caption and its prefix are too short for the fused kernel to pay (in bfloat16 an update takes 0.7 of the time).
    """
    torch.set_flush_denormal(True)
    if isinstance(model, ClipCapPreTrainedModel):
        model.set_attn_implementation("eager")


class TrimHeap(TrainerCallback):
    """Gives the system back, every so many steps, what freed tensors have left in the heap."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args, state, control, **unused: Any) -> None:
        if state.global_step % self.every == 0:
            trim_heap()
