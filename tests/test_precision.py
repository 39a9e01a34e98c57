"""When bfloat16 is taken."""

import pytest
import torch

from finecap_ray.precision import autocasts, dtype_of


@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_is_asked_for_is_done(use_gpu):
    assert autocasts(True, use_gpu) is True
    assert autocasts(False, use_gpu) is False
    assert dtype_of("float32", use_gpu) == "float32"
    assert dtype_of("bfloat16", use_gpu) == "bfloat16"


@pytest.mark.parametrize(
    ("can", "expected"),
    [({"avx512_vnni": True, "amx_bf16": False}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True)],
)
def test_a_cpu_autocasts_where_it_has_the_instructions(monkeypatch, can, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert autocasts("auto", use_gpu=False) is expected
    assert dtype_of("auto", use_gpu=False) == ("bfloat16" if expected else "float32")
