"""A run that is killed at every one of its steps, and goes on from what is on disk, is the run that nobody killed."""

import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.build import BagSource, build_bags
from finecap_ray.bags.history import plan_from
from finecap_ray.bags.stream import stream_bags
from finecap_ray.config import BagSettings, RlSettings, Stage, TrainableSettings
from finecap_ray.training.advantages import RunningMean
from finecap_ray.training.checkpoints import last_checkpoint, steps_of
from finecap_ray.training.parts import merged_weights

IMAGES, FEATURES = 16, 16
RL = RlSettings(
    images_per_step=4,
    captions_per_image=3,
    curriculum=(Stage(bag_size=2, epochs=2), Stage(bag_size=3, epochs=1)),
    max_steps=12,
)
EPOCH_ENDS = 4, 8  # 8 bags of 2, 2 a step; the second is the end of a stage too
MOMENTS = "captions", "on_pre_optimizer_step", "on_step_end"  # before, in the midst of and after a step, but not saved


class KilledError(Exception):
    pass


class Killer(TrainerCallback):
    """Ends the training at a moment of a step, counted from 0."""

    def __init__(self, step, moment):
        self.step, self.moment = step, moment

    def kill(self, step, moment):
        if (step, moment) == (self.step, self.moment):
            raise KilledError

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kill(state.global_step, "on_pre_optimizer_step")

    def on_step_end(self, args, state, control, **kwargs):
        self.kill(state.global_step - 1, "on_step_end")


@pytest.fixture(scope="module")
def small_bags(tmp_path_factory):
    rows = np.random.default_rng(0).standard_normal((IMAGES, FEATURES)).astype(np.float32)
    names = [f"image {row}" for row in range(IMAGES)]
    source = BagSource(
        image_ids=names,
        images=[b"not an image"] * IMAGES,
        captions=[[name] for name in names],
        embeddings=rows / np.linalg.norm(rows, axis=1, keepdims=True),
        features=rows.astype(np.float16),
        name="train",
        left_out={},
        scorer={"name": "none", "digest": "none"},
        tower={"digest": ""},
    )
    folder = tmp_path_factory.mktemp("small_bags")
    build_bags(source, folder, (2, 3), BagSettings(rows_per_group=2), seed=0)
    return folder


@pytest.mark.parametrize(
    ("save_every", "trainable"),
    [
        pytest.param(1, TrainableSettings(), id="saved at every step"),
        pytest.param(2, TrainableSettings(decoder="lora", lora_rank=2), id="a step lost at every other kill"),
    ],
)
def test_killed_at_every_step_it_ends_with_the_same_bits(
    ray_session, train_alone, small_bags, tmp_path, save_every, trainable
):
    manifest = read_manifest(small_bags)
    seen = {}  # bags of each step

    def train(run_dir, killer):
        checkpoint = last_checkpoint(run_dir / "checkpoints")
        plan = plan_from(run_dir, manifest, RL, 0, steps_of(checkpoint))
        assert [step.epoch for step in plan][: EPOCH_ENDS[1] + 1].count(0) == EPOCH_ENDS[0]
        assert [plan[end].step for end in EPOCH_ENDS] == list(EPOCH_ENDS) and plan[EPOCH_ENDS[1]].bag_size == 3

        def wrap(step, scored):
            killer.kill(step, "captions")
            images = [one.image_id for one in scored.rollouts]
            assert seen.setdefault(step, images) == images
            return scored

        baseline = RunningMean()
        trainer, _ = train_alone(
            steps=plan.total_steps,
            resume_from=checkpoint,
            bags=lambda step: stream_bags(small_bags, plan.from_step(step), rank=0, timeout_s=60),
            out=run_dir / "checkpoints",
            wrap=wrap,
            estimator=baseline,
            callbacks=[killer],
            **RL.model_dump(exclude={"learning_rate", "reward", "trainable", "save_every", "drift_bound"})
            | {
                "learning_rate": 1e-2,
                "warmup_steps": 3,
                "trainable": trainable,
                "save_every": save_every,
                "average_decay": 0.5,
            },
        )
        return merged_weights(trainer.model), baseline.state_dict(), trainer.state.global_step

    whole = train(tmp_path / "whole", Killer(None, None))
    assert whole[2] == len(seen) == 12
    broken = tmp_path / "broken"
    for step in range(12):
        with pytest.raises(KilledError):
            train(broken, Killer(step, MOMENTS[step % 3]))
        forget(step)
        leave_a_checkpoint_half_written(broken, step + 1)
    resumed = train(broken, Killer(None, None))
    assert resumed[1:] == whole[1:]
    assert resumed[0].keys() == whole[0].keys()
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in resumed[0].items())


def test_a_resumed_run_saves_as_often_as_its_settings_say_now(train_alone, tmp_path):
    train_alone(steps=2, save_every=2)
    train_alone(steps=4, save_every=1, resume_from=last_checkpoint(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]


def forget(seed):
    """Another process would know nothing of the generators' states."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def leave_a_checkpoint_half_written(run_dir, step):
    """As of a process that died while it saved: the model is there, what tells the step isn't."""
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half of it")
