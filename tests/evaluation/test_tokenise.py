import pytest

from finecap_ray.errors import ConfigError
from finecap_ray.evaluation.tokenise import tokenise

# As Stanford's PTBTokenizer 3.4.1 prints them with -lowerCase
STANFORD = {
    "A man's dog isn't here.": "a man 's dog is n't here .",
    "He cannot stop, they won't": "he can not stop , they wo n't",
    "I can't; she'd go, we've left": "i ca n't ; she 'd go , we 've left",
    "Two black-and-white cats (close-up).": "two black-and-white cats -lrb- close-up -rrb- .",
    'A sign that says "STOP".': "a sign that says `` stop '' .",
    'A " superman " shirt': "a '' superman '' shirt",
    "Japanese “discount” button": "japanese `` discount '' button",
    "The word 'walk' in the dogs' park": "the word ` walk ' in the dogs ' park",
    "don’t": "do n't",
    "12:45, 1,000 men and 1/2 cup": "12:45 , 1,000 men and 1/2 cup",
    "3.5. U.S. Army, St. Louis": "3.5 . u.s. army , st. louis",
    "wait.... what?! no!!": "wait ... what ?! no !!",
    "a — b -- c": "a -- b -- c",
    "grass.. tree": "grass . . tree",
    "rock 'n' roll at 5 o'clock": "rock 'n' roll at 5 o'clock",
    "$5.50 and 50% off, #1": "$ 5.50 and 50 % off , # 1",
    "e-mail foo@bar.com": "e-mail foo@bar.com",
    "ingredients:salt,pepper;red/yellow": "ingredients : salt , pepper ; red/yellow",
    "café naïve": "café naïve",
    " \t": "",
}


@pytest.mark.parametrize(("text", "tokens"), STANFORD.items())
def test_tokens_are_those_of_stanford(text, tokens):
    assert tokenise(text, "keep_punctuation") == tokens.split()


def test_coco_drops_punctuation():
    assert tokenise("A dog's \"hat\" - isn't it?...", "coco") == ["a", "dog", "'s", "hat", "is", "n't", "it"]
    # coco-caption's list has -LRB-, the lower-cased token is -lrb-
    assert tokenise("cats (two).", "coco") == ["cats", "-lrb-", "two", "-rrb-"]


def test_an_unknown_tokenisation_is_refused():
    with pytest.raises(ConfigError, match="'ptb' is unknown: coco or keep_punctuation"):
        tokenise("a", "ptb")
