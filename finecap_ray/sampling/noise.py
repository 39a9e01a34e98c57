"""The noise that captions with seeds are drawn with on a CPU: vLLM's sampling, with numpy's generators.

A token is the argmax of p / e with e ~ Exp(1) per token of the vocabulary (the exponential race, as vLLM draws). vLLM fills the
row of a seeded request by torch's Mersenne twister, which for 360 captions takes longer than the forward pass of a small
decoder; numpy's SFC64 with its ziggurat is five times faster. A GPU keeps vLLM's own way.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p


class SeededSampler(TopKTopPSampler):
    """Takes the place of vLLM's; each request goes on with the generator that its seed began."""

    def __init__(self) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self._noise: WeakKeyDictionary[torch.Generator, np.random.Generator] = WeakKeyDictionary()

    def forward_cpu(
        self,
        logits: Float[Tensor, "C V"],
        generators: dict[int, torch.Generator],
        k: Int[Tensor, " C"] | None,
        p: Float[Tensor, " C"] | None,
    ) -> tuple[Int[Tensor, " C"], Float[Tensor, "C V"]]:
        """Tokens, and the log-probs they were drawn from. `generators` by row: vLLM's, of which only the seeds are used."""
        if len(generators) < len(logits):
            return super().forward_cpu(logits, generators, k, p)
        logprobs = apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        noise = np.empty(logits.shape)
        for row, generator in generators.items():
            self._generator(generator).standard_exponential(out=noise[row])
        return logprobs.exp().div_(torch.from_numpy(noise).float()).argmax(dim=-1), logprobs

    def _generator(self, of: torch.Generator) -> np.random.Generator:
        if (noise := self._noise.get(of)) is None:
            noise = self._noise[of] = np.random.Generator(np.random.SFC64(of.initial_seed()))
        return noise


def use_seeded_sampler(worker) -> None:
    """For `collective_rpc`: `worker` is vLLM's."""
    worker.model_runner.sampler.topk_topp_sampler = SeededSampler()
