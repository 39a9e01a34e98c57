"""Deliberate faults between sampler, reward and trainer: each is caught within one step, and named.

Those between processes (a sampler that is stale, a tensor that isn't sent) are in test_trainer.py, with real samplers.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from finecap_ray.config import RewardSettings, TrainableSettings
from finecap_ray.errors import DriftError, MismatchError, RewardError, StaleWeightsError
from finecap_ray.records import Rollout
from finecap_ray.rewards.cider import Cider
from finecap_ray.rewards.combine import images_with_signal, total_reward
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.sampling.fingerprint import fingerprint, fingerprints
from finecap_ray.training.guards import Drift, check_captions, check_drift, check_rewards, check_weights
from finecap_ray.training.parts import merged_weights

PROMPT = (300, 300)
TRAINER = ([PROMPT, PROMPT], 300, (299,))  # prompts of two images, image token, banned tokens


def rollout(image_id, tokens=(1, 2), prompt=PROMPT):
    return Rollout(image_id, prompt, tokens, (-1.0,) * len(tokens), "a b", "stop", weights_version=0)


# --- weights


def test_a_fingerprint_tells_any_change():
    weights = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))  # 1.5 rows of 1024 words, and a rest
    own = fingerprint(weights)
    assert own == fingerprint(weights.clone()) == fingerprint(weights.t().contiguous().t())
    changed = [weights.clone() for _ in range(3)]
    changed[0][0, 0] += 1e-6
    changed[1][-1, -1] += 1e-6
    changed[2][[0, 1]] = changed[2][[1, 0]]
    others = [
        *changed,
        weights.t(),
        weights.reshape(300, 40),
        weights.double(),
        weights.to(torch.bfloat16),
        weights[1:],
    ]
    assert len({own, *(fingerprint(other) for other in others)}) == len(others) + 1
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))  # no dimension
    assert len(fingerprint(torch.empty(0))) == 8


def test_weights_that_differ_are_named():
    tensors = {"a": torch.zeros(3), "b": torch.ones(3), "c": torch.ones(2)}
    own = fingerprints(tensors)
    check_weights(own, [own, dict(own)], version=7)
    stale = own | fingerprints({"b": torch.full((3,), 2.0)})
    with pytest.raises(StaleWeightsError, match=r"weights 7 sampler 1 is with another b \(3 tensors"):
        check_weights(own, [own, stale], version=7)
    short = {name: value for name, value in stale.items() if name != "c"}
    with pytest.raises(StaleWeightsError, match="sampler 0 is without c and with another b"):
        check_weights(own, [short], version=7)
    with pytest.raises(StaleWeightsError, match="sampler 0 is without a, b, c"):
        check_weights(own, [{}], version=7)


# --- captions


def test_captions_in_another_s_place_are_refused():
    ours = [rollout("x"), rollout("x"), rollout("y"), rollout("y")]
    check_captions(ours, ["x", "y"], 2, *TRAINER)
    with pytest.raises(MismatchError, match="caption 1 is of image 'y' in the place of 'x'"):
        check_captions([ours[0], ours[2], ours[1], ours[3]], ["x", "y"], 2, *TRAINER)
    with pytest.raises(MismatchError, match="2 images x 2 captions = 4 were asked for, 3 came"):
        check_captions(ours[:3], ["x", "y"], 2, *TRAINER)


def test_image_tokens_are_counted_at_the_boundary():
    with pytest.raises(
        MismatchError,
        match="image 'y' came with a prompt of 1 tokens, 1 of them image tokens; the trainer's has 2, 2 of them",
    ):
        check_captions([rollout("x"), rollout("y", prompt=PROMPT[:1])], ["x", "y"], 1, *TRAINER)
    for token in (PROMPT[0], 299):
        with pytest.raises(MismatchError, match="image 'y' holds an image token"):
            check_captions([rollout("x"), rollout("y", tokens=(1, token))], ["x", "y"], 1, *TRAINER)


# --- rewards


def test_a_reward_that_is_no_number_is_named_with_its_image():
    fine = np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32)
    for value in (np.nan, np.inf, -np.inf):
        broken = fine.copy()
        broken[2:] = value
        with pytest.raises(
            RewardError, match=f"'self_retrieval' is {value} for 2 of 4 captions, first for caption 0 of image 'y'"
        ):
            check_rewards({"cider": fine, "self_retrieval": broken}, ["x", "y"], {"cider": np.array([False, False])})


def test_an_image_without_references_has_no_signal_and_that_is_counted():
    cider = np.array([0.1, 0.2, np.nan, np.nan], dtype=np.float32)
    first, both = {"cider": np.array([True, False])}, {"cider": np.array([True, True])}
    assert check_rewards({"cider": cider}, ["x", "y"], first) == {
        "rewards/cider/equal_images": 0,
        "rewards/cider/silent_images": 1,
    }
    with pytest.raises(RewardError, match="'cider' is nan for 2 of 4 captions, first for caption 0 of image 'y'"):
        check_rewards({"cider": cider}, ["x", "y"], both)
    cider[2] = 0.3  # no signal for one caption, and one for the other
    with pytest.raises(RewardError, match="caption 1 of image 'y'"):
        check_rewards({"cider": cider}, ["x", "y"], first)


def test_a_step_with_one_referenced_image_has_no_frequencies_of_its_own():
    """What `cider_frequencies: batch` says then, and that the guard takes it for what it is: no signal, for any image."""
    settings = RewardSettings(cider=1.0, cider_frequencies="batch", ref_clip_score=1.0)
    for references, silent in (([("a dog",), ()], 2), ([("a dog",), ("a cat",)], 0)):
        asked = RewardRequest(
            texts=["a dog", "a pig", "a cat", "a cow"],
            ended=np.ones(4, dtype=bool),
            target=np.array([0, 0, 1, 1]),
            image_ids=["x", "y"],
            embeddings=np.eye(2, dtype=np.float16),
            bag_of_image=np.array([0, 0]),
            references=references,
        )
        values = Cider(corpus=None)(asked, torch.empty(4, 0))
        has_signal = images_with_signal(settings, np.array([bool(own) for own in references]))
        assert has_signal["ref_clip_score"].tolist() == [True, bool(references[1])]
        assert check_rewards({"cider": values}, ["x", "y"], has_signal)["rewards/cider/silent_images"] == silent
        # In a sum it moves no caption, where it has no signal.
        total = total_reward({"cider": values, "length": np.zeros(4)}, {"cider": 1.0, "length": 1.0})
        assert total.tolist() == ([0, 0, 0, 0] if silent else values.tolist())


def test_equal_rewards_are_counted_by_component_and_said(caplog):
    some, every = np.array([0.5, 0.5, 0.5, 0.4]), np.array([0.5, 0.5, 0.1, 0.1])
    metrics = check_rewards({"self_retrieval": some, "clip_score": every}, ["x", "y"], {})
    assert metrics == {"rewards/self_retrieval/equal_images": 1, "rewards/clip_score/equal_images": 2}
    (record,) = caplog.records
    assert "'clip_score' is the same for all captions of each of 2 images" in record.getMessage()


def test_captions_of_images_that_have_one_each_are_compared_with_each_other(caplog):
    images, one = ["x", "y", "z"], {"cider": np.array([True, False, True])}
    different = {"self_retrieval": np.array([-0.1, -2.0, -3.0]), "cider": np.array([0.1, np.nan, 0.2])}
    metrics = check_rewards(different, images, one)
    assert metrics["rewards/self_retrieval/equal_images"] == metrics["rewards/cider/equal_images"] == 0
    assert not caplog.records
    assert check_rewards({"cider": np.array([0.1, np.nan, 0.1])}, images, one)["rewards/cider/equal_images"] == 2
    assert "the same for all captions of each of 2 images" in caplog.text


def test_a_penalty_that_nobody_pays_is_counted_and_no_fault(caplog):
    assert check_rewards({"ended": np.zeros(4)}, ["a", "b"], {}) == {"rewards/ended/equal_images": 2.0}
    assert not caplog.records


# --- drift


def test_drift_per_token_and_per_caption():
    sampler = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    own = sampler + torch.tensor([[0.1, -0.1, 0.3], [0.2, 0.0, 5.0]])
    drift = Drift.of(own, sampler, mask)
    assert drift.token_mean == pytest.approx((0.1 + 0.1 + 0.3 + 0.2 + 0.0) / 5, abs=1e-6)
    assert drift.token_max == pytest.approx(0.3, abs=1e-6)
    # of the sums: 0.1 - 0.1 + 0.3 and 0.2 + 0.0
    assert drift.caption_mean == pytest.approx((0.3 + 0.2) / 2, abs=1e-6)
    assert drift.caption_max == pytest.approx(0.3, abs=1e-6)
    torch.testing.assert_close(drift.by_caption, torch.tensor([0.5 / 3, 0.2 / 2]))


@pytest.mark.parametrize(
    ("tokens", "by_caption", "ok"),
    [
        pytest.param(1e-3, [1e-3, 1e-3], True, id="at the bound"),
        pytest.param(1.1e-3, [1.1e-3, 1.1e-3], False, id="past it"),
        pytest.param(5e-4, [1e-4, 9e-3], True, id="a caption at 9 times the bound"),
        pytest.param(5e-4, [1e-4, 2e-2], False, id="a caption at 20 times the bound, lost in the mean"),
        pytest.param(math.nan, [math.nan, 0.0], False, id="no number"),
    ],
)
def test_the_bound_is_on_the_mean_and_ten_times_that_on_a_caption(tokens, by_caption, ok):
    drift = Drift(tokens, tokens, tokens, tokens, torch.tensor(by_caption))
    if ok:
        check_drift(drift, 1e-3, 3, False, likely_cause=lambda: pytest.fail("nobody asks"))
    else:
        with pytest.raises(DriftError, match=r"step 3: .* the bound is 1.00e-03 per token: likely cause: the moon"):
            check_drift(drift, 1e-3, 3, False, likely_cause=lambda: "the moon")


def history(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_drift_is_logged_per_token_and_per_caption(train_alone):
    trainer, _ = train_alone(steps=2)
    for token, caption in (("mean", "caption_mean"), ("max", "caption_max")):
        tokens, captions = history(trainer, f"drift/{token}"), history(trainer, f"drift/{caption}")
        assert len(tokens) == len(captions) == 2
        assert 0 < max(tokens) < 1e-5 and 0 < max(captions) < 6 * 1e-5


# --- faults at the sampler, through the trainer


def copy_of(model):
    """What a sampler makes of published weights. (A deep copy would go on running the weights of the original: TRL's forward
    holds on to that.)"""
    copied = type(model)(model.config).eval()
    copied.load_state_dict(merged_weights(model))
    return copied


class Older:
    """The weights of the start, at every step."""

    def __call__(self, step, given):
        if step == 0:
            self.model = copy_of(given["model"])
        return {"model": self.model}


def other_temperature(step, given):
    return {"temperature": 0.9 * given["temperature"]}


def swapped_image(step, given):
    """The sampler sees image 1 with the features of image 2."""
    first, second = given["bags"]
    wrong = replace(first.images[1], features=second.images[0].features)
    return {"bags": [replace(first, images=(first.images[0], wrong)), second]}


def one_parameter_of_before(step, given):
    """All of the weights but one tensor."""
    model = copy_of(given["model"])
    with torch.no_grad():
        bias = model.model.mapper.out.bias
        # Not a constant: the decoder's layer norm takes that out, and only a fingerprint of the weights could tell.
        bias.add_(0.05 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    return {"model": model}


@pytest.mark.parametrize(
    ("wrong", "step", "message"),
    [
        (Older(), 1, "likely cause: stale weights"),
        (other_temperature, 0, r"those of temperature 0\.90, the trainer's of 1\.00"),
        (swapped_image, 0, r"something else than the trainer of image image 1, .* those of the 3 other images don't"),
        (one_parameter_of_before, 0, "likely cause: stale weights"),
    ],
)
@pytest.mark.parametrize("trainable", [TrainableSettings(), TrainableSettings(decoder="lora", lora_rank=2)])
def test_a_sampler_that_captions_with_something_else_is_caught_within_a_step(
    train_alone, wrong, step, message, trainable
):
    with pytest.raises(DriftError, match=message) as error:
        train_alone(steps=3, wrong=wrong, trainable=trainable)
    assert f"step {step}: sampler and trainer differ" in str(error.value)
    # At the first step it is the checkpoint itself that isn't sampled from.
    assert ("not those of the checkpoint that training starts from" in str(error.value)) == (step == 0)


def test_the_first_step_after_a_resume_is_a_first_step(train_alone, tmp_path):
    train_alone(steps=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(DriftError, match=r"step 1: .* not those of the checkpoint that training starts from"):
        train_alone(steps=2, wrong=other_temperature, resume_from=checkpoint)


def test_captions_that_change_places_are_caught(train_alone):
    def wrap(step, scored):
        first, *rest = scored.rollouts
        return replace(scored, rollouts=[*rest, first])

    with pytest.raises(MismatchError, match="caption 2 is of image 'image 1' in the place of 'image 0'"):
        train_alone(wrap=wrap)
