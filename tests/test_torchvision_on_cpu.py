"""torchvision imports beside a CPU torch in any process, and an interpreter start stays free of torch."""

import subprocess
import sys

import pytest

from finecap_ray.torchvision_on_cpu import SchemaFinder, install, schemas_missing


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("cuda", "nms_defined", "missing"),
    [(None, False, True), (None, True, False), ("13.0", False, False), ("13.0", True, False)],
)
def test_schemas_are_defined_only_beside_a_cpu_torch_and_only_if_absent(cuda, nms_defined, missing):
    assert schemas_missing(cuda, nms_defined) is missing


def test_interpreter_start_installs_the_finder_and_imports_nothing_heavy():
    code = """
import sys
print([type(f).__name__ for f in sys.meta_path].count("SchemaFinder"))
print([m for m in ("torch", "numpy", "pydantic", "yaml", "ray") if m in sys.modules])
"""
    assert in_a_fresh_interpreter(code).splitlines() == ["1", "[]"]


def test_torchvision_and_its_transforms_import():
    assert (
        in_a_fresh_interpreter("import torchvision, torchvision.transforms; torchvision.ops.nms; print('ok')") == "ok"
    )


def test_open_clip_imports():
    assert in_a_fresh_interpreter("import open_clip; print('ok')") == "ok"


def test_operators_that_are_already_there_are_left_alone():
    # Defining a schema twice raises in torch: the import passes only if the finder saw the existing one.
    code = """
import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torchvision; print('ok')
"""
    assert in_a_fresh_interpreter(code) == "ok"


def test_installing_twice_adds_one_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, SchemaFinder)])
    install()
    install()
    assert sum(isinstance(finder, SchemaFinder) for finder in sys.meta_path) == 1
