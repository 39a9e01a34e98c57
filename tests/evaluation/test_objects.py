import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation.objects import object_precision, read_synonyms, singular

COCO = read_synonyms()


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two puppies and a kitten on benches.", ["dog", "cat", "bench"]),
        ("A man eats a hot dog", ["person", "hot dog"]),  # the longest name: no dog
        ("a baby elephant near people", ["elephant", "person"]),  # no baby
        ("sliding into home plate", []),
        ("a glass of water", []),
    ],
)
def test_the_objects_a_text_names(text, objects):
    assert COCO.objects(text) == objects


def test_precision_and_recall_by_hand():
    references = {"a": ["A dog runs on grass.", "A man and his puppy"], "b": ["a cat on a couch"], "c": []}
    candidates = {"a": "two dogs and a cat", "b": "a sofa", "c": "a zebra"}
    # a names dog and cat, of which cat is in no reference; b names couch; c has no reference
    assert object_precision(candidates, references, COCO) == pytest.approx(
        {
            "object_precision": 2 / 3,
            "object_recall": (1 / 2 + 1 / 2) / 2,  # dog of {dog, person}, couch of {cat, couch}
            "hallucinating": 1 / 2,
            "objects_per_caption": 3 / 2,
        }
    )


def test_every_object_of_the_table_is_itself():
    names = set(COCO.object_of.values()) - {""}
    assert len(names) == 80  # COCO's
    assert all(COCO.objects(f"a {name} here") == [name] for name in names)


def test_a_table_of_ones_own(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("tree, oak, fir tree\nflower, rose\n")
    assert read_synonyms(file).objects("Oaks, roses and fir trees") == ["tree", "flower", "tree"]
    file.write_text("tree, rose\nflower, rose\n")
    with pytest.raises(DataError, match="'rose' is a synonym of 'tree' and of 'flower'"):
        read_synonyms(file)


def test_captions_without_references_cannot_be_judged():
    with pytest.raises(DataError, match="none of 1 captions"):
        object_precision({"a": "a dog"}, {"a": []}, COCO)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dogs", "dog"),
        ("benches", "bench"),
        ("puppies", "puppy"),
        ("buses", "bus"),
        ("glass", "glass"),
        ("ties", "tie"),
        ("taxis", "taxi"),
        ("canoes", "canoe"),
        ("cookies", "cookie"),
        ("minibuses", "minibus"),
    ],
)
def test_singular(word, expected):
    assert singular(word) == expected
