"""METEOR and SPICE by pycocoevalcap, which runs them in Java; where that can't be, the result says why.

Nothing is downloaded: pycocoevalcap would fetch SPICE's parser (stanford-corenlp 3.6.0) when it is first used, so SPICE
is not available until the two files lie where `_spice_parser` looks.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from finecap_ray.errors import DataError
from finecap_ray.evaluation.tokenise import Tokenisation, tokenise

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True, slots=True)
class NotAvailable:
    """A metric that this machine can't compute."""

    reason: str

    def __str__(self) -> str:
        return f"not available: {self.reason}"


def java_metrics(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenisation: Tokenisation,
    metrics: Sequence[str] = ("METEOR", "SPICE"),
) -> dict[str, float | NotAvailable]:
    """METEOR 1.5 and SPICE, 0 to 1, over all images, or why there is no value.

    Raises DataError for a metric of another name.
    """
    known: dict[str, Callable[[dict, dict], float | NotAvailable]] = {"METEOR": _meteor, "SPICE": _spice}
    unknown = sorted(set(metrics) - known.keys())
    if unknown:
        raise DataError(f"no metric {', '.join(unknown)}: Java ones are {', '.join(known)}")
    missing = missing_java() if metrics else None
    if missing:
        return dict.fromkeys(metrics, missing)
    hypotheses = {key: [" ".join(tokenise(text, tokenisation))] for key, text in candidates.items()}
    truths = {key: [" ".join(tokenise(text, tokenisation)) for text in references[key]] for key in candidates}
    return {name: known[name](truths, hypotheses) for name in metrics}


def missing_java() -> NotAvailable | None:
    """Why Java programs don't run here; None where they do."""
    java = shutil.which("java")
    if java is None:
        return NotAvailable("it runs in Java, and no `java` is on the PATH")
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        return NotAvailable(f"`java -version` failed with code {done.returncode}: {done.stderr.strip()[:200]}")
    return None


def _meteor(truths: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> float | NotAvailable:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        score, _ = meteor.compute_score(truths, hypotheses)
    except (ValueError, OSError) as error:  # the Java process ended, and an empty line is no number
        meteor.lock.release()  # its __del__ waits for it
        meteor.meteor_p.kill()
        said = meteor.meteor_p.stderr.read().decode(errors="replace").strip()
        return NotAvailable(f"METEOR's Java process stopped ({said[-200:] or error})")
    return float(score)


def _spice(truths: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> float | NotAvailable:
    absent = [path for path in _spice_parser() if not path.is_file()]
    if absent:
        return NotAvailable(
            f"SPICE's parser isn't here ({', '.join(path.name for path in absent)} in {absent[0].parent.name}/ of "
            "pycocoevalcap/spice): `python -m pycocoevalcap.spice.get_stanford_models` fetches it"
        )
    from pycocoevalcap.spice.spice import Spice

    try:
        score, _ = Spice().compute_score(truths, hypotheses)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        return NotAvailable(f"SPICE's Java process stopped ({error})")
    return float(score)


def _spice_parser() -> list[Path]:
    """Where pycocoevalcap keeps the parser that SPICE loads."""
    package = metadata.distribution("pycocoevalcap").locate_file("pycocoevalcap/spice/lib")
    return [Path(str(package)) / name for name in CORENLP]
