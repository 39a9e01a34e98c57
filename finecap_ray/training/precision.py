"""Where bfloat16 pays: a GPU that computes in it, or a CPU with instructions for it (AMX, AVX-512 BF16)."""

from __future__ import annotations

from typing import Literal

import torch


def autocasts(asked: bool | Literal["auto"], use_gpu: bool) -> bool:
    """Whether to train under bfloat16 autocast; `auto` asks the machine. Call it where the training runs."""
    if asked != "auto":
        return asked
    if use_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))
