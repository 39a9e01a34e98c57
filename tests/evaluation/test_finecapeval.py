import pytest

from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.finecapeval import aspect_coverage, read_finecapeval

ROWS = (
    "image,caption,background,object,relation\n"
    "1.jpg,a cat on mats,grey wall,cats\\;two mats,at rest\n"
    "1.jpg,a cat,,cat,on\n"  # left out: no background
)


@pytest.fixture
def phrases(tmp_path):
    file = tmp_path / "FineCapEval.csv"
    file.write_text(ROWS)
    return read_finecapeval(file)


def test_the_phrases_of_an_image(phrases):
    assert phrases == {
        "background": {"1": ["grey wall"]},
        "object": {"1": ["cats", "two mats"]},
        "relation": {"1": ["at rest"]},
    }


def test_coverage_by_hand(phrases):
    candidates = {"1": "a cat on two mats by a wall"}
    # token: wall of (grey, wall); cat and (two, mat); none of (at, rest)
    assert aspect_coverage(candidates, phrases) == {"background": 1 / 2, "object": 1.0, "relation": 0.0}
    named_by_file = {"1.jpg": candidates["1"]}
    assert aspect_coverage(named_by_file, phrases) == aspect_coverage(candidates, phrases)
    # paper: "cats" is not in the text, "two mats" is; "at" is, inside of "cat" and "mats"
    assert aspect_coverage(candidates, phrases, "paper") == {"background": 1 / 2, "object": 1 / 2, "relation": 1 / 2}
    # with a stemmer, as in the release: "cat" is in the text
    stemmed = aspect_coverage(candidates, phrases, "paper", stem=lambda word: word.rstrip("s"))
    assert stemmed["object"] == 1.0


def test_what_cannot_be_covered(phrases, tmp_path):
    with pytest.raises(DataError, match="none of the 1 images"):
        aspect_coverage({"2": "a cat"}, phrases)
    with pytest.raises(ConfigError, match="'stem' is unknown: paper or token"):
        aspect_coverage({"1": "a cat"}, phrases, "stem")
    (tmp_path / "other.csv").write_text("image,caption\n1,a\n")
    with pytest.raises(DataError, match="has no column background, object, relation"):
        read_finecapeval(tmp_path / "other.csv")
