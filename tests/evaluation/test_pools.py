import json

import pytest

from finecap_ray.errors import ConfigError, DataError
from finecap_ray.evaluation.pools import Pool, find_pools, random_pools, read_bag_ids, read_imagecode

IDS = [f"i{row}" for row in range(10)]


def written(tmp_path, tree) -> str:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(tree))
    return str(file)


def test_bags_are_reported_by_size_and_incomplete_ones_counted(tmp_path):
    file = written(tmp_path, [["i0", "i1"], ["i2", "i3", "i4"], ["i5", "i6"], ["i7", "gone"]])
    found = find_pools(f"bags:{file}", IDS, seed=0)
    assert [(own.name, own.size, own.dependent) for own in found.sets] == [
        ("bags of 2", 2, True),
        ("bags of 3", 3, True),
    ]
    assert found.sets[0].pools == (Pool(("i0", "i1"), (0, 1)), Pool(("i5", "i6"), (0, 1)))
    assert found.left_out == {"bags with an image that isn't there": 1}


def test_every_image_is_asked_about_once_among_random_others():
    pools = random_pools(IDS, 4, seed=0)
    assert (pools.name, pools.size, pools.dependent) == ("4 random images", 4, False)
    asked = [pool.image_ids[place] for pool in pools.pools for place in pool.asked]
    assert sorted(asked) == IDS
    # 10 = 4 + 4 + 2: the last pool is filled up with 2 that aren't asked about again
    assert [len(pool.asked) for pool in pools.pools] == [4, 4, 2]
    assert all(len(set(pool.image_ids)) == 4 for pool in pools.pools)
    assert random_pools(IDS, 4, seed=0) == pools != random_pools(IDS, 4, seed=1)


def test_all_images_compete():
    (pools,) = find_pools("all", IDS, 0).sets
    assert pools.pools == (Pool(tuple(IDS), tuple(range(10))),)


def test_imagecode_asks_about_the_images_that_are_described(tmp_path):
    file = written(tmp_path, {"set-1": {"3": "the left one", "7": "the far one"}, "set-2": {"0": "x"}})
    assert read_imagecode(file)["set-1"] == {3: "the left one", 7: "the far one"}
    ids = [f"set-1/img{place}" for place in range(10)]
    found = find_pools(f"imagecode:{file}", ids, 0)
    assert found.sets[0].pools == (Pool(tuple(ids), (3, 7)),)
    assert found.left_out == {"ImageCoDe sets with an image that isn't there": 1}
    files = [f"{image_id}.jpg" for image_id in ids]  # as `finecap import` names the images of a folder
    assert find_pools(f"imagecode:{file}", files, 0).sets[0].pools == (Pool(tuple(files), (3, 7)),)


def test_images_without_captions_compete_in_bags_and_sets_only(tmp_path):
    file = written(tmp_path, [["i0", "x"], ["i1", "y"]])
    found = find_pools(f"bags:{file}", IDS, 0, others=["x"])
    assert found.sets[0].pools == (Pool(("i0", "x"), (0, 1)),)
    assert find_pools("all", IDS, 0, others=["x"]) == find_pools("all", IDS, 0)


def test_bags_that_ask_about_no_caption_are_counted(tmp_path):
    file = written(tmp_path, [["i0", "x"], ["x", "y"]])
    found = find_pools(f"bags:{file}", IDS, 0, others=["x", "y"])
    assert len(found.sets[0].pools) == 1 and found.left_out == {"bags that ask about no image with a caption": 1}
    with pytest.raises(DataError, match=r"none of the 2 bags .* asks about an image that has a caption"):
        find_pools(f"bags:{file}", [], 0, others=["i0", "x", "y"])


@pytest.mark.parametrize("tree", [[], {}, {"set": ["a"]}, {"set": {"first": "a"}}, {"set": {"-1": "a"}}])
def test_what_is_no_imagecode(tmp_path, tree):
    with pytest.raises(DataError, match=r"isn't \{set: \{place: description\}\}"):
        read_imagecode(written(tmp_path, tree))


def test_a_damaged_bag_set_is_one_message(tmp_path):
    (tmp_path / "size=2").mkdir()
    (tmp_path / "size=2" / "part-0.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="holds no bags"):
        read_bag_ids(tmp_path)


def test_bags_of_a_bag_set(bag_folder):
    bags = read_bag_ids(bag_folder)
    assert {len(bag) for bag in bags} == {2, 3}
    assert all(len(set(bag)) == len(bag) for bag in bags)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 1}, "isn't a list of bags"),
        ([["i0"]], "bag 0 of .* has 1 images, 1 of them distinct"),
        ([["i0", "i0"]], "bag 0 of .* has 2 images, 1 of them distinct"),
        ([["x", "y"]], "none of the 1 bags of .* absent are, for example, x, y"),
        ([], "isn't a list of bags"),
        ([["i0", None]], "isn't a list of bags"),
        ([["i0", ["i1"]]], "isn't a list of bags"),
    ],
)
def test_bags_that_cannot_be_used(tmp_path, tree, message):
    with pytest.raises(DataError, match=message):
        find_pools(f"bags:{written(tmp_path, tree)}", IDS, 0)


def test_other_requests_are_refused(tmp_path):
    for against in ("rd100", "random:", "random:many", "random:²", "all:1", "bags"):
        with pytest.raises(ConfigError, match="is unknown: bags:FILE, random:SIZE, all, or imagecode:FILE"):
            find_pools(against, IDS, 0)
    with pytest.raises(DataError, match="pools of 11 random images need 2 or more and at most the 10"):
        find_pools("random:11", IDS, 0)
    with pytest.raises(DataError, match="describe an image past 0 to 9, such as set"):
        read_imagecode(written(tmp_path, {"set": {"10": "x"}}))
    with pytest.raises(DataError, match="can't be read"):
        read_bag_ids(tmp_path / "absent.json")
