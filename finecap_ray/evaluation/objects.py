"""CHAIR-style object precision: which objects a caption names that no reference of its image names.

After CHAIR (Rohrbach 2018, arXiv:1809.02156): a synonym table maps words to objects; of those that a caption names, the
ones that the references don't name are hallucinated. Without COCO's segmentations the references alone say what is there,
so an object that people didn't mention counts as hallucinated: compare captioners, don't read it as a rate of lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from finecap_ray.errors import DataError
from finecap_ray.evaluation.tokenise import tokenise

COCO_TABLE = "coco"
_IRREGULAR = {
    **{"men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose"},
    **{"feet": "foot", "teeth": "tooth", "knives": "knife", "wolves": "wolf", "loaves": "loaf", "calves": "calf"},
    **{"buses": "bus", "scissors": "scissors", "skis": "ski", "policemen": "policeman", "firemen": "fireman"},
    **{"taxis": "taxi", "canoes": "canoe", "shoes": "shoe", "toes": "toe", "cookies": "cookie", "neckties": "necktie"},
    **{"collies": "collie", "minibuses": "minibus", "semis": "semi", "tvs": "tv"},
    **{"fishermen": "fisherman", "leaves": "leaf", "shelves": "shelf", "scarves": "scarf", "halves": "half"},
}
_SINGULAR_IN_S = ("ss", "us", "is")


@dataclass(frozen=True, slots=True)
class SynonymTable:
    """Words (singular, up to some words long) -> the object they name."""

    object_of: Mapping[tuple[str, ...], str]

    @property
    def longest(self) -> int:
        return max(len(words) for words in self.object_of)

    def objects(self, text: str) -> list[str]:
        """The objects a text names, in order, the longest name first at each place ("hot dog" is no dog)."""
        words = [singular(word) for word in tokenise(text, "coco")]
        found, place = [], 0
        while place < len(words):
            for length in range(min(self.longest, len(words) - place), 0, -1):
                name = self.object_of.get(tuple(words[place : place + length]))
                if name is not None:
                    # An entry that maps to nothing protects its words: "baby" in "baby bird" is no person.
                    found += [name] if name else []
                    place += length
                    break
            else:
                place += 1
        return found


def read_synonyms(path: str | Path = COCO_TABLE) -> SynonymTable:
    """CHAIR's form: an object per line with its synonyms, separated by commas, the object's name first.

    `coco`: the embedded table of COCO's 80 objects. A line that begins with a comma lists names of no object. Raises DataError
    for no object, or a synonym of two objects.
    """
    if str(path) == COCO_TABLE:
        text = (resources.files("finecap_ray.evaluation") / "coco_objects.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"no synonym table at {path}: {error}") from None
    object_of: dict[tuple[str, ...], str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, *others = [part.strip().lower() for part in line.split(",")]
        for synonym in [name, *others]:
            words = tuple(singular(word) for word in synonym.split())
            if words and object_of.setdefault(words, name) != name:
                raise DataError(f"{path}: {synonym!r} is a synonym of {object_of[words]!r} and of {name!r}")
    if not any(object_of.values()):
        raise DataError(f"{path} names no object: a line per object, its synonyms separated by commas")
    return SynonymTable(object_of)


def object_precision(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], table: SynonymTable
) -> dict[str, float]:
    """object_precision  share of the named objects that a reference names (1 - CHAIRi)
    object_recall       share of the objects of the references that the caption names, mean over images that have one
    hallucinating       share of the captions that name an object no reference names (CHAIRs)
    objects_per_caption

    Images without references are left out. Raises DataError when none is left.
    """
    judged = [(candidates[key], references[key]) for key in candidates if references.get(key)]
    if not judged:
        raise DataError(f"none of {len(candidates)} captions has a reference to find its objects in")
    named = false = hallucinating = 0
    recalls = []
    for caption, own in judged:
        there = set(_every(table, own))
        said = table.objects(caption)
        wrong = [name for name in said if name not in there]
        named, false, hallucinating = named + len(said), false + len(wrong), hallucinating + bool(wrong)
        if there:
            recalls.append(len(there & set(said)) / len(there))
    return {
        "object_precision": 1 - false / named if named else 1.0,
        "object_recall": sum(recalls) / len(recalls) if recalls else 0.0,
        "hallucinating": hallucinating / len(judged),
        "objects_per_caption": named / len(judged),
    }


def singular(word: str) -> str:
    """English singular by rule, for nouns of captions: dogs, benches, puppies, men."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_SINGULAR_IN_S):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        return word[:-2]
    return word[:-1]


def _every(table: SynonymTable, texts: Iterable[str]) -> Iterable[str]:
    return (name for text in texts for name in table.objects(text))
