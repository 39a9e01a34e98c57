"""Captions of images with a trained captioner: the caption engine of one checkpoint, and a ClipCap's frozen tower.

    encoded image --prepare--> pixels --tower--> features --engine--> rollouts      (ClipCap)
    encoded image --prepare-----------------------------engine--> rollouts          (image-text models)

`finecap caption` and the evaluation run it in the actors of a Ray Data pipeline, the service (`serve/`) in every replica.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finecap_ray.cluster import check_room, connect
from finecap_ray.config import ResourceSettings, Settings, TowerSettings, load_settings
from finecap_ray.doctor import samples_on_gpus
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.images import decode_image
from finecap_ray.paths import absolute
from finecap_ray.preflight import check_engine
from finecap_ray.records import Rollout
from finecap_ray.sampling.spec import SamplingSpec

HIGHEST_TEMPERATURE = 2.0
# A checkpoint of a run lies at most this deep in the run folder (rl/checkpoints/checkpoint-20).
_RUN_FOLDER_DEPTH = 3


@dataclass(frozen=True, slots=True)
class CaptionerFacts:
    """What callers need to know of a captioner before they ask it for captions."""

    name: str  # the folder and the one above it, such as rl/captioner
    weights: str  # digest
    max_tokens: int  # that there is room for, end token included
    trained_tokens: int  # of the longest caption it was trained on, where its folder says that: the default


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded captioner and, where it reads features, the tower whose they are."""

    facts: CaptionerFacts
    model: Any
    processor: Any
    family: Any
    tower: Any | None


def open_checkpoint(captioner: str, tower: TowerSettings) -> Checkpoint:
    """Raises DataError where there is no captioner, MismatchError when it was trained on another tower's features."""
    from finecap_ray.captioners import family_of
    from finecap_ray.captioners.loader import check_features, load_captioner
    from finecap_ray.scorers.digest import weight_digest
    from finecap_ray.scorers.tower import load_tower

    model, processor = load_captioner(captioner)
    family, frozen = family_of(model.config, processor), None
    if family.reads == "features":
        frozen = load_tower(tower)
        check_features(model, frozen.digest, frozen.width)
    folder = Path(captioner)
    name = f"{folder.parent.name}/{folder.name}"
    room = family.longest_caption
    trained = min(room, model.generation_config.max_new_tokens or room)
    facts = CaptionerFacts(name, weight_digest(model.state_dict()), room, trained)
    return Checkpoint(facts, model, processor, family, frozen)


class ImageCaptioner:
    """Engine of one captioner, and its tower if it has one, in this process."""

    def __init__(self, checkpoint: Checkpoint, batch_size: int, resources: ResourceSettings) -> None:
        """`batch_size` is the number of images that the tower sees at a time."""
        import torch

        from finecap_ray.sampling.engine import CaptionEngine

        torch.set_num_threads(resources.threads)
        self._tower, self._batch_size = checkpoint.tower, batch_size
        self.engine = CaptionEngine(checkpoint.model, checkpoint.processor, resources)
        self.take(checkpoint)

    def take(self, checkpoint: Checkpoint) -> None:
        """Its weights from now on; of a captioner like the first in all but these. Raises StaleWeightsError where some are missing."""
        self.engine.load(self.engine.weights_version + 1, checkpoint.model.state_dict())
        self.engine.fingerprints()  # which it keeps the loaded tensors for

    def warm_up(self) -> None:
        """Captions a grey image: the first captions of an engine take seconds, the later ones milliseconds."""
        grey = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(grey, "PNG")
        self.caption([self.prepare(grey.getvalue())], [SamplingSpec(1, 2, 0.0)])

    def prepare(self, image: bytes):
        """What `engine_inputs` takes of an encoded image: pixels [3, S, S], or the image as it is. Raises DataError for bytes that aren't one."""
        picture = decode_image(image)
        return image if self._tower is None else self._tower.preprocess(picture)

    def engine_inputs(self, prepared: Sequence):
        """What the engine takes of prepared images: features [N, F] float16, as the captioner's training kept them, or N images."""
        if self._tower is None:
            return list(prepared)
        import torch

        parts = [
            self._tower.look(prepared[start : start + self._batch_size])
            for start in range(0, len(prepared), self._batch_size)
        ]
        return torch.cat(parts).half().numpy()

    def caption(self, prepared: Sequence, specs: Sequence[SamplingSpec]) -> list[list[Rollout]]:
        """Per prepared image, captions as its spec asks for."""
        names = [str(row) for row in range(len(prepared))]
        return self.caption_inputs(names, self.engine_inputs(prepared), specs)

    def caption_inputs(
        self, image_ids: Sequence[str], inputs, specs: Sequence[SamplingSpec], seeds: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """Per image, of what `engine_inputs` gave, captions as its spec asks for; see CaptionEngine.sample for the seeds."""
        rollouts = iter(self.engine.sample(image_ids, inputs, specs, seeds))
        return [[next(rollouts) for _ in range(spec.captions_per_image)] for spec in specs]


def connect_to_caption(resources: ResourceSettings) -> None:
    """Ray, with room for a caption engine. Raises ConfigError where vllm was built for other processors, DeadlineError without room."""
    check_engine(resources.use_gpu, samples_on_gpus())
    connect(resources)
    check_room(resources)


def sampling_spec(n: int, temperature: float | None, max_tokens: int | None, facts: CaptionerFacts) -> SamplingSpec:
    """How to draw n captions of an image. A temperature of None is greedy (0) for one caption and 1 for several.

    Raises ConfigError for what can't be drawn.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if temperature is None:
        temperature = 0.0 if n == 1 else 1.0
    if not 0 <= temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(f"temperature must be from 0 (greedy) to {HIGHEST_TEMPERATURE:g}, got {temperature:g}")
    if temperature == 0 and n > 1:
        raise ConfigError(
            f"temperature 0 is greedy and has one caption, n={n} were asked for: give a temperature above 0"
        )
    if max_tokens is None:
        max_tokens = facts.trained_tokens
    if not 1 <= max_tokens <= facts.max_tokens:
        raise ConfigError(
            f"max_tokens must be from 1 to {facts.max_tokens}, which the captioner has room for, got {max_tokens}"
        )
    return SamplingSpec(n, max_tokens, temperature)


def find_captioner(checkpoint: str | Path) -> str:
    """The absolute path of a captioner folder. Raises DataError, naming the captioners below, when it isn't one."""
    folder = Path(checkpoint)
    if (folder / "config.json").is_file():
        return absolute(folder)
    below = [path.parent.as_posix() for path in sorted(folder.glob("**/config.json")) if _is_captioner(path)]
    hint = f"below it are {', '.join(below)}" if below else "give a folder with config.json and model.safetensors"
    raise DataError(f"{checkpoint!s} is not a captioner: {hint}")


def run_settings(captioner: str, config: str | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings to caption with: `config` where given, else the config.yaml of the run the captioner lies in, else defaults.

    They name the tower; a tower other than the captioner's own is refused when it is loaded.
    """
    if config is None:
        folder = run_folder(captioner)
        config = "demo" if folder is None else str(folder / "config.yaml")
    return load_settings(config, list(overrides))


def run_folder(captioner: str) -> Path | None:
    """The folder of the run that a captioner lies in, None where it lies in none."""
    folders = [Path(captioner), *Path(captioner).parents[:_RUN_FOLDER_DEPTH]]
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _is_captioner(config: Path) -> bool:
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    from finecap_ray.captioners.families import FAMILIES

    return isinstance(tree, dict) and tree.get("model_type") in FAMILIES
