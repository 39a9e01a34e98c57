import math

import pytest

from finecap_ray.report.curves import BOTTOM, LEFT, RIGHT, TOP, learning_curves, number


def points(line: str) -> list[tuple[float, float]]:
    return [tuple(float(value) for value in point.split(",")) for point in line.split()]


def test_a_curve_fills_its_field():
    (curve,) = learning_curves([{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}, {"step": 5, "reward": 0.5}])
    # steps 1, 2, 5: 0, 1/4 and all of the width; values 0, 1, 0.5: bottom, top and the middle
    assert points(curve.raw[0]) == [
        (LEFT, BOTTOM),
        (LEFT + (RIGHT - LEFT) / 4, TOP),
        (RIGHT, (TOP + BOTTOM) / 2),
    ]
    assert (curve.low, curve.high, curve.first_step, curve.last_step) == ("0.000", "1.00", 1, 5)


def test_a_curve_is_cut_where_the_bag_size_changes():
    rows = [{"step": step, "accuracy": step / 100, "bag_size": 2 if step <= 60 else 3} for step in range(1, 101)]
    (curve,) = learning_curves(rows)
    assert [len(points(line)) for line in curve.raw] == [60, 40]
    assert [mark.label for mark in curve.marks] == ["bags of 2", "bags of 3"]
    assert curve.marks[1].x == pytest.approx(LEFT + 60 / 99 * (RIGHT - LEFT), abs=0.05)
    # means of the first and the last 100 // 20 = 5 rows, in percent
    assert (curve.first, curve.last, curve.unit) == ("3.00", "98.0", "%")
    # the first point of a stage has nothing before it to average with
    assert points(curve.smooth[1])[0] == points(curve.raw[1])[0]
    assert points(curve.smooth[1])[-1][1] == pytest.approx(BOTTOM - (98 - 1) / 99 * (BOTTOM - TOP), abs=0.06)


def test_rows_without_a_number_are_skipped():
    rows = [
        {"step": 1, "kl": math.nan},
        {"step": 2, "kl": 0.1},
        {"step": 3, "kl": 0.2},
        {"step": 3, "train_runtime": 9.0},
    ]
    (curve,) = learning_curves(rows)
    assert curve.title.startswith("KL") and curve.first_step == 2


def test_a_constant_runs_through_the_middle():
    (curve,) = learning_curves([{"step": 1, "entropy": 2.0}, {"step": 2, "entropy": 2.0}])
    assert {y for _, y in points(curve.raw[0])} == {(TOP + BOTTOM) / 2}
    (curve,) = learning_curves([{"step": 1, "entropy": 0.0}, {"step": 2, "entropy": 0.0}])
    assert {y for _, y in points(curve.raw[0])} == {(TOP + BOTTOM) / 2}


def test_one_row_is_no_curve():
    assert learning_curves([{"step": 1, "reward": 1.0}]) == []
    assert learning_curves([]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.1234, "0.123"), (-1.234, "−1.23"), (12.34, "12.3"), (1234.5, "1,234"), (1.23e-6, "1.2e-06")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
