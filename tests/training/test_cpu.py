"""What training on a CPU sets: no result depends on it."""

import platform

import psutil
import pytest
import torch
from transformers import TrainerState

from finecap_ray.captioners.clipcap_family import FeatureImages
from finecap_ray.captioners.family import training_batch
from finecap_ray.training.cpu import TrimHeap, suit_cpu


def test_a_captioner_suited_to_the_cpu_computes_the_same(captioner):
    model, processor = captioner
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = training_batch(
        FeatureImages(torch.randn(3, model.config.feature_dim), tuple(processor.prompt_token_ids())),
        [0, 1, 1, 2],
        [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]],
        0,
    )
    before = model.train()(**batch).loss
    tiny = torch.tensor([1e-30])
    try:
        suit_cpu(model)
        after = model(**batch).loss
        assert tiny * 1e-10 == 0
    finally:
        torch.set_flush_denormal(False)
    assert tiny * 1e-10 > 0
    assert model.model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(after, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no malloc_trim")
def test_freed_memory_goes_back_to_the_system_every_so_many_steps():
    def resident() -> int:
        return psutil.Process().memory_info().rss

    torch.empty(2**23)  # from the heap from here on come tensors up to this size, 32 MiB: malloc's threshold moves
    tensors = [torch.ones(2**18) for _ in range(400)]
    last = tensors.pop()  # holds the top of the heap
    tensors.clear()
    trim, before = TrimHeap(every=3), resident()
    trim.on_step_end(None, TrainerState(global_step=2), None)
    assert resident() > before - 2**20 * 10
    trim.on_step_end(None, TrainerState(global_step=3), None)
    assert resident() < before - 2**20 * 300
    assert last.sum() == 2**18
