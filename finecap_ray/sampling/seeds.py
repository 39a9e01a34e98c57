"""A seed belongs to (run, step, image): a caption doesn't depend on which actor samples it, nor on its neighbours."""

from __future__ import annotations

import hashlib


def caption_seed(run_seed: int, step: int, image_id: str) -> int:
    """Seed of the first caption of an image at a step; the engine samples caption g of G with seed + g. In [0, 2**62)."""
    digest = hashlib.sha256(f"{run_seed}/{step}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
