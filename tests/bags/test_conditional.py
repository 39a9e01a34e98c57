import pytest

from finecap_ray.bags.conditional import WORD_CLASSES, without_words, word_labels


def test_the_label_is_what_most_captions_say():
    captions = [
        ["A red car", "a Red, fast car", "a car"],  # of 3 captions 2 say something, both red
        ["a gray dog", "a grey dog and a black one"],  # grey by 2 of 2, black by 1 of 2
        ["a car"],
        [],
        ["red", "blue", "green"],  # each by 1 of 3: no agreement
    ]
    assert word_labels(captions, "colour") == [("red",), ("black", "grey"), None, None, None]
    assert word_labels([["2 dogs"], ["a couple of dogs"], ["two dogs"]], "number") == [("two",)] * 3


def test_the_words_of_the_class_are_taken_out_and_no_others():
    assert without_words("A red car, black wheels", "colour") == "A car, wheels"
    assert without_words("A redwood car", "colour") == "A redwood car"


@pytest.mark.parametrize("word_class", WORD_CLASSES)
def test_a_class_has_words_in_lower_case(word_class):
    assert len(WORD_CLASSES[word_class]) > 5
    assert all(word == word.lower() for word in WORD_CLASSES[word_class])
