"""Damaged copies of a caption: what a scorer must learn not to like, before a policy finds out that it does.

A policy gradient ends at whatever the scorer overrates. Without such negatives a dual encoder trained on clean captions
gladly pays for "woman woman jjjjjj".
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence


def damage(caption: str, vocabulary: Sequence[str], rng: random.Random) -> str:
    """One damaged copy of `caption`, never equal to it; `vocabulary` holds words of other captions.

    A word is repeated, replaced by random letters, replaced by another caption's word, or foreign words are appended.
    """
    words = caption.split()
    place = rng.randrange(len(words))
    kind = rng.randrange(4)
    if kind == 0:
        words[place:place] = [words[place]] * rng.randint(1, 3)
    elif kind == 1:
        words[place] = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    elif kind == 2:
        words[place] = rng.choice(vocabulary)
    else:
        words += rng.choices(vocabulary, k=rng.randint(1, 3))
    damaged = " ".join(words)
    return damaged if damaged != caption else f"{caption} {words[place]}"
