"""The interface of judges of faithfulness, and the score of one: an NLI model over references, or a VLM over the image.

No such model comes with this package. One is any object with the method below, say in nli.py:

    class CrossEncoderNli:
        def contradiction(self, premises, hypotheses): ...    # a cross-encoder's probabilities

and is named where it is wanted: nli_score(candidates, references, CrossEncoderNli()), or evaluation.nli_judge=nli:CrossEncoderNli
of `finecap evaluate`, which imports the module (also from the folder it is called in) and calls the class.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from finecap_ray.errors import ConfigError, DataError


class NliJudge(Protocol):
    """Reads text only."""

    def contradiction(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Sequence[float]:
        """Probability, 0 to 1, that each hypothesis contradicts its premise."""
        ...


class VlmJudge(Protocol):
    """Sees the image."""

    def faithful(self, images: Sequence[bytes], captions: Sequence[str]) -> Sequence[float]:
        """Probability, 0 to 1, that each caption says nothing false of its encoded image."""
        ...


def load_judge(name: str, method: str) -> Any:
    """What MODULE:CLASS of a setting makes, called without arguments. Raises ConfigError where that has no such method."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"a judge of faithfulness is MODULE:CLASS, got {name!r}")
    if "" not in sys.path:
        sys.path.append("")  # the folder it is called in, which an installed program doesn't look in
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"no judge of faithfulness {name!r}: {error}") from None
    judge = make()
    if not callable(getattr(judge, method, None)):
        raise ConfigError(f"{name} has no method {method}, see finecap_ray/evaluation/faithfulness.py")
    return judge


def nli_score(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], judge: NliJudge) -> float:
    """MOCHa's score, -1 to 1, mean over captions: 2 (0.5 - mean over references of p(contradiction)) (arXiv:2312.03631).

    Images without references are left out. Raises DataError when none is left, or the judge answers out of 0 to 1.
    """
    counts = [len(references.get(key, ())) for key in candidates]
    premises = [text for key in candidates for text in references.get(key, ())]
    hypotheses = [text for (_, text), count in zip(candidates.items(), counts, strict=True) for _ in range(count)]
    if not premises:
        raise DataError(f"none of {len(candidates)} captions has a reference to contradict")
    answers = iter(_probabilities(judge.contradiction(premises, hypotheses), len(premises)))
    means = [sum(next(answers) for _ in range(count)) / count for count in counts if count]
    return sum(2 * (0.5 - mean) for mean in means) / len(means)


def vlm_score(candidates: Mapping[str, str], images: Mapping[str, bytes], judge: VlmJudge) -> float:
    """Mean probability, 0 to 1, that a caption says nothing false. Raises DataError as `nli_score`."""
    if not candidates:
        raise DataError("faithfulness of 0 captions: give at least one")
    answers = judge.faithful([images[key] for key in candidates], list(candidates.values()))
    return sum(_probabilities(answers, len(candidates))) / len(candidates)


def _probabilities(answers: Sequence[float], count: int) -> list[float]:
    values = [float(answer) for answer in answers]
    if len(values) != count or not all(0 <= value <= 1 for value in values):
        raise DataError(f"the judge gave {len(values)} answers to {count} questions, or one that is no probability")
    return values
