"""When bfloat16 is taken."""

import pytest
import torch

from finecap_ray.training.precision import autocasts


@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_is_asked_for_is_done(use_gpu):
    assert autocasts(True, use_gpu) is True
    assert autocasts(False, use_gpu) is False


def test_a_cpu_without_tiles_stays_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert autocasts("auto", use_gpu=False) is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert autocasts("auto", use_gpu=False) is True
