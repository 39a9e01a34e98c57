import itertools

import pytest

from finecap_ray.bags.curriculum import Curriculum, bags_per_step, step_plan, steps_per_epoch
from finecap_ray.config import Stage
from finecap_ray.errors import ConfigError

NDLB = [(2, 3), (3, 5), (5, 2), (7, 2), (10, 2), (15, 3), (20, 3)]  # (bag size, epochs)


def test_the_published_curriculum():
    curriculum = Curriculum([Stage(bag_size=size, epochs=epochs) for size, epochs in NDLB])
    assert curriculum.epochs == 20
    assert [curriculum.bag_size(epoch) for epoch in range(20)] == (
        [2] * 3 + [3] * 5 + [5] * 2 + [7] * 2 + [10] * 2 + [15] * 3 + [20] * 3
    )


@pytest.mark.parametrize("epoch", [-1, 3, 100])
def test_an_epoch_outside_the_curriculum_is_an_error(epoch):
    with pytest.raises(ConfigError, match=rf"epoch {epoch} .* 3 epochs are 0 to 2"):
        Curriculum([Stage(bag_size=2, epochs=1), Stage(bag_size=5, epochs=2)]).bag_size(epoch)


def test_a_curriculum_without_stages_is_an_error():
    with pytest.raises(ConfigError, match="no stage"):
        Curriculum([])


def test_whole_bags_per_step():
    # 100 // (2, 3, 5, 7, 10, 15, 20)
    assert [bags_per_step(size, 100, 1) for size, _ in NDLB] == [50, 33, 20, 14, 10, 6, 5]


# (bags, bag size, images per step): no tail, tails of 1, 2 and 3, one short step only
CASES = [(60, 5, 100), (61, 5, 100), (62, 5, 100), (63, 5, 100), (100, 3, 100), (7, 5, 100), (9, 2, 6), (10, 2, 6)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("bags", "size", "images"), CASES)
def test_every_bag_once_per_epoch_over_all_workers(bags, size, images, workers):
    plan = step_plan(bags, size, images, workers, seed=0, epoch=0)
    assert len(plan) == steps_per_epoch(bags, size, images, workers)
    assert sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(plan))) == list(range(bags))
    for step in plan:
        shares = [len(share) for share in step]
        assert len(shares) == workers and min(shares) >= 1 and max(shares) - min(shares) <= 1
    full = images // size
    sizes = [sum(len(share) for share in step) for step in plan]
    assert all(count == full for count in sizes[:-1])
    assert sizes[-1] < full + workers


def test_a_tail_is_a_shorter_last_step():
    # 63 bags of 5 in steps of 100 // 5 = 20: 20 + 20 + 20 + 3, and 3 over 2 workers is 2 + 1
    plan = step_plan(63, 5, 100, 2, seed=0, epoch=0)
    assert [[len(share) for share in step] for step in plan] == [[10, 10], [10, 10], [10, 10], [2, 1]]


def test_a_tail_too_small_for_the_workers_joins_the_step_before():
    # 61 = 20 + 20 + 20 + 1, and 1 bag can't serve 2 workers
    plan = step_plan(61, 5, 100, 2, seed=0, epoch=0)
    assert [[len(share) for share in step] for step in plan] == [[10, 10], [10, 10], [11, 10]]


def test_each_epoch_has_a_new_order_and_the_same_one_when_asked_again():
    def order(**change):
        arguments = {"seed": 0, "epoch": 0, "bag_size": 5, **change}
        return step_plan(bags=40, images_per_step=20, num_workers=2, **arguments)

    assert order() == order()
    assert order() != order(epoch=1) != order(epoch=2) != order()
    assert order() != order(seed=1)
    # sizes 4 and 5 have different numbers of bags in a step: compare the flat orders
    flat = [list(itertools.chain(*itertools.chain(*plan))) for plan in (order(), order(bag_size=4))]
    assert flat[0] != flat[1]


@pytest.mark.parametrize("workers", [2, 3])
def test_a_step_holds_the_same_bags_for_any_number_of_workers(workers):
    alone = step_plan(60, 5, 100, 1, seed=3, epoch=4)
    shared = step_plan(60, 5, 100, workers, seed=3, epoch=4)
    assert [tuple(itertools.chain(*step)) for step in shared] == [step[0] for step in alone]


def test_a_division_that_cannot_be_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"12 images per step // 5 images per bag = 2 bags.* 3 workers.* 15 or more"):
        step_plan(100, 5, 12, 3, seed=0, epoch=0)
    with pytest.raises(ConfigError, match=r"4 images per step // 5 images per bag = 0 bags"):
        step_plan(100, 5, 4, 1, seed=0, epoch=0)
    with pytest.raises(ConfigError, match=r"2 bags of 5.* 3 workers"):
        step_plan(2, 5, 100, 3, seed=0, epoch=0)
    with pytest.raises(ConfigError, match=r"0 bags of 5"):
        step_plan(0, 5, 100, 1, seed=0, epoch=0)
