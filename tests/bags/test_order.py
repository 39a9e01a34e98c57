"""The order of an epoch: a permutation of its bags, a new one each time, in windows of row groups."""

import numpy as np
import pytest

from finecap_ray.bags.order import EpochOrder, Layout


def order(bags=100, rows_per_group=8, first=0, groups_per_window=4, seed=0, epoch=0, bag_size=5):
    layout = Layout(bags, rows_per_group, first)
    return EpochOrder(layout, groups_per_window, seed, epoch, bag_size).take(0, bags)[0].tolist()


@pytest.mark.parametrize("bags", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("rows_per_group", [1, 3, 8, 200])
@pytest.mark.parametrize("groups_per_window", [1, 3, 50])
@pytest.mark.parametrize("first", [0, 5])
def test_every_bag_comes_once(bags, rows_per_group, groups_per_window, first):
    rows = order(bags, rows_per_group, first, groups_per_window)
    assert sorted(rows) == list(range(first, first + bags))


def test_no_order_repeats_and_each_is_the_same_when_asked_again():
    orders = [
        order(seed=seed, epoch=epoch, bag_size=size) for seed in range(4) for epoch in range(10) for size in (2, 5)
    ]
    assert len({tuple(rows) for rows in orders}) == 80
    assert order(seed=3, epoch=7) == order(seed=3, epoch=7)


def test_any_part_of_an_order_can_be_taken():
    one = EpochOrder(Layout(100, 8, 3), 4, 0, 0, 2)
    whole = one.take(0, 100)
    for start in range(0, 100, 7):
        for end in range(start + 1, 101, 13):
            np.testing.assert_array_equal(one.take(start, end)[0], whole[0][start:end])
            np.testing.assert_array_equal(one.take(start, end)[1], whole[1][start:end])


def test_a_row_group_is_read_in_one_window():
    """100 bags in groups of 8, windows of 4 groups: 4 windows, and the groups of one come in no other."""
    rows, groups = EpochOrder(Layout(100, 8), 4, 0, 0, 2).take(0, 100)
    windows = groups // 4
    assert (np.diff(windows) >= 0).all() and windows.max() == 3
    where = {}
    for row, window in zip(rows.tolist(), windows.tolist(), strict=True):
        where.setdefault(row // 8, set()).add(window)
    assert all(len(found) == 1 for found in where.values())
    assert len(where) == 13


def test_within_a_window_and_over_the_windows_bags_are_mixed():
    rows = order(bags=1000, rows_per_group=10, groups_per_window=10)
    assert len({row // 10 for row in rows[:10]}) > 4  # 10 bags of 10 groups
    assert sorted({row // 10 for row in rows[:100]}) != list(range(10))  # not the first 10 groups of the file
