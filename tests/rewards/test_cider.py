import math
import pickle

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from finecap_ray.errors import DataError
from finecap_ray.evaluation.tokenise import tokenise
from finecap_ray.rewards.cider import CiderReward

CORPUS = {
    "cat": ["A black cat sleeps on a chair.", "A cat is asleep."],
    "dog": ["A dog runs on the grass.", "A brown dog runs, and runs, and runs.", "Dog."],
    "cow": [
        "Two cows.",
        "Cows on the grass, one of them asleep on a chair in the middle of a very long field of flowers.",
    ],
}
CAPTIONS = {
    "cat": ["A black cat sleeps on a chair.", "A cat.", "a a a a cat cat", "", "Cat", "dog runs", "black cat sleeps  "],
    "dog": ["Dog.", "dog", "A dog runs, and runs", "zebra crossing", ".", "A brown dog", "runs runs runs runs runs"],
    "cow": ["Two cows.", "two cows on the grass", "Cows " * 30, "flowers", "a", "One of them, asleep", "Two"],
}


@pytest.mark.parametrize("tokenisation", ["coco", "keep_punctuation"])
def test_a_tenth_of_what_pycocoevalcap_gives(tokenisation):
    def prepared(text):
        return " ".join(tokenise(text, tokenisation))

    truths = {image_id: [prepared(text) for text in texts] for image_id, texts in CORPUS.items()}
    reward = CiderReward(CORPUS, tokenisation)
    for sample in range(7):
        captions = [CAPTIONS[image_id][sample] for image_id in CORPUS]
        _, expected = Cider().compute_score(truths, {i: [prepared(c)] for i, c in zip(CORPUS, captions, strict=True)})
        rewards = reward(captions, list(CORPUS.values()))
        assert rewards.dtype == np.float32
        np.testing.assert_allclose(rewards * 10, expected, rtol=0, atol=1e-6)


def test_the_formula_by_hand():
    """Two documents: "a" is in both and worth 0, "dog" is in one and worth log 2."""
    reward = CiderReward([["a dog"], ["a cat"]])
    # n = 1: only "dog" counts, cosine 1; n = 2: "a dog" is in one document, cosine 1; n = 3, 4: nothing, 0
    assert reward(["a dog"], [["a dog"]]).tolist() == pytest.approx([(1 + 1 + 0 + 0) / 4])
    # n = 1: cosine 1; n = 2: none. The lengths are 0 and 1 pairs
    assert reward(["dog"], [["a dog"]]).tolist() == pytest.approx([1 / 4 * math.exp(-1 / 72)])
    # a repeated word is clipped: min(2, 1) * 1 / (2 * 1), of n = 1; lengths 1 and 1
    assert reward(["dog dog"], [["a dog"]]).tolist() == pytest.approx([1 / 2 / 4])
    # the mean over references
    assert reward(["a dog"], [["a dog", "a cat"]]).tolist() == pytest.approx([1 / 2 / 2])


def test_a_caption_scores_the_same_in_any_company():
    reward = CiderReward(CORPUS)
    captions = [caption for texts in CAPTIONS.values() for caption in texts]
    references = [CORPUS[image_id] for image_id in CAPTIONS for _ in range(7)]
    together = reward(captions, references)
    alone = [reward([caption], [own])[0] for caption, own in zip(captions, references, strict=True)]
    assert together.tolist() == alone


def test_a_full_stop_is_worth_something_unless_punctuation_is_dropped():
    corpus = [["a dog runs."], ["a cat sleeps"]]
    with_stop, without = CiderReward(corpus)(["a dog runs.", "a dog runs"], [corpus[0]] * 2)
    assert with_stop > without
    with_stop, without = CiderReward(corpus, "coco")(["a dog runs.", "a dog runs"], [corpus[0]] * 2)
    assert with_stop == without


def test_an_image_without_references_gives_no_signal():
    rewards = CiderReward({**CORPUS, "pig": []})(["a cat", "a pig"], [CORPUS["cat"], []])
    assert rewards[0] > 0
    assert math.isnan(rewards[1])
    # nor is it a document
    assert rewards[0] == CiderReward(CORPUS)(["a cat"], [CORPUS["cat"]])[0]


def test_it_can_be_sent_to_another_process():
    reward = pickle.loads(pickle.dumps(CiderReward(CORPUS)))
    assert reward(["a cat"], [CORPUS["cat"]]) == CiderReward(CORPUS)(["a cat"], [CORPUS["cat"]])


def test_input_that_cannot_be_scored():
    with pytest.raises(DataError, match="1 images with references"):
        CiderReward([["a dog"], []])
    with pytest.raises(ValueError, match="zip"):
        CiderReward(CORPUS)(["a", "b"], [["a"]])
