"""The model card of an exported captioner: what it is, how it is used, and what its run says of data, reward and results.

Nothing is said that the run folder doesn't hold; numbers of another captioner than the one exported are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from finecap_ray.captioners.vlm import PROMPT_FIELD
from finecap_ray.captioning import run_folder
from finecap_ray.config import ScorerSettings, Settings
from finecap_ray.evaluation.present import summary_markdown
from finecap_ray.evaluation.provenance import versions
from finecap_ray.rewards.combine import component_weights

CARD_FILE = "README.md"
_TEMPLATE = "model_card.md.j2"
_METRICS = ("CIDEr", "Bleu_4", "ROUGE_L", "mean_length", "vocabulary", "repeated_words")


@dataclass(frozen=True, slots=True)
class CaptionerOfRun:
    """A captioner's folder, and which part of its run it is the result of."""

    folder: Path
    run: Path | None
    stage: str | None  # "rl", "mle"; None: a checkpoint on the way, or no run's
    training: str | None  # "rl", "mle": of what it is the result or a checkpoint; None: not known

    @classmethod
    def of(cls, captioner: Path) -> CaptionerOfRun:
        found = run_folder(str(captioner))
        results = {} if found is None else {found / "rl" / "captioner": "rl", found / "mle": "mle"}
        inside = () if found is None else captioner.relative_to(found).parts
        training = inside[0] if inside and inside[0] in ("rl", "mle") else None
        return cls(captioner, found, results.get(captioner), training)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where there is none."""
        path = None if self.run is None else self.run / name
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None

    def summary(self) -> dict[str, Any] | None:
        """Of the evaluation, where that was of this very captioner."""
        evaluation, own = self.read("evaluation/stage.json"), self.read(f"{self.stage}/stage.json")
        if not evaluation or not own or not evaluation["finished"]:
            return None
        same = evaluation["inputs"]["captioners"].get(self.stage) == own["digest"]
        return self.read("evaluation/summary.json") if same else None


def model_card(captioner: CaptionerOfRun, model: PreTrainedModel, settings: Settings | None, name: str) -> ModelCard:
    """`settings` are those of the run that the captioner lies in, None where it lies in none."""
    summary = captioner.summary()
    clipcap = model.config.model_type == "clipcap"
    start = None if settings is None else settings.captioner.spec or settings.captioner.decoder
    data = ModelCardData(
        library_name="finecap-ray" if clipcap else "transformers",
        pipeline_tag="image-to-text",
        # A folder's name says nothing elsewhere.
        base_model=start if start is not None and "/" in start and not Path(start).exists() else None,
        tags=["image-captioning", "self-retrieval", model.config.model_type],
        model_name=name,
        eval_results=None if summary is None else _eval_results(summary, captioner.stage, settings),
    )
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("finecap_ray", "."), undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template(_TEMPLATE)
    text = template.render(
        card_data=data.to_yaml(),
        name=name,
        model=model,
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        clipcap=clipcap,
        prompt=getattr(model.config, PROMPT_FIELD, None),
        settings=settings,
        start=start,
        stage=captioner.stage,
        training=captioner.training,
        features=captioner.read("features/manifest.json"),
        bags=_bags(captioner),
        scorers=[]
        if settings is None
        else [
            _scorer(captioner, settings.scorer, "scorer", "rewarded"),
            _scorer(captioner, settings.judge, "judge", "judged"),
        ],
        reward={} if settings is None else component_weights(settings.rl.reward),
        headline=None if summary is None else summary_markdown(summary),
        caption_metrics=[] if summary is None else _metric_rows(summary),
        versions=versions() if summary is None else summary["made_with"]["versions"],
    )
    return ModelCard(text)


def _eval_results(summary: Mapping[str, Any], stage: str, settings: Settings) -> list[EvalResult]:
    """R@1 in bags of look-alikes by group, and CIDEr."""

    def result(split: str, kind: str, metric: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="image-to-text",
            dataset_type=Path(settings.data.examples).stem,
            dataset_name=Path(settings.data.examples).stem,
            dataset_split=split,
            metric_type=kind,
            metric_name=metric,
            metric_value=round(value, 4),
        )

    name = f"R@1 in bags of {summary['bag_size']}, by the judge"
    found = [result(group, "recall_at_1", name, own["recall_at_1"][stage]) for group, own in summary["groups"].items()]
    cider = summary["caption_metrics"][stage].get("CIDEr")
    return found if cider is None else [*found, result("whole", "cider", "CIDEr-D", cider)]


def _metric_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    mle, rl = (summary["caption_metrics"][stage] for stage in ("mle", "rl"))
    return [(name, f"{mle[name]:.3f}", f"{rl[name]:.3f}") for name in _METRICS if name in mle]


def _scorer(captioner: CaptionerOfRun, settings: ScorerSettings, name: str, role: str) -> dict[str, Any]:
    facts = captioner.read(f"{name}/scorer.json") if settings.spec is None else None
    return {"role": role, "spec": settings.spec, "text": settings.text, "half": settings.half, "facts": facts}


def _bags(captioner: CaptionerOfRun) -> list[tuple[int, dict[str, Any]]]:
    """Size and facts of the bags that trained it, by size."""
    manifest = captioner.read("bags/train/manifest.json") or {"sizes": {}}
    return sorted((int(size), facts) for size, facts in manifest["sizes"].items())
