"""Steps of RL on image-text models, with captions of a real sampler: what is meant to train does, and nothing else.

The trainer's own guards run with it: the sampler's weights by their fingerprints, image tokens, and the drift at every step.
"""

import numpy as np
import pytest
import torch

from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.config import RewardSettings, RlSettings, TrainableSettings
from finecap_ray.errors import MismatchError
from finecap_ray.records import Bag
from finecap_ray.rewards.combine import NAMES
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.training.advantages import leave_one_out
from finecap_ray.training.guards import check_weights
from finecap_ray.training.parts import merged_weights
from finecap_ray.training.trainer import BagTrainer, ScoredRollouts, grpo_arguments

MAX_TOKENS, STEPS = 6, 2
DRIFT = 1e-5  # nats per token, on average; float32
DECODER_LORA = ("self_attn.q_proj", "self_attn.v_proj")
VISION_LORA = {
    "qwen2_5_vl": ("attn.qkv", "attn.proj"),
    "qwen3_vl": ("attn.qkv", "attn.proj"),
    "idefics3": ("self_attn.q_proj", "self_attn.out_proj"),
}


@pytest.fixture
def train(vlm, versions, tmp_path):
    """A function that trains for some steps and returns the trainer."""

    def go(images=vlm.images, resume_from=None, **changes):
        rl = RlSettings(
            images_per_step=4,
            captions_per_image=3,
            micro_batch=6,
            reward=RewardSettings(**dict.fromkeys(NAMES, 0) | {"self_retrieval": 1}),
            average_decay=0,
            **{"learning_rate": 1e-3, "drift_bound": DRIFT, "save_every": 1} | changes,
        )
        model, processor = load_captioner(vlm.folder)
        family = family_of(model.config, processor)
        spec = SamplingSpec(rl.captions_per_image, MAX_TOKENS, rl.temperature)
        first_version = next(versions)

        def rollout(step, bags, policy):
            weights, version = merged_weights(policy), first_version + step
            vlm.samplers.send(version, weights)()
            check_weights(fingerprints(weights), vlm.samplers.fingerprints(version)(), version)
            own = [image for bag in bags for image in bag.images]
            names = [image.image_id for image in own]
            rollouts = vlm.samplers.sample(version, names, family.images_of(images), spec, range(len(own)))
            # Any function of a caption will do.
            rewards = np.array([sum(one.token_ids) % 7 / 7 for one in rollouts], dtype=np.float32)
            return ScoredRollouts(rollouts, {"self_retrieval": rewards}, {})

        bags = [Bag("a", 0.9, tuple(vlm.images[:2])), Bag("b", 0.9, tuple(vlm.images[2:]))]
        trainer = BagTrainer(
            model.train(),
            processor,
            grpo_arguments(rl, str(tmp_path / "run"), STEPS, MAX_TOKENS, use_gpu=False, seed=0),
            rl,
            bags=lambda step: iter([bags] * (STEPS - step)),
            rollout=rollout,
            estimator=leave_one_out,
            callbacks=[],
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    return go


@pytest.mark.parametrize(
    "trained",
    [
        {"vision": "lora", "mapper": "frozen", "decoder": "frozen"},
        {"vision": "full", "mapper": "frozen", "decoder": "frozen"},
        {"vision": "frozen", "mapper": "frozen", "decoder": "lora"},
        {"vision": "lora", "mapper": "full", "decoder": "lora"},
        {"vision": "full", "mapper": "full", "decoder": "full"},
    ],
    ids=lambda trained: "-".join(trained.values()),
)
def test_exactly_the_parts_meant_to_train_change(vlm, train, trained):
    targets = {"decoder": DECODER_LORA, "vision": VISION_LORA[vlm.kind]}
    trainer = train(
        trainable=TrainableSettings(
            **trained, lora_rank=2, lora_targets=targets["decoder"], vision_lora_targets=targets["vision"]
        )
    )
    start, _ = load_captioner(vlm.folder)
    before, after = start.state_dict(), merged_weights(trainer.model)
    assert after.keys() == before.keys()
    parameters = dict(start.named_parameters(remove_duplicate=False))
    part_of = family_of(start.config, trainer.processing_class).part_of
    meant = {
        name
        for name in parameters
        if (how := trained[part_of(name)]) == "full"
        or (how == "lora" and name.removesuffix(".weight").endswith(targets[part_of(name)]))
    }
    assert meant
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == meant
    drift = [row["drift/mean"] for row in trainer.state.log_history if "drift/mean" in row]
    assert len(drift) == STEPS and max(drift) <= DRIFT


def test_a_kl_term_is_zero_at_the_start_and_grows(vlm, train):
    trainer = train(kl_weight=0.1)
    first, last = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert first == pytest.approx(0, abs=1e-6)
    assert last > 1e-6


def test_an_image_swapped_before_the_sampler_stops_the_run(vlm, train):
    """Pictures of other sizes have other prompts."""
    with pytest.raises(MismatchError, match="image 'picture 0' came with a prompt of"):
        train(images=vlm.images[::-1])


def test_a_resumed_run_goes_on_from_the_weights_of_its_checkpoint(vlm, train, tmp_path):
    """A learning rate of 0 leaves them as they are, whatever names they are saved under."""
    whole = train()
    folder = tmp_path / "run" / f"checkpoint-{STEPS - 1}"
    saved, _ = load_captioner(folder)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    resumed = train(resume_from=str(folder), learning_rate=0.0)
    after, expected = merged_weights(resumed.model), saved.state_dict()
    assert resumed.state.global_step == STEPS
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in merged_weights(whole.model).items())
