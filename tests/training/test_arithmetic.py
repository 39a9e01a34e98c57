"""Bags x images x captions -> sequences, with numbers a person can check."""

import pytest

from finecap_ray.config import MleSettings, RlSettings, Stage
from finecap_ray.errors import ConfigError
from finecap_ray.training.arithmetic import describe_mle, describe_rl, rl_arithmetic


def rl(**change) -> RlSettings:
    settings = {"images_per_step": 100, "captions_per_image": 8, "micro_batch": 200, "num_workers": 1}
    stages = (Stage(bag_size=3, epochs=2), Stage(bag_size=7, epochs=1))
    return RlSettings(**settings | {"curriculum": stages} | change)


def test_a_step_is_made_of_whole_bags():
    three, seven = rl_arithmetic(rl(), {})
    assert (three.bags, three.images, three.sequences) == (33, 99, 792)  # 100 // 3 bags, x 3, x 8
    assert (seven.bags, seven.images, seven.sequences) == (14, 98, 784)  # 100 // 7
    assert three.micro_batches == 4  # 100 x 8 / 200
    assert three.steps_per_epoch is None


def test_the_worker_with_most_is_told():
    three, seven = rl_arithmetic(rl(num_workers=2), {})
    assert (three.bags_per_worker, three.sequences_per_worker) == (17, 17 * 3 * 8)  # 33 bags: 17 + 16
    assert seven.sequences_per_worker == 7 * 7 * 8
    assert three.micro_batches == 2  # 100 x 8 / 2 workers / 200


def test_steps_are_told_where_the_bags_are_known():
    three, seven = rl_arithmetic(rl(), {3: 100})
    assert (three.steps_per_epoch, seven.steps_per_epoch) == (4, None)  # 33 + 33 + 33 + 1
    assert "together" not in describe_rl(rl(), {3: 100})
    assert describe_rl(rl(), {3: 100, 7: 14}).endswith("together 9 steps")  # 2 x 4 + 1 x 1
    assert describe_rl(rl(max_steps=5), {3: 100, 7: 14}).endswith("stopped after 5 (rl.max_steps)")


def test_the_line_has_the_whole_product():
    first = describe_rl(rl(), {}).splitlines()[0]
    assert first == (
        "33 bags x 3 images x 8 captions = 792 sequences per step; 1 worker: 33 bags, 792 sequences per worker in "
        "4 micro-batches; 2 epochs, steps known once the bags are mined"
    )
    assert describe_mle(MleSettings(batch_size=128, num_workers=2, epochs=3)) == (
        "128 captions per worker x 2 workers = 256 sequences per step, 3 epochs"
    )


def test_steps_that_can_not_be_are_refused_with_the_numbers():
    with pytest.raises(
        ConfigError, match=r"100 images per step // 7 images per bag = 14 bags per step, and each of 15"
    ):
        rl_arithmetic(rl(num_workers=15), {})
    # 100 x 8 sequences one by one are 800 micro-batches; 33 bags of 3 are 792.
    with pytest.raises(ConfigError, match=r"33 bags x 3 images x 8 captions = 792 sequences, fewer than its 800"):
        rl_arithmetic(rl(micro_batch=1), {})
    # The last step of 34 bags is a single one: 24 sequences in 27 micro-batches, of which some count for nothing.
    assert rl_arithmetic(rl(micro_batch=30), {3: 34})[0].steps_per_epoch == 2
