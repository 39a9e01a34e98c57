from finecap_ray.report.merge import merge_details


def bag(name: str, ids: str, before: str, after: str, group: str = "seen") -> dict:
    """Ranks and captions by digits: "12" are the ranks of two images; the caption is system and id."""
    images = [
        {
            "image_id": image_id,
            "captions": {"mle": f"mle {image_id}", "rl": f"rl {after} {image_id}", "human": image_id},
            "rank": {"mle": float(first), "rl": float(second), "human": 1.0},
            "best": {"mle": ids[0], "rl": ids[0], "human": image_id},
        }
        for image_id, first, second in zip(ids, before, after, strict=True)
    ]
    return {"bag_id": name, "group": group, "similarity": 0.5, "images": images}


def test_one_run_is_as_it_is():
    own = [bag("x", "ab", "12", "11")]
    merged = merge_details([own], ["a"])
    assert merged.bags is own and merged.notes == ()
    assert merged.systems == [("mle", "before"), ("rl", "after"), ("human", "human")]


def test_another_run_brings_captions_everywhere_and_ranks_where_its_bag_is_the_same():
    one = [bag("x-0", "ab", "12", "11"), bag("x-1", "cd", "22", "12")]
    two = [bag("y-0", "ba", "21", "22"), bag("y-1", "ce", "11", "11")]  # the first is x-0 in another order
    merged = merge_details([one, two], ["one", "two"])
    assert [label for _, label in merged.systems] == ["one, before", "one, after", "two, before", "two, after", "human"]
    assert (merged.before, merged.after) == ("0/rl", "1/rl")
    first, second = (own["images"] for own in merged.bags)
    assert first[0]["rank"] == {"0/mle": 1.0, "0/rl": 1.0, "1/mle": 1.0, "1/rl": 2.0, "human": 1.0}
    assert first[0]["best"]["1/rl"] == "b"
    assert second[0]["captions"]["1/rl"] == "rl 11 c" and "1/rl" not in second[0]["rank"]
    assert second[1]["captions"]["1/rl"] is None  # two never saw d
    assert merged.notes == ("1 of the 2 bags of two are bags of one too; the others aren't shown.",)


def test_a_start_that_is_the_same_is_shown_once():
    one, two = [bag("x", "ab", "12", "11")], [bag("x", "ab", "12", "22")]
    merged = merge_details([one, two], ["one", "two"])
    assert [key for key, _ in merged.systems] == ["0/mle", "0/rl", "1/rl", "human"]
