"""Which bags a report shows."""

from finecap_ray.report.choose import choose_bags


def bag(name: str, group: str, before: list[float], after: list[float]) -> dict:
    images = [{"rank": {"mle": first, "rl": second}} for first, second in zip(before, after, strict=True)]
    return {"bag_id": name, "group": group, "images": images}


GAINED, SAME, LOST = ([2, 2], [1, 1]), ([1, 2], [1, 2]), ([1, 1], [1, 2])


def test_every_group_and_every_outcome_is_shown():
    details = [
        bag(f"{group}-{kind}{index}", group, *ranks)
        for group in ("seen", "unseen")
        for kind, ranks in (("gained", GAINED), ("same", SAME), ("lost", LOST))
        for index in range(10, 30)
    ]
    names = [own["bag_id"] for own in choose_bags(details, 12)]
    # 6 of each group, 2 of each outcome: the first and the one in the middle of 20
    expected = [f"{kind}{index}" for kind in ("gained", "same", "lost") for index in (10, 20)]
    assert sorted(name.removeprefix("seen-") for name in names[:6]) == sorted(expected)
    assert sorted(name.removeprefix("unseen-") for name in names[6:]) == sorted(expected)
    assert names == [own["bag_id"] for own in choose_bags(details, 12)]


def test_an_outcome_that_does_not_happen_leaves_its_place_to_the_others():
    details = [bag(f"a{index}", "seen", *GAINED) for index in range(5)] + [bag("b", "unseen", *LOST)]
    assert [own["bag_id"] for own in choose_bags(details, 4)] == ["a0", "a1", "a3", "b"]  # 5 * (0, 1, 2) // 3
    assert len(choose_bags(details, 100)) == 6


def test_a_shared_first_place_is_not_a_find():
    details = [bag("tie", "seen", [1.0, 1.0], [1.5, 1.5]), bag("won", "seen", [1.5, 1.5], [1.0, 1.0])]
    assert [own["bag_id"] for own in choose_bags(details, 2)] == ["won", "tie"]
