"""The policy-gradient update: TRL's GRPOTrainer, fed with whole bags. The only file that imports trl.

What is ours: where a step's rows come from (planned bags), where captions and rewards come from (a rollout function),
which advantages are used, the sampler's log-probs as behaviour policy, and the drift guard. The loss is TRL's.
"""

from __future__ import annotations

import finecap_ray.training.trl_without_vllm  # noqa: F401  (before trl)

# isort: split

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from finecap_ray.captioners import family_of
from finecap_ray.captioners.family import StepImages
from finecap_ray.config import RlSettings
from finecap_ray.errors import UnsupportedError
from finecap_ray.precision import autocasts
from finecap_ray.records import Bag, Rollout
from finecap_ray.rewards.combine import component_weights, total_reward
from finecap_ray.training import guards, parts
from finecap_ray.training.advantages import RunningMean
from finecap_ray.training.averaging import WeightAverage
from finecap_ray.training.micro_batches import split_captions
from finecap_ray.training.workers import gather_rows

SUPPORTED_TRL = ("1.16",)
ADVANTAGE_STATE_FILE = "advantage_state.json"
_ROW = {"prompt": ""}  # TRL's rows say nothing: a step's images come from its bags, prompts from the rollouts


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """Captions of a step with their rewards; image by image, captions of one image side by side.

    With several workers the captions are those of one of them, and C and N are those of all, in the order of the workers.
    """

    rollouts: list[Rollout]
    components: dict[str, np.ndarray]  # reward component -> [C], not weighted; NaN: no signal
    metrics: dict[str, float]
    greedy: dict[str, np.ndarray] | None = None  # component -> [N], of each image's greedy caption; None: not asked for
    first: int = 0  # place of the first of `rollouts` among the C captions


RolloutFunction = Callable[[int, list[Bag], torch.nn.Module], ScoredRollouts]  # (step, bags, model)
Estimator = Callable[..., Float[Tensor, "N G"]]  # (rewards [N, G]), and for `greedy` the greedy rewards [N]


class BagTrainer(GRPOTrainer):
    """GRPOTrainer whose steps are whole bags: a rollout, and `updates_per_step` optimizer steps on it.

    An optimizer step is `gradient_accumulation_steps` forward passes; transformers calls it a global step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        arguments: GRPOConfig,
        settings: RlSettings,
        bags: Callable[[int], Iterator[list[Bag]]],
        rollout: RolloutFunction,
        estimator: Estimator,
        callbacks: list,
    ) -> None:
        """`bags(step)` yields the bags of every step from `step` on, for this worker."""
        if not trl.__version__.startswith(SUPPORTED_TRL):
            raise UnsupportedError(
                f"trl {trl.__version__} is installed; this version of finecap-ray runs on {', '.join(SUPPORTED_TRL)}.x"
            )
        self._weights = component_weights(settings.reward)
        self._drift_bound = settings.drift_bound
        self._updates = settings.updates_per_step
        self._bags, self._rollout, self._estimator = bags, rollout, estimator
        self._step_bags: list[Bag] = []
        self._family = family_of(model.config, processor)
        self._images: StepImages | None = None  # of the step, an image in several bags once
        self._row_of_image: dict[str, int] = {}  # image id -> its place among them
        self._image_of_caption: Tensor | None = None  # [C] likewise
        self._micro_batch = settings.micro_batch
        self._first_step: int | None = None  # of this training: 0, or where it was resumed
        self._scored: ScoredRollouts | None = None
        self._captions = 0  # of the step, those of all workers
        self._started_update = 0.0
        self._chunks: list[dict[str, Any]] = []
        self._chunk: dict[str, Any] = {}
        self._average = WeightAverage(settings.average_decay) if settings.average_decay else None
        parts.set_trainable(model, settings.trainable, arguments.seed)
        super().__init__(
            model,
            reward_funcs=[_named(name) for name in self._weights],
            args=arguments,
            # TRL wants a dataset to look at; the rows of a step come from `get_train_dataloader`.
            train_dataset=Dataset.from_list([_ROW]),
            processing_class=processor,
            rollout_func=self._collect,
            callbacks=[*callbacks, SaveAsAsked(), *([self._average] if self._average else [])],
        )
        self.num_generations = settings.captions_per_image  # TRL's arguments refuse 1, its trainer doesn't
        if self.ref_model is not None:
            self._family.prepare(self.ref_model)
            parts.share_frozen(self.ref_model, model)
        if self.accelerator.num_processes > 1:  # whose shares of a step differ by a bag
            self.accelerator.gather = partial(gather_rows, self.accelerator.gather)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Every item is the whole step; it is handed out once per micro-batch, as GRPOTrainer expects."""
        repeats = self.args.gradient_accumulation_steps * self._updates
        return torch.utils.data.DataLoader(
            _Steps(self._bags, lambda: self._rollout_step, repeats), batch_size=None, collate_fn=_identity
        )

    @property
    def _rollout_step(self) -> int:
        """Steps of the run, as the plan and the samplers count them."""
        return self.state.global_step // self._updates

    def _prepare_inputs(self, step_bags: list[Bag]) -> dict[str, Any]:
        micro_batches = self.args.gradient_accumulation_steps
        if self._step % (micro_batches * self._updates) == 0:
            self._step_bags = step_bags
            self._read_images()
            batch = self._generate_and_score_completions([dict(_ROW) for _ in self._image_of_caption])
            self._chunks = split_captions(
                batch,
                self._image_of_caption,
                micro_batches,
                self.loss_type,
                self.accelerator.num_processes,
                self._captions,
                self._family.whole_images,
            )
        return self._chunks[self._step % micro_batches]

    def _read_images(self) -> None:
        """What the model reads of the step's images, each once however many bags it is in."""
        images = [image for bag in self._step_bags for image in bag.images]
        distinct = {image.image_id: image for image in images}
        self._row_of_image = {image_id: row for row, image_id in enumerate(distinct)}
        self._images = self._family.read(list(distinct.values()), self.accelerator.device)
        rows = torch.tensor([self._row_of_image[image.image_id] for image in images], device=self.accelerator.device)
        self._image_of_caption = rows.repeat_interleave(self.num_generations)

    def _collect(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's rollout function: the captions of this worker."""
        model = self.accelerator.unwrap_model(self.model)
        if self._first_step is None:
            self._first_step = self._rollout_step
        self._scored = self._rollout(self._rollout_step, self._step_bags, model)
        for name, value in self._scored.metrics.items():
            self._metrics["train"][name].append(value)
        rollouts = self._scored.rollouts
        images = [image.image_id for bag in self._step_bags for image in bag.images]
        prompts = [self._images.prompts[self._row_of_image[image_id]] for image_id in images]
        family = self._family
        guards.check_captions(
            rollouts, images, self.num_generations, prompts, family.image_token_id, family.banned_token_ids
        )
        return {
            "prompt_ids": [list(rollout.prompt_token_ids) for rollout in rollouts],
            "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
            "logprobs": [list(rollout.logprobs) for rollout in rollouts],
        }

    def _calculate_rewards(self, *_: Any) -> Float[Tensor, "C K"]:
        """The components of all workers' captions, NaN where there is no signal. TRL would call a function for each."""
        values = np.stack([self._scored.components[name] for name in self._weights], axis=1)
        return torch.from_numpy(values).to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rewards = torch.from_numpy(total_reward(self._scored.components, self._weights)).view(-1, self.num_generations)
        # TRL's sum takes a component without a signal as 0; here it is the mean of the others, as it trains.
        self._metrics["train"]["reward"][-1] = rewards.mean().item()
        self._metrics["train"]["reward_std"][-1] = rewards.std().item()
        greedy = self._scored.greedy
        baseline = ()
        if greedy is not None:
            baseline = (torch.from_numpy(total_reward(greedy, self._weights, silent=self._scored.components)),)
        advantages = self._estimator(rewards, *baseline).flatten()  # of all workers' captions
        own = slice(self._scored.first, self._scored.first + len(self._scored.rollouts))
        self._captions = len(advantages)
        output["advantages"] = advantages[own].to(self.accelerator.device)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]
        self._started_update = time.perf_counter()
        return output

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._chunk = inputs
        return super()._compute_loss(model, inputs) * inputs["share"]

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Of a micro-batch in training, each distinct caption once; of the whole step, for the KL term, all captions."""
        compute = partial(super()._get_per_token_logps_and_entropies, compute_entropy=compute_entropy)
        if not (torch.is_grad_enabled() and self.model.training):
            # A prompt's last token stands for it.
            ids, mask = (tensor[:, -logits_to_keep - 1 :] for tensor in (input_ids, attention_mask))
            parts_of_step = torch.arange(len(ids), device=ids.device).split(self._micro_batch)
            logps = [
                compute(self._reading(model, self._image_of_caption[rows]), ids[rows], mask[rows], logits_to_keep)[0]
                for rows in parts_of_step
            ]
            return torch.cat(logps), None, None
        distinct, rows = self._chunk["distinct"], self._chunk["row_of_caption"]
        inputs = self._images.of(self._chunk["images"])
        model = partial(model, **inputs, image_of_row=self._chunk["image_of_row"])
        logps, entropies, _ = compute(model, input_ids[distinct], attention_mask[distinct], logits_to_keep)
        logps, entropies = logps[rows], None if entropies is None else entropies[rows]
        if self.state.global_step % self._updates == 0:  # later updates move away from the sampler
            self._guard_drift(logps.detach())
        return logps, entropies, None

    def _reading(self, model: torch.nn.Module, image_of_row: Tensor) -> Callable[..., Any]:
        """The model with the images of some captions, each of them once."""
        images, image_of_row = torch.unique(image_of_row, return_inverse=True)
        return partial(model, **self._images.of(images), image_of_row=image_of_row)

    def _guard_drift(self, logps: Float[Tensor, "C T"]) -> None:
        """The sampler's log-probs against the trainer's, of the same tokens. Raises DriftError past the bound."""
        mask = self._chunk["completion_mask"].bool()
        drift = guards.Drift.of(logps, self._chunk["sampling_per_token_logps"], mask)
        step = self._rollout_step
        guards.check_drift(drift, self._drift_bound, step, step == self._first_step, self._likely_cause)
        own = drift.metrics()
        of_workers = self.accelerator.gather(torch.tensor([list(own.values())], device=logps.device))
        for name, values in zip(own, of_workers.T.tolist(), strict=True):
            self._metrics["train"][name].append(max(values) if name.endswith("max") else sum(values) / len(values))

    def _likely_cause(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        rollouts = self._scored.rollouts
        return guards.likely_cause(
            model, self._images, self._row_of_image, rollouts, self.temperature, self._drift_bound
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._step % self.args.gradient_accumulation_steps == 0:
            ended = time.perf_counter()
            self._metrics["train"]["seconds/update"].append(ended - self._started_update)
            self._started_update = ended
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card of its own into every checkpoint; ours is written once, at the end of a run."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model, folder = self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
        super()._save(folder, parts.merged_weights(model))
        parts.save_trained(model, folder)
        if self._average is not None:
            self._average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        own = self.accelerator.unwrap_model(model or self.model)
        if self._average is not None:
            self._average.load(resume_from_checkpoint, own)
        if not parts.load_trained(own, resume_from_checkpoint):
            # transformers' own way reads the file by the names of the modules, and some models are saved under other ones.
            saved = type(own).from_pretrained(resume_from_checkpoint, dtype="auto")
            own.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if isinstance(self._estimator, RunningMean) and self.args.should_save:
            # Before the rest: a checkpoint counts from when its trainer_state.json is there, which comes last.
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ADVANTAGE_STATE_FILE).write_text(json.dumps(self._estimator.state_dict()), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self._estimator, RunningMean):
            self._estimator.load_state_dict(
                json.loads((Path(checkpoint) / ADVANTAGE_STATE_FILE).read_text(encoding="utf-8"))
            )


class SaveAsAsked(TrainerCallback):
    """A resumed run saves as often as its settings say now: transformers goes by those that are in the checkpoint."""

    def on_train_begin(self, args, state, control, **unused: Any) -> None:
        state.compute_steps(args, state.max_steps)


def grpo_arguments(
    settings: RlSettings, output_dir: str, max_steps: int, max_tokens: int, use_gpu: bool, seed: int
) -> GRPOConfig:
    """TRL's arguments for our settings and a run of `max_steps` steps, each of one or more optimizer steps."""
    per_worker = settings.images_per_step * settings.captions_per_image // settings.num_workers
    micro_batches = -(-per_worker // settings.micro_batch)
    updates = settings.updates_per_step
    num_generations = max(2, settings.captions_per_image)
    return GRPOConfig(
        output_dir=output_dir,
        max_steps=max_steps * updates,
        # With these TRL checks its arithmetic; the true size of a step is that of its bags.
        per_device_train_batch_size=num_generations,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=num_generations,
        max_completion_length=max_tokens,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps * updates,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=0.0,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        importance_sampling_level=settings.ratio,
        beta=settings.kl_weight,
        use_bias_correction_kl=True,  # k3 times the ratio: the gradient is then that of KL(policy || start)
        loss_type=settings.loss_type,
        scale_rewards="none",
        reward_weights=list(component_weights(settings.reward).values()),
        disable_dropout=True,
        bf16=autocasts(settings.bf16, use_gpu),
        gradient_checkpointing=False,
        use_cpu=not use_gpu,
        seed=seed,
        ignore_data_skip=True,  # the stream starts at the right step by itself
        save_strategy="steps",
        save_steps=settings.save_every * updates,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=updates,
        report_to=[],
        disable_tqdm=True,
        shuffle_dataset=False,
        ddp_find_unused_parameters=False,
    )


class _Steps(torch.utils.data.IterableDataset):
    def __init__(self, bags: Callable[[int], Iterator[list[Bag]]], next_step: Callable[[], int], repeats: int) -> None:
        """`next_step` is asked when the first item is due: a trainer that resumes reads its step after making the loader."""
        self.bags, self.next_step, self.repeats = bags, next_step, repeats

    def __iter__(self) -> Iterator[list[Bag]]:
        for step_bags in self.bags(self.next_step()):
            for _ in range(self.repeats):
                yield step_bags


def _identity(item: Any) -> Any:
    return item


def _named(component: str) -> Callable[..., Iterable[float]]:
    """TRL wants a function for each component, and takes its name for the metrics."""

    def reward(**_: Any) -> Iterable[float]:
        raise NotImplementedError("BagTrainer._calculate_rewards has the rewards")

    reward.__name__ = component
    return reward
