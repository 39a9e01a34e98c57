"""TrueMatch's format in and out: a JSON list of bags of image ids."""

import json
from dataclasses import replace

import pytest

from finecap_ray.bags.build import build_bags
from finecap_ray.bags.stream import read_bags
from finecap_ray.bags.truematch import bag_rows, export_bags, read_truematch, write_truematch
from finecap_ray.config import BagSettings
from finecap_ray.errors import DataError, MismatchError


def ids(bags):
    return [[image.image_id for image in bag.images] for bag in bags]


def test_bags_go_out_and_come_in_again(bag_folder, bag_source, tmp_path):
    out = tmp_path / "bags.json"
    mined = ids(read_bags(bag_folder, 2)) + ids(read_bags(bag_folder, 3))
    assert export_bags(bag_folder, out, None) == len(mined)
    assert json.loads(out.read_text()) == read_truematch(out) == mined
    assert export_bags(bag_folder, out, [3]) == len(read_bags(bag_folder, 3))
    with pytest.raises(MismatchError, match="bags of 2, 3, not of 7"):
        export_bags(bag_folder, out, [7])

    # Bags of 3 as listed, one of which names an image of another split; those of 2 are mined.
    listed = [bag_source.image_ids[:3], bag_source.image_ids[10:13], ["elsewhere", *bag_source.image_ids[20:22]]]
    write_truematch(listed, out)
    manifest = build_bags(bag_source, tmp_path, (2, 3), BagSettings(truematch=str(out)), seed=0)
    assert sorted(ids(read_bags(tmp_path, 3))) == sorted(listed[:2])
    assert [manifest["sizes"][size]["mined"] for size in ("2", "3")] == [True, False]
    assert manifest["listed_bags_of_other_images"] == 1
    assert ids(read_bags(tmp_path, 2)) == ids(read_bags(bag_folder, 2))


def test_ids_are_text():
    assert bag_rows([["7", "9"], ["9", "8"]], ["7", "8", "9"]) == ({2: [(0, 2), (2, 1)]}, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "can't be read as JSON"),
        ("{}", "isn't a list of bags"),
        ("[]", "isn't a list of bags"),
        ("[1, 2]", "isn't a list of bags"),
        ("[[1, null]]", "isn't a list of bags"),
        ("[[1, 2], [3, 3]]", "bag 1 of .* has 2 images, 1 of them distinct"),
        ("[[1]]", "bag 0 of .* has 1 images"),
    ],
)
def test_what_is_no_list_of_bags(tmp_path, text, message):
    (tmp_path / "bags.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_truematch(tmp_path / "bags.json")


def test_a_file_that_is_not_there(bag_source, tmp_path):
    with pytest.raises(DataError, match=r"no\.json can't be read"):
        build_bags(replace(bag_source), tmp_path, (2,), BagSettings(truematch=str(tmp_path / "no.json")), seed=0)
