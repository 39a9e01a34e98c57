import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation.faithfulness import nli_score, vlm_score


class Negation:
    """Contradicts where one text has a "no" and the other hasn't."""

    def contradiction(self, premises, hypotheses):
        return [float(("no" in a.split()) != ("no" in b.split())) for a, b in zip(premises, hypotheses, strict=True)]


class Brightness:
    def faithful(self, images, captions):
        return [
            float((image == b"white") == (caption == "bright")) for image, caption in zip(images, captions, strict=True)
        ]


def test_nli_by_hand():
    references = {"a": ["a dog", "no dog"], "b": ["a cat"], "c": []}
    # a: 2 (0.5 - 1/2) = 0; b: 2 (0.5 - 1) = -1; c has no reference
    assert nli_score({"a": "a dog", "b": "no cat", "c": "a cow"}, references, Negation()) == pytest.approx(-1 / 2)


def test_vlm_by_hand():
    images = {"a": b"white", "b": b"black"}
    assert vlm_score({"a": "bright", "b": "bright"}, images, Brightness()) == 1 / 2


def test_answers_that_are_none():
    class Wrong:
        def contradiction(self, premises, hypotheses):
            return [2.0] * len(premises)

    with pytest.raises(DataError, match="1 answers to 1 questions, or one that is no probability"):
        nli_score({"a": "x"}, {"a": ["y"]}, Wrong())
    with pytest.raises(DataError, match="none of 1 captions"):
        nli_score({"a": "x"}, {}, Negation())
