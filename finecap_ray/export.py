"""A captioner as a folder for others: weights, processor, the settings it was made with, and a model card.

`from_pretrained` of transformers loads it: an image-text model as it is, a ClipCap once finecap_ray is imported. A run merges
LoRA adapters into what it saves, so a checkpoint needs nothing of PEFT, and its optimizer stays behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from finecap_ray.captioning import find_captioner, run_folder, run_settings
from finecap_ray.config import dump_settings
from finecap_ray.errors import ConfigError
from finecap_ray.model_card import CARD_FILE, CaptionerOfRun, model_card
from finecap_ray.paths import absolute

Dtype = Literal["float32", "bfloat16", "float16"]
SETTINGS_FILE = "config.yaml"
_RESULTS = ("rl/captioner", "mle")  # of a run, the last first


def export_captioner(source: str | Path, out: str | Path, dtype: Dtype | None = None) -> Path:
    """Writes the captioner of `source` (a run: its last; or a captioner's folder, a checkpoint's too) into the new folder `out`.

    dtype: of the weights; None keeps theirs. Raises DataError where there is no captioner, ConfigError where `out` is taken.
    """
    captioner, target = Path(_captioner_of(Path(source))), Path(absolute(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out} exists: give a new folder")
    # Only now what takes seconds to import.
    from transformers import AutoModelForImageTextToText

    from finecap_ray.captioners.loader import load_processor

    config, processor = load_processor(captioner)
    model = AutoModelForImageTextToText.from_pretrained(captioner, config=config, dtype=dtype or "auto")
    settings = run_settings(str(captioner), None) if run_folder(str(captioner)) else None
    card = model_card(CaptionerOfRun.of(captioner), model, settings, name=target.name)

    # Under another name until all of it is there: what is seen is whole.
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    if settings is not None:
        (unfinished / SETTINGS_FILE).write_text(dump_settings(settings), encoding="utf-8")
    card.save(unfinished / CARD_FILE)
    if target.exists():
        target.rmdir()
    unfinished.rename(target)
    return target


def _captioner_of(source: Path) -> str:
    """Of a run what RL made, else what MLE made; of anything else the folder itself."""
    if (source / SETTINGS_FILE).is_file() and not (source / "config.json").is_file():
        source = next((source / name for name in _RESULTS if (source / name / "config.json").is_file()), source)
    return find_captioner(source)
