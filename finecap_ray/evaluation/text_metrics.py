"""Every metric of an evaluation that needs no scorer: against references, of objects and aspects, by judges of faithfulness,
and what captions are like by themselves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finecap_ray.config import EvaluationSettings
from finecap_ray.evaluation.captions import caption_metrics, text_statistics
from finecap_ray.evaluation.faithfulness import load_judge, nli_score, vlm_score
from finecap_ray.evaluation.finecapeval import aspect_coverage, read_finecapeval
from finecap_ray.evaluation.java_metrics import NotAvailable, java_metrics
from finecap_ray.evaluation.objects import object_precision, read_synonyms


@dataclass(frozen=True, slots=True)
class TextMetrics:
    values: dict[str, float]
    not_available: dict[str, str]  # metric -> why
    seconds: float


def text_metrics(
    evaluation: EvaluationSettings,
    captions: Mapping[str, str],
    human: Mapping[str, Sequence[str]],
    images: Mapping[str, bytes] | None = None,
) -> TextMetrics:
    """Metrics of one caption per image; those against references over the images that have any.

    human: image id -> references; images: for a judge that sees them, None where there are none.
    """
    started = time.perf_counter()
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    referred = {image_id: text for image_id, text in captions.items() if human.get(image_id)}
    if referred:
        values |= caption_metrics(referred, human, evaluation.tokenisation)
        values |= object_precision(referred, human, read_synonyms(evaluation.synonyms))
        java = java_metrics(referred, human, evaluation.tokenisation, evaluation.java_metrics)
        missing |= {name: own.reason for name, own in java.items() if isinstance(own, NotAvailable)}
        values |= {name: own for name, own in java.items() if not isinstance(own, NotAvailable)}
        if evaluation.nli_judge:
            values["NLI"] = nli_score(referred, human, load_judge(evaluation.nli_judge, "contradiction"))
    else:
        values |= text_statistics(list(captions.values()))
        missing["metrics against references"] = "no image has a human caption"
    if evaluation.vlm_judge and images is None:
        missing["VLM"] = "no images were given"
    elif evaluation.vlm_judge:
        values["VLM"] = vlm_score(captions, images, load_judge(evaluation.vlm_judge, "faithful"))
    if evaluation.finecapeval:
        covered = aspect_coverage(captions, read_finecapeval(evaluation.finecapeval), evaluation.finecapeval_matching)
        values |= {f"finecapeval_{aspect}": value for aspect, value in covered.items()}
    return TextMetrics(values, missing, time.perf_counter() - started)
