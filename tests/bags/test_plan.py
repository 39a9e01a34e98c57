"""The plan of a run: every bag of an epoch once, over all workers, also across a kill and a resume with other workers."""

import itertools
import json
import pickle

import pytest

from finecap_ray.bags.order import Layout
from finecap_ray.bags.plan import plan_run
from finecap_ray.config import RlSettings, Stage
from finecap_ray.errors import ConfigError, MismatchError

LAYOUTS = {2: Layout(13, 3), 3: Layout(11, 4)}
EPOCHS = [(2, 13), (2, 13), (3, 11)]  # (bag size, bags)


def settings(workers=1, **changes):
    curriculum = (Stage(bag_size=2, epochs=2), Stage(bag_size=3, epochs=1))
    return RlSettings(
        **{"images_per_step": 9, "curriculum": curriculum, "num_workers": workers, "groups_per_window": 2} | changes
    )


def taken(steps):
    """(epoch, bag size, row) of all bags of some steps, over all workers."""
    return [
        (part.epoch, part.bag_size, row) for step in steps for part in step.parts for own in part.workers for row in own
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_epoch_covers_every_bag_once(workers):
    plan = plan_run(LAYOUTS, settings(workers), seed=0)
    steps = list(plan)
    assert [step.step for step in steps] == list(range(len(plan)))
    found = taken(steps)
    wanted = [(epoch, size, row) for epoch, (size, bags) in enumerate(EPOCHS) for row in range(bags)]
    assert sorted(found) == wanted
    assert [epoch for epoch, _, _ in found] == sorted(epoch for epoch, _, _ in found)
    for step in steps:
        shares = [len(own) for own in step.workers]
        assert len(shares) == workers and min(shares) >= 1 and max(shares) - min(shares) <= 1
    orders = [[row for epoch, _, row in found if epoch == number] for number in range(2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_at_any_step_and_resumed_with_other_workers(before, after):
    wanted = [(epoch, size, row) for epoch, (size, bags) in enumerate(EPOCHS) for row in range(bags)]
    plan = plan_run(LAYOUTS, settings(before), seed=1)
    refused = 0
    for killed in range(len(plan) + 1):
        state = json.loads(json.dumps(plan.state_dict(killed)))
        try:
            rest = plan_run(LAYOUTS, settings(after), 1, state)
        except ConfigError as error:  # fewer bags than workers, and no epoch to carry them into
            left = len(wanted) - len(taken(plan[:killed]))
            assert f"{left} bags of the last epoch are left" in str(error) and left < after
            refused += 1
            continue
        assert sorted(taken(plan[:killed]) + taken(rest)) == wanted
        assert [step.step for step in rest] == list(range(killed, killed + len(rest)))
        assert all(min(sum(len(part.workers[w]) for part in step.parts) for w in range(after)) > 0 for step in rest)
        # Killed once more, and on with fewer workers.
        middle = len(rest) // 2
        last = plan_run(LAYOUTS, settings(min(before, after)), 1, rest.state_dict(middle))
        assert sorted(taken(plan[:killed]) + taken(rest[:middle]) + taken(last)) == wanted
    assert refused <= (after > before)


def test_bags_too_few_for_the_new_workers_go_first_in_the_next_epoch():
    plan = plan_run(LAYOUTS, settings(1), seed=0)
    # 13 bags in steps of 9 // 2 = 4: 4 + 4 + 4 + 1. One bag is left after 3 steps, and 3 workers can't share it.
    first = plan_run(LAYOUTS, settings(3), 0, plan.state_dict(3))[0]
    assert (first.epoch, first.carried.epoch) == (1, 0)
    assert [len(own) for own in first.carried.workers] == [0, 0, 1]  # to the worker with the smallest share
    assert [len(own) for own in first.workers] == [2, 1, 1]


def test_resumed_with_the_same_workers_the_steps_are_the_same():
    plan = plan_run(LAYOUTS, settings(2), seed=5)
    for killed in range(len(plan)):
        assert list(plan_run(LAYOUTS, settings(2), 5, plan.state_dict(killed))) == list(plan[killed:])
        assert plan[2:].state_dict(max(0, killed - 2)) == plan.state_dict(max(2, killed))


@pytest.mark.parametrize("workers", [2, 3])
def test_a_step_holds_the_same_bags_for_any_number_of_workers(workers):
    layouts = {2: Layout(60, 4)}
    curriculum = (Stage(bag_size=2, epochs=3),)
    alone, shared = (
        plan_run(layouts, settings(count, images_per_step=20, curriculum=curriculum), seed=3) for count in (1, workers)
    )
    for one, many in zip(alone, shared, strict=True):
        assert one.workers[0] == tuple(itertools.chain(*many.workers))


def test_each_worker_reads_a_part_of_a_window():
    """Row groups that 2 workers read, of 64 in windows of 8: little more than 64, not 128."""
    curriculum = (Stage(bag_size=2, epochs=1),)
    plan = plan_run(
        {2: Layout(64 * 32, 32)},
        settings(2, images_per_step=128, curriculum=curriculum, groups_per_window=8),
        seed=0,
    )
    read = [{row // 32 for step in plan for row in step.workers[rank]} for rank in range(2)]
    assert sum(map(len, read)) < 1.5 * 64


def test_a_band_is_the_rows_of_its_bags():
    curriculum = (Stage(bag_size=2, epochs=1, band=(0.5, 1)),)
    plan = plan_run({2: Layout(20, 3)}, settings(2, curriculum=curriculum), seed=0)
    assert sorted(row for _, _, row in taken(plan)) == list(range(10))  # the most alike come first


def test_max_steps_cuts_the_plan_and_changes_nothing_before_the_cut():
    whole, cut = plan_run(LAYOUTS, settings(), seed=0), plan_run(LAYOUTS, settings(max_steps=6), seed=0)
    assert list(cut) == list(whole[:6])
    assert list(plan_run(LAYOUTS, settings(max_steps=6), 0, whole.state_dict(4))) == list(whole[4:6])


def test_a_plan_is_small_and_travels():
    """20 epochs over 200 million bags: only the epochs are held."""
    layouts = {5: Layout(200_000_000, 4096)}
    plan = plan_run(layouts, settings(8, images_per_step=400, curriculum=(Stage(bag_size=5, epochs=20),)), seed=0)
    assert len(plan) == 20 * 200_000_000 // 80
    assert len(pickle.dumps(plan)) < 10_000
    assert sum(len(own) for own in plan[30_000_000].workers) == 80


def test_other_runs_and_missing_sizes_are_refused():
    with pytest.raises(MismatchError, match="bags of 2, 3, not of 4"):
        plan_run(LAYOUTS, settings(curriculum=(Stage(bag_size=4, epochs=1),)), seed=0)
    state = plan_run(LAYOUTS, settings(), seed=0).state_dict(3)
    with pytest.raises(MismatchError, match="the run to resume has seed 0, the settings have 1"):
        plan_run(LAYOUTS, settings(), 1, state)
    with pytest.raises(IndexError):
        plan_run(LAYOUTS, settings(), seed=0)[10**6]
