"""What a scorer is worth: retrieval, agreement with people, binding of attributes, and how much of a text it reads.

R@1 among random distractors     does it tell images apart at all?
Kendall's tau with human ratings does it like what people like?
binding                          does it notice when two attributes of a caption are swapped?
truncated                        how many captions are longer than what it reads?
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from finecap_ray.errors import DataError

# Attributes that may be swapped with another of the same line and leave a sentence.
_ATTRIBUTES = (
    "red blue green yellow orange purple pink brown black white gray grey silver golden blond tan",
    "small big large little tiny huge tall short long",
    "young old elderly",
    "striped plaid checkered spotted plain",
    "wooden metal plastic stone brick glass leather",
    "two three four five six",
    "left right",
    "light dark",
)
_GROUP_OF = {word: group for group, words in enumerate(_ATTRIBUTES) for word in words.split()}
_WORD = re.compile(r"[A-Za-z]+")


def swap_attributes(caption: str) -> str | None:
    """The caption with the first two different attributes of a kind exchanged ("a red car, a blue door" -> "a blue car, a
    red door"); None where there aren't two."""
    first: dict[int, re.Match[str]] = {}
    for match in _WORD.finditer(caption):
        group = _GROUP_OF.get(match.group().lower())
        if group is None:
            continue
        other = first.setdefault(group, match)
        if other.group().lower() != match.group().lower():
            between = caption[other.end() : match.start()]
            return caption[: other.start()] + match.group() + between + other.group() + caption[match.end() :]
    return None


def binding_accuracy(own: Float[np.ndarray, " n"], swapped: Float[np.ndarray, " n"]) -> float:
    """Share of the captions that are more similar to their image than their swapped copy is; equal ones count half."""
    return float(np.mean((own > swapped) + 0.5 * (own == swapped)))


def kendall_tau(scores: Sequence[float], ratings: Sequence[int]) -> tuple[float, float]:
    """Kendall's tau-b and tau-c (Stuart) of scores with ratings on a scale of a few levels.

        tau-b = (P - Q) / sqrt((pairs - ties in scores) (pairs - ties in ratings))
        tau-c = 2 m (P - Q) / (n^2 (m - 1)),  m = the smaller number of different values

    P, Q: concordant and discordant pairs. A rated caption with three ratings counts three times, as in CLIPScore's code.
    Raises DataError for fewer than two different scores or ratings.
    """
    score, rating = np.asarray(scores, dtype=np.float64), np.asarray(ratings)
    levels = np.unique(rating)
    different = len(np.unique(score))
    if different < 2 or len(levels) < 2:
        raise DataError(f"a rank correlation needs two different scores and ratings, got {different} and {len(levels)}")
    by_level = [np.sort(score[rating == level]) for level in levels]
    surplus = 0
    for low, lower in enumerate(by_level):
        for higher in by_level[low + 1 :]:
            below = np.searchsorted(lower, higher, side="left").sum()
            above = (len(lower) - np.searchsorted(lower, higher, side="right")).sum()
            surplus += int(below) - int(above)
    pairs = _pairs(np.array([len(score)]))
    tied_scores = _pairs(np.unique(score, return_counts=True)[1])
    tied_ratings = _pairs(np.array([len(own) for own in by_level]))
    smaller = min(different, len(levels))
    tau_b = surplus / np.sqrt(float(pairs - tied_scores) * float(pairs - tied_ratings))
    return float(tau_b), 2 * smaller * surplus / (len(score) ** 2 * (smaller - 1))


def _pairs(counts: Int[np.ndarray, " groups"]) -> int:
    return int((counts.astype(np.int64) * (counts - 1) // 2).sum())
