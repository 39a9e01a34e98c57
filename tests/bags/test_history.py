"""A run that is killed and resumed with other numbers of workers takes every bag once."""

from finecap_ray.bags.history import plan_from
from finecap_ray.config import RlSettings, Stage

SHELF = {"rows_per_group": 3, "rows_per_part": 192}
MANIFEST = {"sizes": {"2": {"bags": 13} | SHELF, "3": {"bags": 11} | SHELF}}


def settings(workers):
    curriculum = (Stage(bag_size=2, epochs=2), Stage(bag_size=3, epochs=1))
    return RlSettings(images_per_step=9, curriculum=curriculum, num_workers=workers)


def rows(steps):
    return [(part.epoch, row) for step in steps for part in step.parts for own in part.workers for row in own]


def test_workers_that_come_and_go(tmp_path):
    """1 worker for 3 steps, 3 workers up to step 6, killed at 8 and taken up again at 6, then 2 workers to the end."""
    first = plan_from(tmp_path, MANIFEST, settings(1), seed=0, step=0)
    taken = rows(first[:3])
    second = plan_from(tmp_path, MANIFEST, settings(3), seed=0, step=3)
    assert second.first_step == 3
    taken += rows(second.from_step(3)[:3])
    again = plan_from(tmp_path, MANIFEST, settings(3), seed=0, step=6)
    assert list(again.from_step(6)) == list(second.from_step(6))
    third = plan_from(tmp_path, MANIFEST, settings(2), seed=0, step=6)
    taken += rows(third.from_step(6))
    assert sorted(taken) == [(epoch, row) for epoch, bags in enumerate((13, 13, 11)) for row in range(bags)]
    assert third.from_step(6)[-1].step == third.total_steps - 1


def test_the_same_number_of_workers_has_one_plan(tmp_path):
    first = plan_from(tmp_path, MANIFEST, settings(2), seed=0, step=0)
    again = plan_from(tmp_path, MANIFEST, settings(2), seed=0, step=4)
    assert list(again.from_step(4)) == list(first[4:]) and again.total_steps == len(first)
