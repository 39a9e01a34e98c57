"""Where bfloat16 pays: a GPU that computes in it, or a CPU with instructions for it (AMX, AVX-512 BF16); others emulate it slowly."""

from __future__ import annotations

from typing import Literal

import torch

from finecap_ray.config_models import Autocast, Precision


def computes_bf16(use_gpu: bool) -> bool:
    """Whether this machine does natively."""
    if use_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))


def autocasts(asked: Autocast, use_gpu: bool) -> bool:
    """Whether to train under bfloat16 autocast; `auto` asks the machine. Call it where the training runs."""
    return computes_bf16(use_gpu) if asked == "auto" else asked


def dtype_of(asked: Precision, use_gpu: bool) -> Literal["float32", "bfloat16"]:
    """torch's name of the type to compute in; `auto` asks the machine. Call it where that is done."""
    if asked != "auto":
        return asked
    return "bfloat16" if computes_bf16(use_gpu) else "float32"
