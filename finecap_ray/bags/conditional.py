"""Conditional bags: images whose captions are alike but for one class of words, such as a red and a blue of the same car.

An image's label is what its captions say of the class; no two images of a bag have the same one, and images of which
nothing is said are in no bag. What else the captions say is compared without these words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

WORD_CLASSES: dict[str, frozenset[str]] = {
    "colour": frozenset(
        [
            "black",
            "white",
            "grey",
            "gray",
            "red",
            "orange",
            "yellow",
            "green",
            "blue",
            "purple",
            "violet",
            "pink",
            "brown",
            "tan",
            "beige",
            "gold",
            "golden",
            "silver",
            "blond",
            "blonde",
            "turquoise",
            "teal",
            "maroon",
            "navy",
            "cream",
            "dark",
            "light",
            "medium-light",
            "medium",
            "medium-dark",
        ]
    ),
    "number": frozenset(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "several",
            "many",
            "few",
            "couple",
            "pair",
            "dozen",
            "group",
            "crowd",
            "1",
            "2",
            "3",
            "4",
            "5",
            "6",
            "7",
            "8",
            "9",
            "10",
            "11",
            "12",
        ]
    ),
    "size": frozenset(
        ["small", "little", "tiny", "big", "large", "huge", "tall", "short", "long", "giant", "young", "old"]
    ),
    "person": frozenset(
        [
            "man",
            "men",
            "woman",
            "women",
            "boy",
            "boys",
            "girl",
            "girls",
            "child",
            "children",
            "kid",
            "kids",
            "baby",
            "toddler",
            "lady",
            "person",
            "people",
            "guy",
            "male",
            "female",
        ]
    ),
    "material": frozenset(
        [
            "wooden",
            "wood",
            "metal",
            "stone",
            "brick",
            "glass",
            "plastic",
            "paper",
            "leather",
            "concrete",
            "sand",
            "sandy",
            "grass",
            "grassy",
            "snow",
            "snowy",
            "dirt",
            "muddy",
        ]
    ),
}
_SAME = {"gray": "grey", "golden": "gold", "blonde": "blond", "couple": "two", "pair": "two"} | {
    str(number): word
    for number, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=1
    )
}
_WORD = re.compile(r"[\w-]+")


def word_labels(captions: Sequence[Sequence[str]], word_class: str) -> list[tuple[str, ...] | None]:
    """Of each image, the words of the class that at least half of those captions use that use any; None where none does."""
    return [_label(own, WORD_CLASSES[word_class]) for own in captions]


def without_words(caption: str, word_class: str) -> str:
    """The caption without the words of a class."""
    return " ".join(word for word in caption.split() if not set(_words(word)) & WORD_CLASSES[word_class])


def _label(captions: Sequence[str], words: frozenset[str]) -> tuple[str, ...] | None:
    said = [{_SAME.get(word, word) for word in _words(caption) if word in words} for caption in captions]
    said = [found for found in said if found]
    counts = Counter(word for found in said for word in found)
    label = tuple(sorted(word for word, count in counts.items() if 2 * count >= len(said)))
    return label or None


def _words(caption: str) -> Iterator[str]:
    return (match.group() for match in _WORD.finditer(caption.lower()))
