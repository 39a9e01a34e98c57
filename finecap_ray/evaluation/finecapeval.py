"""FineCapEval: how much of what people wrote of background, objects and relations a caption says (Cho 2022, arXiv:2205.13115).

The coverage of an aspect is the mean over images of the mean over its phrases of the share of a phrase's words that are
found in the caption. Two ways to find a word:

    paper   as the release does: the word anywhere in the caption's text, so that "at" is found in "cat"
    token   a word of the caption, both in the singular

The release stems the phrases (not the captions) with NLTK's Porter stemmer: pass `stem=PorterStemmer().stem` for its numbers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.objects import singular
from finecap_ray.evaluation.tokenise import tokenise

Matching = Literal["paper", "token"]
ASPECTS = ("background", "object", "relation")
_COLUMNS = ("image", "caption", *ASPECTS)
_PHRASE_END = re.compile(r"\\?;")

Phrases = Mapping[str, Mapping[str, Sequence[str]]]  # aspect -> image id -> phrases


def read_finecapeval(path: str | Path) -> dict[str, dict[str, list[str]]]:
    """The phrases of FineCapEval.csv, of all rows of an image together; an image id is the file name without its ending.

    Rows with an empty field are left out, as in the release. Raises DataError for another form.
    """
    phrases: dict[str, dict[str, list[str]]] = {aspect: {} for aspect in ASPECTS}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise DataError(f"{path} has no column {', '.join(absent)}: FineCapEval has {', '.join(_COLUMNS)}")
            for row in reader:
                if all(row[name] for name in _COLUMNS):
                    for aspect in ASPECTS:
                        own = [phrase.strip().lower() for phrase in _PHRASE_END.split(row[aspect])]
                        phrases[aspect].setdefault(row["image"].split(".")[0], []).extend(
                            phrase for phrase in own if len(phrase) > 1
                        )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    if not phrases["background"]:
        raise DataError(f"{path} has no row with every field filled")
    return phrases


def aspect_coverage(
    candidates: Mapping[str, str],
    phrases: Phrases,
    matching: Matching = "token",
    stem: Callable[[str], str] = str,
) -> dict[str, float]:
    """Coverage of each aspect, 0 to 1, over the images that have a caption and phrases; `cat.jpg` is FineCapEval's `cat`.

    Raises ConfigError for another matching, DataError when no image has both.
    """
    if matching not in ("paper", "token"):
        raise ConfigError(f"matching {matching!r} is unknown: paper or token")
    named = {image_id.split(".")[0]: text for image_id, text in candidates.items()}
    coverage = {}
    for aspect, of_image in phrases.items():
        judged = [image_id for image_id in of_image if image_id in named]
        if not judged:
            raise DataError(f"none of the {len(of_image)} images of FineCapEval has a caption")
        scores = [_image_coverage(named[image_id], of_image[image_id], matching, stem) for image_id in judged]
        coverage[aspect] = sum(scores) / len(scores)
    return coverage


def _image_coverage(caption: str, phrases: Sequence[str], matching: Matching, stem: Callable[[str], str]) -> float:
    said = {stem(singular(word)) for word in tokenise(caption, "coco")}
    total = 0.0
    for phrase in phrases:
        if matching == "paper":
            words = [word for token in tokenise(phrase, "coco") if (word := re.sub(r"[^a-zA-Z0-9]", "", stem(token)))]
            hits = sum(word in caption for word in words)
        else:
            words = [stem(singular(token)) for token in tokenise(phrase, "coco")]
            hits = sum(word in said for word in words)
        total += hits / len(words) if words else 0.0
    return total / len(phrases) if phrases else 0.0
