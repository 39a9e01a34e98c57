"""Tokens that no caption may hold, such as image placeholders: -inf in the logits of every request.

The trainer's model lets them no probability either (`captioners.vlm.ban_tokens`), so the log-probs stay those of one
distribution. vLLM's `logit_bias` ends at -100 and `allowed_token_ids` holds a mask of the whole vocabulary per request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


def banned_tokens(token_ids: Sequence[int]) -> type[LogitsProcessor]:
    """A logits processor for vllm.LLM, which makes it of a class."""

    class BannedTokens(LogitsProcessor):
        def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
            self._ids = torch.tensor(token_ids, device=device)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill_(-1, self._ids, float("-inf"))

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update) -> None:
            """It is the same for every request."""

    return BannedTokens
