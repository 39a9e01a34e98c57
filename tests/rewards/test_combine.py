"""Which components a reward has, and their sum."""

import numpy as np
import pytest

from finecap_ray.config import RewardSettings
from finecap_ray.errors import ConfigError
from finecap_ray.rewards.combine import NAMES, build_components, component_weights, total_reward

REFERENCES = [["a dog"], ["a cat"]]
NOTHING = dict.fromkeys(NAMES, 0)


class Scorer:
    logit_scale = 7.0


def test_a_component_of_weight_0_is_not_built():
    alone = RewardSettings(**NOTHING | {"self_retrieval": 1})
    assert build_components(alone, Scorer, [], None).keys() == {"self_retrieval"}
    assert component_weights(RewardSettings(**NOTHING | {"ended": 0.5})) == {"ended": 0.5}
    every = RewardSettings(**dict.fromkeys(NAMES, 0.25))
    assert build_components(every, Scorer, REFERENCES, None).keys() == set(NAMES)


def test_the_scorer_s_scale_unless_another_is_set():
    assert build_components(RewardSettings(), Scorer, REFERENCES, None)["self_retrieval"].logit_scale == 7.0
    assert (
        build_components(RewardSettings(logit_scale=3), Scorer, REFERENCES, None)["self_retrieval"].logit_scale == 3.0
    )


def test_a_reward_of_nothing_and_negatives_of_no_bank_are_refused():
    with pytest.raises(ConfigError, match=r"every reward weight is 0: set one of rl.reward.self_retrieval, rl.reward"):
        component_weights(RewardSettings(**NOTHING))
    with pytest.raises(ConfigError, match="hard_negatives needs the bank"):
        build_components(RewardSettings(hard_negatives=3), Scorer, [], None)


def test_the_sum_is_weighted_and_a_caption_without_a_signal_is_average():
    components = {"self_retrieval": np.array([-1, -2, -3], np.float32), "cider": np.array([0.2, 0.4, np.nan])}
    total = total_reward(components, {"self_retrieval": 2.0, "cider": 0.5})
    # the third has the mean of 0.2 and 0.4 for CIDEr: against a baseline over all captions that term moves it nowhere
    assert total.tolist() == pytest.approx([-2 + 0.1, -4 + 0.2, -6 + 0.15])
    assert total.dtype == np.float32
    assert total_reward({"cider": np.full(2, np.nan)}, {"cider": 1.0}).tolist() == [0, 0]


def test_an_image_without_a_signal_gets_none_from_a_greedy_baseline():
    sampled, greedy = {"cider": np.array([0.2, 0.4, np.nan, np.nan])}, {"cider": np.array([0.5, np.nan])}
    rewards = total_reward(sampled, {"cider": 0.5}).reshape(2, 2)
    baseline = total_reward(greedy, {"cider": 0.5}, silent=sampled)
    assert (rewards - baseline[:, None]).tolist() == [pytest.approx([-0.15, -0.05]), [0, 0]]
