"""The other components, by hand: CLIPScore, RefCLIPScore, CIDEr over a step, length, ended, repetition."""

import numpy as np
import pytest
import torch

from finecap_ray.rewards.cider import Cider, CiderReward
from finecap_ray.rewards.clip_score import ClipScore, RefClipScore
from finecap_ray.rewards.ended import Ended
from finecap_ray.rewards.length import Length
from finecap_ray.rewards.repetition import Repetition

TEXT = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
IMAGES = [[1.0, 0.0], [-1.0, 0.0]]
VECTORS = {"close": [0.8, 0.6], "far": [0.0, -1.0]}


def embed(texts):
    return torch.tensor([VECTORS[text] for text in texts])


def test_clip_score_is_of_the_own_image(step):
    # cosines 0.6 and -1
    scores = ClipScore()(step(["a", "b"], [0, 1], IMAGES), TEXT)
    assert scores.tolist() == pytest.approx([2.5 * 0.6, 0])
    assert scores.dtype == np.float32


def test_ref_clip_score_with_and_without_references(step):
    request = step(["a", "b", "a"], [0, 1, 0], IMAGES, references=[("far", "close"), ()])
    first, none, third = RefClipScore(embed)(request, TEXT[[0, 1, 1]])
    # CLIPScore 1.5, the closest reference at 0.6 * 0.8 + 0.8 * 0.6 = 0.96; and 2.5 with a reference at 0.8
    assert first == pytest.approx(2 * 1.5 * 0.96 / (1.5 + 0.96))
    assert np.isnan(none)
    assert third == pytest.approx(2 * 2.5 * 0.8 / (2.5 + 0.8))
    assert np.isnan(RefClipScore(embed)(step(["a"], [1], IMAGES), TEXT[:1])).all()  # nothing is embedded


def test_cider_takes_its_frequencies_from_the_corpus_or_from_the_step(step):
    references = [("a dog",), ("a cat",), ()]
    request = step(["a dog", "a cat", "a dog"], [0, 1, 2], np.eye(3), references=references)
    # As in test_cider: in two documents "a" is worth 0, so that only "dog" and "a dog" count, of n = 1 and 2 out of 4.
    own = Cider(None)(request, TEXT)
    assert own[:2].tolist() == pytest.approx([0.5, 0.5])
    assert np.isnan(own[2])
    corpus = [["a dog"], ["a dog"], ["two cats"]]
    assert Cider(corpus)(request, TEXT)[:2].tolist() == CiderReward(corpus)(["a dog", "a cat"], references[:2]).tolist()


def test_a_step_of_one_described_image_has_no_frequencies_of_its_own(step):
    request = step(["a dog", "a cat"], [0, 1], np.eye(2), references=[("a dog",), ()])
    assert np.isnan(Cider(None)(request, TEXT)).all()


def test_length_is_free_up_to_the_longest(step):
    texts = ["a dog", "a b c d", "a b c d e .", "a b c d e f g h", ""]
    # words past 4, over 4: the full stop is a word
    assert Length(4)(step(texts), TEXT).tolist() == [0, 0, -2 / 4, -4 / 4, 0]


def test_an_end_is_the_policy_s_own_and_at_a_word(step):
    request = step(["a dog.", "a dog on a", "a dog.   ", ""], ended=[True, False, True, True])
    assert Ended()(request, TEXT).tolist() == [0, -1, -1, 0]


def test_repetition_counts_pairs_said_twice(step):
    texts = ["a man and a dog", "a dog a dog", "dog dog dog dog", "dog", "", "A dog. A dog."]
    # of 4: none; "a dog" a second time, of 3; "dog dog" twice more, of 3; no pair at all; of a dog . a dog . 2 of 5
    expected = [0, -1 / 3, -2 / 3, 0, 0, -2 / 5]
    assert Repetition()(step(texts), TEXT).tolist() == pytest.approx(expected)
