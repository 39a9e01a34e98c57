import pytest
from pydantic import ValidationError

from finecap_ray.bags.curriculum import Curriculum, StepSizes, bags_per_step, band_rows, step_sizes
from finecap_ray.config import Stage, load_settings
from finecap_ray.errors import ConfigError, MismatchError

NDLB = [(2, 3), (3, 5), (5, 2), (7, 2), (10, 2), (15, 3), (20, 3)]  # (bag size, epochs)


def test_the_published_curriculum_is_a_preset():
    settings = load_settings("ndlb")
    assert [(stage.bag_size, stage.epochs) for stage in settings.rl.curriculum] == NDLB
    assert (settings.bags.compare, settings.bags.max_bags_per_image) == ("image_and_captions", None)
    curriculum = Curriculum(settings.rl.curriculum)
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


@pytest.mark.parametrize(
    ("bags", "workers", "sizes"),
    [
        (60, 1, [20, 20, 20]),
        (63, 1, [20, 20, 20, 3]),  # 63 bags of 5 in steps of 100 // 5 = 20: a tail is a shorter last step
        (63, 3, [20, 20, 20, 3]),
        (61, 1, [20, 20, 20, 1]),
        (61, 2, [20, 20, 21]),  # 1 bag can't serve 2 workers: it joins the step before
        (7, 2, [7]),
        (21, 20, [21]),
    ],
)
def test_the_steps_of_an_epoch(bags, workers, sizes):
    steps = step_sizes(bags, 5, 100, workers)
    bounds = [steps.bounds(step) for step in range(steps.count)]
    assert [end - start for start, end in bounds] == sizes
    assert [start for start, _ in bounds] == [sum(sizes[:step]) for step in range(len(sizes))]


def test_a_division_that_cannot_be_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"12 images per step // 5 images per bag = 2 bags.* 3 workers.* 15 or more"):
        step_sizes(100, 5, 12, 3)
    with pytest.raises(ConfigError, match=r"4 images per step // 5 images per bag = 0 bags"):
        step_sizes(100, 5, 4, 1)
    with pytest.raises(ConfigError, match=r"2 bags of 5.* 3 workers"):
        step_sizes(2, 5, 100, 3)
    with pytest.raises(ConfigError, match=r"0 bags of 5"):
        step_sizes(0, 5, 100, 1)
    assert step_sizes(3, 5, 100, 3) == StepSizes(count=1, full=20, last=3)


def test_bands_of_difficulty_part_the_bags():
    # The bags most alike come first: the hardest third of 10 is rows 0 to 2 (10 / 3 = 3.3 bags)
    assert band_rows(10, (0.0, 1.0)) == range(10)
    assert [band_rows(10, band) for band in ((2 / 3, 1), (1 / 3, 2 / 3), (0, 1 / 3))] == [
        range(0, 3),
        range(3, 7),
        range(7, 10),
    ]
    with pytest.raises(ConfigError, match=r"the band 0 to 0.1 of 3 bags holds none"):
        band_rows(3, (0, 0.1))


@pytest.mark.parametrize("band", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0, 1.1)])
def test_a_band_has_two_ends(band):
    with pytest.raises(ValidationError, match="the lower one first"):
        Stage(bag_size=2, epochs=1, band=band)


def test_a_saved_curriculum_goes_on_where_it_was():
    stages = [Stage(bag_size=2, epochs=1), Stage(bag_size=5, epochs=2)]
    curriculum = Curriculum(stages)
    curriculum.epoch, curriculum.bags_done = 1, 40
    again = Curriculum(stages)
    again.load_state_dict(curriculum.state_dict())
    assert (again.epoch, again.bags_done) == (1, 40)
    longer = Curriculum([*stages, Stage(bag_size=7, epochs=1)])  # what is to come may change
    longer.load_state_dict(curriculum.state_dict())
    assert longer.epochs == 4
    with pytest.raises(MismatchError, match=r"bags of \[2, 5\], this curriculum begins with \[2, 7\]"):
        Curriculum([Stage(bag_size=2, epochs=1), Stage(bag_size=7, epochs=2)]).load_state_dict(curriculum.state_dict())
