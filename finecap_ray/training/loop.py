"""The RL loop: bags -> captions (samplers) -> rewards (scorers) -> update (TRL, on Ray Train workers) -> weights -> samplers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from transformers import TrainerCallback

from finecap_ray.bags.bag_set import check_bags_scorer, read_manifest
from finecap_ray.bags.history import plan_from
from finecap_ray.bags.plan import RunPlan
from finecap_ray.bags.stream import read_bank, stream_bags
from finecap_ray.captioners.family import Family
from finecap_ray.config import Settings
from finecap_ray.records import Bag, BagImage, Rollout
from finecap_ray.rewards.actor import RewardPool
from finecap_ray.rewards.combine import images_with_signal
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.sampling.seeds import caption_seed
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.sampling.weights import as_engine_holds
from finecap_ray.training import advantages
from finecap_ray.training.averaging import mix_into
from finecap_ray.training.checkpoints import last_checkpoint, steps_of
from finecap_ray.training.guards import check_rewards, check_weights
from finecap_ray.training.parts import merged_weights
from finecap_ray.training.ray_train import run_workers
from finecap_ray.training.workers import SharedRollouts


@dataclass(frozen=True, slots=True)
class RlJob:
    """What an RL worker needs; it crosses the process boundary as one record."""

    settings: Settings
    captioner: str  # folder of the start
    bags: str  # folder of the bag set of the training split
    run_dir: str
    steps: RunPlan
    resume_from: str | None
    samplers: SamplerPool
    rewards: RewardPool
    callbacks: tuple[TrainerCallback, ...] = ()


def train_rl(
    settings: Settings,
    captioner: str,
    bags: str,
    scorer: str,
    references: list[list[str]],
    run_dir: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Runs (or goes on with) RL and writes the captioner into `<run_dir>/captioner`.

    `callbacks` are transformers' and see every step of every worker; they have to pickle.
    A checkpoint in `<run_dir>/checkpoints` is gone on from. Raises MismatchError when scorer, bags and captioner don't fit.
    """
    manifest = read_manifest(bags)
    checkpoint = last_checkpoint(Path(run_dir) / "checkpoints")
    done = steps_of(checkpoint) // settings.rl.updates_per_step
    steps = plan_from(run_dir, manifest, settings.rl, settings.seed, done)
    samplers = SamplerPool(captioner, settings.resources, logs=f"{run_dir}/logs")
    bank = read_bank(bags) if settings.rl.reward.hard_negatives else None
    rewards = RewardPool(scorer, settings.rl.reward, references, settings.resources, bank)
    try:
        # The workers start while samplers and reward actors do, and wait for them before the first step.
        job = RlJob(settings, captioner, bags, run_dir, steps, checkpoint, samplers, rewards, tuple(callbacks))
        run_workers(_worker, {"job": job}, settings.rl.num_workers, settings.resources, f"{run_dir}/logs")
    finally:
        samplers.close()
        rewards.close()


def _worker(config: dict[str, Any]) -> None:
    from finecap_ray.captioners import family_of, load_captioner
    from finecap_ray.captioners.loader import check_features
    from finecap_ray.training.cpu import TrimHeap, suit_cpu
    from finecap_ray.training.logs import MetricsFile, redirect_output
    from finecap_ray.training.trainer import BagTrainer, grpo_arguments

    job: RlJob = config["job"]
    settings, run_dir = job.settings, Path(job.run_dir)
    rank = ray.train.get_context().get_world_rank()
    redirect_output(run_dir / "logs" / f"rl-{rank}.log")
    torch.set_num_threads(settings.resources.threads)
    model, processor = load_captioner(job.captioner)
    if not settings.resources.use_gpu:
        suit_cpu(model)
    model.train()
    manifest = read_manifest(job.bags)
    family = family_of(model.config, processor)
    if family.reads == "features":
        check_features(model, manifest["tower"]["digest"], model.config.feature_dim)
    arguments = grpo_arguments(
        settings.rl,
        str(run_dir / "checkpoints"),
        job.steps.total_steps,
        settings.captioner.max_tokens,
        settings.resources.use_gpu,
        settings.seed,
    )
    own = Rollouts(job, family)
    rollouts = SharedRollouts(own, settings.resources.step_timeout_s) if settings.rl.num_workers > 1 else own
    with_images = family.reads == "image"
    trainer = BagTrainer(
        model,
        processor,
        arguments,
        settings.rl,
        bags=lambda step: stream_bags(
            job.bags, job.steps.from_step(step), rank, settings.resources.step_timeout_s, with_images
        ),
        rollout=rollouts,
        estimator=estimator(settings.rl.advantage),
        callbacks=[
            SendWeights(own, settings.rl.updates_per_step),
            MetricsFile(run_dir / "metrics.jsonl", run_dir / "tensorboard", settings.rl.updates_per_step),
            *([] if settings.resources.use_gpu else [TrimHeap(every=1)]),
            *job.callbacks,
        ],
    )
    check_bags_scorer(manifest, job.rewards.digest())
    own.engine_dtype = getattr(torch, job.samplers.wait_until_ready())
    trainer.train(resume_from_checkpoint=job.resume_from)
    if trainer.is_world_process_zero():
        weights = merged_weights(model)
        if settings.rl.start_share:
            model, _ = load_captioner(job.captioner)
            mix_into(model, weights, 1 - settings.rl.start_share)
            weights = model.state_dict()
        model.generation_config.max_new_tokens = settings.captioner.max_tokens
        model.eval().save_pretrained(run_dir / "captioner", state_dict=weights)
        processor.save_pretrained(run_dir / "captioner")


@dataclass(frozen=True, slots=True)
class SentWeights:
    version: int
    fingerprints: dict[str, str]
    taken: Callable[[], None]  # waits for the samplers


class Rollouts:
    """Captions and rewards of one step: publish the weights, sample, score. Of several workers the first calls it, for all."""

    def __init__(self, job: RlJob, family: Family) -> None:
        rl = job.settings.rl
        self.job, self.family = job, family
        self.engine_dtype = torch.float32  # what the samplers say once they are there
        self.spec = SamplingSpec(rl.captions_per_image, job.settings.captioner.max_tokens, rl.temperature)
        self.greedy = replace(self.spec, captions_per_image=1, temperature=0.0) if rl.advantage == "greedy" else None
        self._sent: SentWeights | None = None
        self._sync_s = 0.0  # that the newest weights have kept the trainer

    def send(self, step: int, model: torch.nn.Module) -> None:
        """Publishes the weights of a step and lets the samplers take them, without waiting for that."""
        started = time.perf_counter()
        beside = self.family.beside_engine(model)
        weights = as_engine_holds(merged_weights(model), self.engine_dtype, beside and beside[0])
        taken = self.job.samplers.send(step, weights)
        self._sent = SentWeights(step, fingerprints(weights), taken)
        self._sync_s = time.perf_counter() - started

    def wait(self) -> None:
        """Until the samplers hold what was sent."""
        if self._sent is not None:
            started = time.perf_counter()
            self._sent.taken()
            self._sync_s += time.perf_counter() - started

    def __call__(self, step: int, bags: list[Bag], model: torch.nn.Module):
        from finecap_ray.training.trainer import ScoredRollouts

        images = [image for bag in bags for image in bag.images]
        if self._sent is None or self._sent.version != step:
            self.send(step, model)
        self.wait()
        synced = time.perf_counter()
        rollouts = self._sample(step, images, self.spec)
        greedy = self._sample(step, images, self.greedy) if self.greedy else []
        held = self.job.samplers.fingerprints(step)  # while the scorer reads the captions
        sampled = time.perf_counter()
        reply = self.job.rewards.score(_reward_request(bags, rollouts))
        of_greedy = self.job.rewards.score(_reward_request(bags, greedy)).components if self.greedy else None
        check_weights(self._sent.fingerprints, held(), step)
        has_references = np.array([bool(image.captions) for image in images])
        has_signal = images_with_signal(self.job.settings.rl.reward, has_references)
        seen = reply.metrics | check_rewards(reply.components, [image.image_id for image in images], has_signal)
        metrics = seen | {
            "seconds/sync": self._sync_s,
            "seconds/sampling": sampled - synced,
            "seconds/scoring": time.perf_counter() - sampled,
            "captions": len(rollouts),
            "bag_size": len(images) / len(bags),
            "ended": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
        }
        return ScoredRollouts(rollouts, reply.components, metrics, of_greedy)

    def _sample(self, step: int, images: list[BagImage], spec: SamplingSpec) -> list[Rollout]:
        return self.job.samplers.sample(
            step,
            [image.image_id for image in images],
            self.family.images_of(images),
            spec,
            [caption_seed(self.job.settings.seed, step, image.image_id) for image in images],
        )


class SendWeights(TrainerCallback):
    """Sends the weights as soon as a step has updated them: the samplers take them while the trainer logs and saves."""

    def __init__(self, rollouts: Rollouts, updates_per_step: int) -> None:
        self.rollouts, self.updates = rollouts, updates_per_step

    def on_step_end(self, args, state, control, model=None, **unused: Any) -> None:
        step, rest = divmod(state.global_step, self.updates)
        if rest == 0 and state.global_step < state.max_steps and state.is_world_process_zero:
            self.rollouts.send(step, model)

    def on_step_begin(self, args, state, control, **unused: Any) -> None:
        self.rollouts.wait()  # a step doesn't begin while work of the one before goes on


def _reward_request(bags: list[Bag], rollouts: list[Rollout]) -> RewardRequest:
    """Of the captions of all images of some bags, as many of each; those of an image side by side."""
    images = [image for bag in bags for image in bag.images]
    return RewardRequest(
        texts=[rollout.text for rollout in rollouts],
        ended=np.array([rollout.finish_reason == "stop" for rollout in rollouts]),
        target=np.arange(len(images)).repeat(len(rollouts) // len(images)),
        image_ids=[image.image_id for image in images],
        embeddings=np.stack([image.embedding for image in images]),
        bag_of_image=np.arange(len(bags)).repeat([len(bag.images) for bag in bags]),
        references=[image.captions for image in images],
    )


def estimator(name: str):
    """The advantage of that name; `greedy` takes the rewards of greedy captions beside the others."""
    return advantages.RunningMean() if name == "running_mean" else getattr(advantages, name)
