"""A short fingerprint of weights: artefacts made with one model refuse those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def weight_digest(tensors: Mapping[str, torch.Tensor], *facts: object) -> str:
    """16 hex digits of the SHA-256 over names, shapes, dtypes and bytes of `tensors`, and over `facts` (e.g. the image size)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    for fact in facts:
        digest.update(repr(fact).encode())
    return digest.hexdigest()[:16]
