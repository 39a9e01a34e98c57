import math

import pytest

from finecap_ray.report.curves import BOTTOM, LEFT, RIGHT, TOP, learning_curves, number


def only_curve(rows: list[dict]):
    """The one curve of one run, and its line."""
    ((curve,),) = learning_curves([rows]).values()
    return curve, curve.lines[0]


def points(line: str) -> list[tuple[float, float]]:
    return [tuple(float(value) for value in point.split(",")) for point in line.split()]


def test_a_curve_fills_its_field():
    curve, line = only_curve([{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}, {"step": 5, "reward": 0.5}])
    # steps 1, 2, 5: 0, 1/4 and all of the width; values 0, 1, 0.5: bottom, top and the middle
    assert points(line.raw[0]) == [
        (LEFT, BOTTOM),
        (LEFT + (RIGHT - LEFT) / 4, TOP),
        (RIGHT, (TOP + BOTTOM) / 2),
    ]
    assert (curve.low, curve.high, curve.first_step, curve.last_step) == ("0.000", "1.00", 1, 5)


def test_a_curve_is_cut_where_the_bag_size_changes():
    rows = [{"step": step, "accuracy": step / 100, "bag_size": 2 if step <= 60 else 3} for step in range(1, 101)]
    curve, line = only_curve(rows)
    assert [len(points(stage)) for stage in line.raw] == [60, 40]
    assert [mark.label for mark in curve.marks] == ["bags of 2", "bags of 3"]
    assert curve.marks[1].x == pytest.approx(LEFT + 60 / 99 * (RIGHT - LEFT), abs=0.05)
    # means of the first and the last 100 // 20 = 5 rows, in percent
    assert (line.first, line.last, curve.unit) == ("3.00", "98.0", "%")
    # the first point of a stage has nothing before it to average with
    assert points(line.smooth[1])[0] == points(line.raw[1])[0]
    assert points(line.smooth[1])[-1][1] == pytest.approx(BOTTOM - (98 - 1) / 99 * (BOTTOM - TOP), abs=0.06)


def test_rows_without_a_number_are_skipped():
    rows = [
        {"step": 1, "kl": math.nan},
        {"step": 2, "kl": 0.1},
        {"step": 3, "kl": 0.2},
        {"step": 3, "train_runtime": 9.0},
    ]
    curve, _ = only_curve(rows)
    assert curve.title.startswith("KL") and curve.first_step == 2


def test_a_constant_runs_through_the_middle():
    _, line = only_curve([{"step": 1, "entropy": 2.0}, {"step": 2, "entropy": 2.0}])
    assert {y for _, y in points(line.raw[0])} == {(TOP + BOTTOM) / 2}
    _, line = only_curve([{"step": 1, "entropy": 0.0}, {"step": 2, "entropy": 0.0}])
    assert {y for _, y in points(line.raw[0])} == {(TOP + BOTTOM) / 2}


def test_one_row_is_no_curve():
    assert learning_curves([[{"step": 1, "reward": 1.0}]]) == {}
    assert learning_curves([[]]) == learning_curves([]) == {}


def test_runs_share_the_axes():
    short = [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 1.0}]
    long = [{"step": 1, "kl": 2.0}, {"step": 5, "kl": 4.0}]
    ((curve,),) = learning_curves([short, [], long]).values()
    assert (curve.first_step, curve.last_step, curve.low, curve.high) == (1, 5, "0.000", "4.00")
    assert [line.run for line in curve.lines] == [0, 2]
    # step 2 of 1 to 5 is a quarter of the width, 1 of 0 to 4 a quarter of the height
    assert points(curve.lines[0].raw[0])[1] == (LEFT + (RIGHT - LEFT) / 4, BOTTOM - (BOTTOM - TOP) / 4)


def test_every_part_of_a_reward_has_a_curve():
    rows = [{"step": step, "rewards/no_repeats/mean": step, "rewards/cider/mean": step} for step in (1, 2)]
    (section,) = learning_curves([rows]).items()
    assert section[0] == "Parts of the reward"
    assert [curve.title for curve in section[1]] == ["CIDEr-D, as papers print it", "No repeats"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.1234, "0.123"), (-1.234, "−1.23"), (12.34, "12.3"), (1234.5, "1,234"), (1.23e-6, "1.2e-06")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
