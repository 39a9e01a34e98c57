"""A step shared by workers: real Ray Train workers over gloo, with real samplers and a real scorer."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from transformers import TrainerCallback

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.stream import plan_run, stream_bags
from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.config import CaptionerSettings, RewardSettings, RlSettings, Settings, Stage
from finecap_ray.errors import DeadlineError, LostWorkerError, RewardError
from finecap_ray.records import Bag
from finecap_ray.rewards.actor import RewardPool
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.training.loop import RlJob, Rollouts, SendWeights, estimator
from finecap_ray.training.ray_train import run_workers
from finecap_ray.training.trainer import BagTrainer, ScoredRollouts, grpo_arguments
from finecap_ray.training.workers import SharedRollouts, divide, gather_rows

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test

MAX_TOKENS = 8
STEPS = 5


def test_rows_of_workers_with_uneven_shares_are_gathered_in_order():
    theirs = torch.tensor([True, False, True])

    def gather(tensor):
        """What accelerate's does, with another worker of 3 rows: it takes as many from each."""
        other = torch.tensor([3]) if tensor.dtype == torch.int64 else theirs
        assert tensor.shape == other.shape and tensor.dtype == other.dtype
        return torch.cat([tensor, other])

    assert gather_rows(gather, torch.tensor([False])).tolist() == [False, True, False, True]


def test_a_worker_takes_its_captions_and_the_rewards_of_all():
    bags = [Bag("a", 0.5, ("x", "y")), Bag("b", 0.5, ("z", "u", "v")), Bag("c", 0.5, ("w",))]
    rewards = {"self_retrieval": "of all"}
    first, second = divide(ScoredRollouts(list(range(12)), rewards, {}), [bags[:2], bags[2:]])
    assert (first.rollouts, first.first) == (list(range(10)), 0)
    assert (second.rollouts, second.first) == ([10, 11], 10)
    assert first.components == second.components == rewards


@dataclass(frozen=True)
class Renumbered:
    """Samplers that other tests use as well, with weights numbered from `first` on."""

    samplers: SamplerPool
    first: int

    def send(self, version, weights):
        return self.samplers.send(self.first + version, weights)

    def fingerprints(self, version):
        return self.samplers.fingerprints(self.first + version)

    def sample(self, version, *arguments):
        return self.samplers.sample(self.first + version, *arguments)


class Gradients(TrainerCallback):
    """Of every step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: weight.grad.clone() for name, weight in model.named_parameters()})


def train_with_sgd(config):
    """What `loop._worker` does, with SGD; leaves what it saw in a file of this worker."""
    job, seen = config["job"], Gradients()
    settings, rl = job.settings, job.settings.rl
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    model, processor = load_captioner(job.captioner)
    arguments = grpo_arguments(rl, f"{job.run_dir}/checkpoints", STEPS, MAX_TOKENS, use_gpu=False, seed=0)
    arguments.optim = "sgd"
    rollouts = Rollouts(job, family_of(model.config, processor))
    trainer = BagTrainer(
        model.train(),
        processor,
        arguments,
        rl,
        bags=lambda step: stream_bags(job.bags, job.steps.from_step(step), rank, 60),
        rollout=SharedRollouts(rollouts, settings.resources.step_timeout_s) if rl.num_workers > 1 else rollouts,
        estimator=estimator(rl.advantage),
        callbacks=[SendWeights(rollouts, rl.updates_per_step), seen],
    )
    trainer.train()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.save((seen.steps, weights, trainer.state.log_history), f"{job.run_dir}/worker-{rank}.pt")


def distance(first, second):
    """Relative, of all tensors together."""
    apart = sum((first[name] - second[name]).square().sum() for name in first).sqrt()
    return (apart / sum(tensor.square().sum() for tensor in first.values()).sqrt()).item()


@pytest.mark.timeout(600)
def test_two_workers_learn_what_one_does(
    samplers, versions, bag_folder, captioner_folder, scorer_folder, emoji, resources, tmp_path
):
    """5 bags of 2 a step, 3 and 2 for two workers, in 2 micro-batches each (one worker: 4). All images of the step compete,
    and the baseline is one over all of them: each of the two sees the other's images and rewards."""
    reward = RewardSettings(scope="batch", cider=0.5, cider_frequencies="batch", ended=0, repetition=0)
    pool = RewardPool(str(scorer_folder), reward, emoji.captions, resources)
    seen = {}
    for workers in (1, 2):
        rl = RlSettings(
            images_per_step=10,
            captions_per_image=2,
            micro_batch=5,
            curriculum=(Stage(bag_size=2, epochs=1),),
            max_steps=STEPS,
            advantage="running_mean",
            reward=reward,
            loss_type="grpo",
            kl_weight=0.1,
            learning_rate=0.01,  # small steps: large ones make another policy of what rounding left
            max_grad_norm=1e9,
            average_decay=0,
            drift_bound=1e-5,
            save_every=100,
            num_workers=workers,
        )
        settings = Settings(rl=rl, captioner=CaptionerSettings(max_tokens=MAX_TOKENS), resources=resources)
        plan = plan_run(read_manifest(bag_folder), rl, seed=0)
        folder = tmp_path / str(workers)
        folder.mkdir()
        own = Renumbered(samplers, next(versions))
        job = RlJob(settings, str(captioner_folder), str(bag_folder), str(folder), plan, None, own, pool)
        run_workers(train_with_sgd, {"job": job}, workers, resources, str(folder / "logs"))
        seen[workers] = [torch.load(folder / f"worker-{rank}.pt") for rank in range(workers)]
    pool.close()
    (alone,), (first, second) = seen[1], seen[2]
    start = dict(load_captioner(captioner_folder)[0].named_parameters())

    for gradients, weights, _ in (first, second):
        assert len(gradients) == STEPS
        assert distance(alone[0][0], gradients[0]) <= 1e-5  # of the same weights
        assert distance(alone[1], weights) <= 1e-6
    assert distance(alone[1], start) > 1e-4  # they did move
    assert all(torch.equal(first[1][name], second[1][name]) for name in start)  # and together
    rows = [[row for row in log if "reward" in row] for _, _, log in (alone, first)]
    for one, two in zip(*rows, strict=True):
        for name in ("captions", "bag_size", "completions/max_length", "completions/clipped_ratio"):
            assert one[name] == two[name]
        for name in ("reward", "rewards/cider/std", "rank", "grad_norm", "completions/mean_length"):
            assert one[name] == pytest.approx(two[name], rel=1e-3)
        # TRL's mean over micro-batches, whose tokens weigh the more the fewer they are.
        assert one["kl"] == pytest.approx(two["kl"], rel=0.1, abs=1e-6)
        assert two["captions"] == 20 and 0 < two["drift/mean"] <= two["drift/max"] < 1e-4


def share_a_step(config):
    """One step of rollouts that worker 0 makes, or fails to."""
    rank = ray.train.get_context().get_world_rank()

    def rollouts(step, bags, model):
        raise RewardError("no captions today")

    shared = SharedRollouts(rollouts, timeout_s=1)
    if rank == 1:
        time.sleep(config["late_s"])
    shared(7, [Bag(str(rank), 0.5, ("x", "y"))], None)


@pytest.mark.parametrize(
    ("late_s", "error", "message"),
    [
        (60, DeadlineError, r"step 7: worker 0 of 2 waited up to 6 s for the bags of every other worker"),
        (0, RewardError, "^no captions today$"),
    ],
)
def test_a_worker_that_is_late_is_named_and_what_the_first_meets_is_raised_as_itself(
    ray_session, resources, tmp_path, late_s, error, message
):
    with pytest.raises(error, match=message):
        run_workers(share_a_step, {"late_s": late_s}, 2, resources, str(Path(tmp_path) / "logs"))


def die(config):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told_of_and_what_to_do(ray_session, resources, tmp_path):
    with pytest.raises(LostWorkerError, match=r"a training worker is gone.*--resume goes on from the last checkpoint"):
        run_workers(die, {}, 1, resources, str(tmp_path / "logs"))


@ray.remote(num_cpus=0)
class Broken:
    def __init__(self):
        raise ValueError("no memory for the cache")

    def ready(self):
        return True


def ask_a_broken_actor(config):
    ray.get(Broken.remote().ready.remote())


def test_an_actor_that_a_worker_misses_is_the_error_and_no_lost_worker(ray_session, resources, tmp_path):
    with pytest.raises(ray.train.TrainingFailedError, match="no memory for the cache"):
        run_workers(ask_a_broken_actor, {}, 1, resources, str(tmp_path / "logs"))


def test_workers_that_find_no_room_are_told_of_in_time(ray_session, resources, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")  # restored afterwards
    few = resources.model_copy(update={"start_timeout_s": 2})
    with pytest.raises(
        DeadlineError, match=r"no room for 99 training workers of 1 CPU within resources.start_timeout_s=2 s"
    ):
        run_workers(print, {}, 99, few, str(tmp_path / "logs"))
