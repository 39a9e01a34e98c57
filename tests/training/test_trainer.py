"""The policy-gradient update: TRL's trainer on real bags, with captions of real samplers and rewards of a real scorer.

The trainer runs in this process; `tests/end_to_end` runs it under Ray Train.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.stream import plan_run, stream_bags
from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.config import CaptionerSettings, RewardSettings, RlSettings, Settings, Stage, TrainableSettings
from finecap_ray.errors import DriftError, StaleWeightsError
from finecap_ray.rewards.combine import total_reward
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.weights import publish
from finecap_ray.training.guards import check_weights
from finecap_ray.training.loop import RlJob, Rollouts, estimator
from finecap_ray.training.parts import merged_weights
from finecap_ray.training.trainer import BagTrainer, grpo_arguments

MAX_TOKENS = 8
# Nats: what rounding in float32 makes of the log-prob of a single token where weights have moved far; 1e-5 was passed by a
# tenth on one CPU and a third on another. The mean over tokens is held to 1e-5.
LARGEST = 3e-5


@pytest.fixture
def run(samplers, rewards, versions, bag_folder, captioner_folder, resources, tmp_path):
    """A function that trains for some steps and returns (trainer, scored rollouts by step)."""

    def go(steps=3, resume_from=None, wrap=None, model=None, folder="run", samplers_of_run=None, **changes):
        rl = RlSettings(
            **{
                "images_per_step": 8,
                "captions_per_image": 2,
                "curriculum": (Stage(bag_size=2, epochs=1), Stage(bag_size=3, epochs=1)),
                "learning_rate": 1e-2,
                "reward": RewardSettings(scope="bag", cider=0.5, ended=0, repetition=0),
                "advantage": "leave_one_out",
                "average_decay": 0,
                "drift_bound": 1e-5,
                "save_every": 1,
                "keep_checkpoints": 10,
            }
            | changes
        )
        settings = Settings(rl=rl, captioner=CaptionerSettings(max_tokens=MAX_TOKENS), bags={"sizes": (2, 3)})
        plan = plan_run(read_manifest(bag_folder), rl.model_copy(update={"max_steps": steps}), seed=0)
        first_version = next(versions)
        pool = samplers if samplers_of_run is None else samplers_of_run(samplers, first_version)
        job = RlJob(settings, str(captioner_folder), str(bag_folder), str(tmp_path), plan, None, pool, rewards)
        own, processor = load_captioner(captioner_folder)
        rollouts = Rollouts(job, family_of(own.config, processor))
        scored = {}

        def rollout(step, bags, policy):
            scored[step] = rollouts(first_version + step, bags, policy)
            return scored[step] if wrap is None else wrap(step, scored[step], policy)

        trainer = BagTrainer(
            (model or own).train(),
            processor,
            grpo_arguments(rl, str(tmp_path / folder), len(plan), MAX_TOKENS, use_gpu=False, seed=0),
            rl,
            bags=lambda step: stream_bags(bag_folder, plan[step:], rank=0, timeout_s=60),
            rollout=rollout,
            estimator=estimator(rl.advantage),
            callbacks=[],
        )
        trainer.first_version = first_version
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer, scored

    return go


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sampler_and_trainer_agree_after_every_sync(run, captioner_folder, temperature):
    """The weights move by 1e-2 per step: agreement to rounding at each step means that each step's captions are its own.

    Rounding is that of the logits; a temperature divides it along with them.
    """
    trainer, scored = run(steps=3, temperature=temperature, drift_bound=1e-5 / temperature)
    drift = history(trainer, "drift/max")
    assert len(drift) == 3
    assert max(drift) <= LARGEST / temperature
    for step, one in scored.items():
        assert {rollout.weights_version for rollout in one.rollouts} == {trainer.first_version + step}
    assert not equal(weights(trainer), load_captioner(captioner_folder)[0].state_dict())


def test_micro_batches_change_nothing_but_rounding(run):
    """8 images x 2 captions at once, and in uneven parts of 16 // 5 -> 4 micro-batches of 4 captions each."""
    recorded = {}

    def record(step, scored, policy):
        return recorded.setdefault(step, scored)

    whole, _ = run(steps=1, wrap=record, loss_type="dr_grpo")
    parts, _ = run(steps=1, wrap=lambda step, scored, policy: recorded[step], loss_type="dr_grpo", micro_batch=5)
    assert history(whole, "grad_norm")[0] > 0
    assert history(parts, "grad_norm") == pytest.approx(history(whole, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param("weights", id="the trainer's weights changed after they were published"),
        pytest.param("logprobs", id="log-probs of another temperature"),
    ],
)
def test_a_sampler_that_is_not_the_policy_stops_the_run(run, wrong):
    def wrap(step, scored, policy):
        if wrong == "weights":
            with torch.no_grad():
                policy.lm_head.weight.add_(0.1 * torch.randn_like(policy.lm_head.weight))
            return scored
        scaled = [replace(one, logprobs=tuple(value / 0.9 for value in one.logprobs)) for one in scored.rollouts]
        return replace(scored, rollouts=scaled)

    with pytest.raises(DriftError, match=r"step 0: sampler and trainer differ by .* the bound is 1.00e-05"):
        run(steps=2, wrap=wrap)


def test_a_resumed_run_goes_on_at_the_next_step_and_ends_with_the_same_weights(run, tmp_path):
    """Without an interruption: 4 steps. Resumed after 2, with the captions of the first run: the same 4, to the last bit."""
    recorded = {}

    def record(step, scored, policy):
        return recorded.setdefault(step, scored)

    whole, _ = run(steps=4, wrap=record, advantage="running_mean", folder="whole")
    run(steps=2, wrap=lambda step, scored, policy: recorded[step], advantage="running_mean", folder="cut")
    seen = []

    def replay(step, scored, policy):
        seen.append(step)
        # The same bags are due at this step.
        assert [one.image_id for one in scored.rollouts] == [one.image_id for one in recorded[step].rollouts]
        return recorded[step]

    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed, _ = run(steps=4, wrap=replay, advantage="running_mean", folder="cut", resume_from=str(checkpoint))
    assert seen == [2, 3]
    assert resumed.state.global_step == 4
    assert equal(weights(resumed), weights(whole))
    assert (tmp_path / "cut" / "checkpoint-4" / "model.safetensors").is_file()


def test_the_reward_that_is_logged_is_the_weighted_sum_of_its_components(run):
    trainer, scored = run(steps=1)
    components = scored[0].components
    total = 1.0 * components["self_retrieval"] + 0.5 * components["cider"]
    assert history(trainer, "reward")[0] == pytest.approx(total.mean(), abs=1e-5)
    assert history(trainer, "rewards/self_retrieval/mean")[0] == pytest.approx(
        components["self_retrieval"].mean(), abs=1e-5
    )
    assert history(trainer, "captions") == [16]
    assert history(trainer, "bag_size") == [2]


def test_the_kl_term_is_zero_at_the_start_and_grows(run):
    trainer, _ = run(steps=3, kl_weight=0.1)
    first, *_, last = history(trainer, "kl")
    assert first == pytest.approx(0, abs=1e-6)
    assert last > 1e-4


def test_the_greedy_baseline_is_the_reward_of_the_greedy_caption(run):
    trainer, scored = run(steps=1, advantage="greedy")
    step = scored[0]
    weights = {"self_retrieval": 1.0, "cider": 0.5}
    assert {name: len(values) for name, values in step.greedy.items()} == {"self_retrieval": 8, "cider": 8}
    expected = total_reward(step.components, weights).reshape(8, 2) - total_reward(step.greedy, weights)[:, None]
    advantages = torch.cat([chunk["advantages"] for chunk in trainer._chunks])
    # The micro-batches are in order of length, then image, then tokens.
    in_order = sorted(range(16), key=lambda row: (len(tokens := step.rollouts[row].token_ids), row // 2, tokens))
    np.testing.assert_allclose(advantages.numpy(), expected.flatten()[in_order], rtol=0, atol=1e-5)
    # only the sampled captions are learnt from
    assert history(trainer, "captions") == [16] and len(step.rollouts) == 16


def test_one_caption_per_image(run):
    """What NDLB does; TRL's own trainer wants two."""
    trainer, scored = run(steps=2, captions_per_image=1, advantage="running_mean")
    rewards = [total_reward(one.components, {"self_retrieval": 1.0, "cider": 0.5}) for one in scored.values()]
    assert [len(own) for own in rewards] == history(trainer, "captions") == [8, 8]
    advantages = torch.cat([chunk["advantages"] for chunk in trainer._chunks])
    expected = rewards[1] - rewards[0].mean()  # of the second step, in order of their length
    in_order = np.argsort([len(rollout.token_ids) for rollout in scored[1].rollouts], kind="stable")
    np.testing.assert_allclose(advantages.numpy(), expected[in_order], rtol=0, atol=1e-5)
    assert max(history(trainer, "drift/max")) <= LARGEST


def test_with_a_learning_rate_of_0_the_drift_stays_flat(run, captioner_folder):
    """50 syncs of the same weights: nothing adds up between trainer and samplers."""
    stages = (Stage(bag_size=2, epochs=10),)
    trainer, _ = run(steps=50, learning_rate=0.0, curriculum=stages, save_every=100)
    drift = history(trainer, "drift/mean")
    assert len(drift) == 50
    assert 0 < np.mean(drift[25:]) <= 1.2 * np.mean(drift[:25])
    assert max(history(trainer, "drift/max")) <= LARGEST
    assert equal(weights(trainer), load_captioner(captioner_folder)[0].state_dict())


def test_with_lora_the_samplers_caption_with_the_merged_weights(run, captioner_folder):
    """Drift of rounding at every step, while the adapters move; what they lie on doesn't."""
    trainable = TrainableSettings(mapper="frozen", decoder="lora", lora_rank=4)
    trainer, _ = run(steps=4, trainable=trainable, kl_weight=0.1)
    drift = history(trainer, "drift/max")
    assert len(drift) == 4
    assert max(drift) <= LARGEST
    assert max(history(trainer, "drift/caption_max")) <= MAX_TOKENS * LARGEST
    start, merged = load_captioner(captioner_folder)[0].state_dict(), merged_weights(trainer.model)
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert changed == {
        f"model.language_model.h.{n}.attn.{name}.weight" for n in (0, 1) for name in ("c_attn", "c_proj")
    }
    assert history(trainer, "kl")[-1] > 1e-6


class StaleSamplers:
    """Samplers that go on with the weights of the first step, and say that they are the newest."""

    def __init__(self, samplers, first_version):
        self.samplers, self.first_version, self.taken = samplers, first_version, None

    def send(self, version, weights):
        self.taken = self.taken or self.samplers.send(self.first_version, weights)
        return self.taken

    def fingerprints(self, version):
        return self.samplers.fingerprints(self.first_version)

    def sample(self, version, *arguments):
        return self.samplers.sample(self.first_version, *arguments)


def test_a_stale_sampler_is_named_by_the_fingerprint_of_its_weights(run):
    with pytest.raises(StaleWeightsError, match=r"weights \d+ sampler 0 is with another lm_head.weight, model.*more"):
        run(steps=3, samplers_of_run=StaleSamplers)


def test_a_parameter_that_is_not_sent_is_named(samplers, versions, captioner):
    weights = captioner[0].state_dict()
    publish(samplers.board, next(versions), weights, timeout_s=60)
    del weights["model.mapper.out.bias"]
    version = next(versions)
    publish(samplers.board, version, weights, timeout_s=60)
    with pytest.raises(StaleWeightsError, match=f"weights {version} came without model.mapper.out.bias"):
        samplers.sync(version)


def test_a_parameter_of_the_step_before_is_named(samplers, versions, captioner):
    model, _ = captioner
    own = fingerprints(model.state_dict())
    with torch.no_grad():
        model.model.mapper.out.bias.add_(0.1)
    version = next(versions)
    samplers.send(version, model.state_dict())()
    held = samplers.fingerprints(version)()
    check_weights(fingerprints(model.state_dict()), held, version)
    with pytest.raises(StaleWeightsError, match=r"sampler 0 is with another model.mapper.out.bias \("):
        check_weights(own, held, version)


def test_the_logged_reward_is_the_one_that_trains(train_alone):
    """Half of the captions have no references: TRL's sum would take their CIDEr as 0."""

    def wrap(step, scored):
        cider = np.linspace(0.1, 0.4, len(scored.rollouts), dtype=np.float32)
        cider[: len(cider) // 2] = np.nan
        scored.components["cider"] = cider
        return scored

    trainer, scored = train_alone(reward=RewardSettings(cider=3.0, ended=0, repetition=0), wrap=wrap)
    total = torch.from_numpy(total_reward(scored[0].components, {"self_retrieval": 1.0, "cider": 3.0}))
    assert history(trainer, "reward") == pytest.approx([total.mean().item()])
    assert history(trainer, "reward_std") == pytest.approx([total.std().item()])
