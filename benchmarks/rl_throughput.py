"""Captions per second of our RL step, against TRL's own GRPOTrainer with transformers' generate, on this machine.

    python benchmarks/rl_throughput.py --run-dir runs/demo       (scorer, captioner and bags of a finished demo)
    python benchmarks/rl_throughput.py                           (makes small ones first)

All three take the same captioner, bags, batch, dtype and threads, each in Ray processes of the same environment. They take
turns, step by step, and a ratio is the median over the rounds of one step of each: what a shared machine gives changes by
a third from minute to minute, and so hits all three alike. The learning rate is 0, so that all caption with the same policy
throughout: the update is computed in full, and changes nothing. First steps are left out.

    ours   the real loop: `train_rl`, with samplers, reward actors and BagTrainer under Ray Train
    TRL    GRPOTrainer as it comes, the whole step as one batch, which is fastest; the reward is the same class, called in
           the trainer's process
    bare   vLLM's generate without seeds and log-probs, and one forward and backward of those sequences in torch:
           what an RL step can't do without

A step's time is from its turn to the call that asks for the next one, logging included. Only the ratios are claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from turns import TIMEOUT_S, Clock, Turns, parts_of_step

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.stream import plan_run, read_bags
from finecap_ray.cluster import connect
from finecap_ray.config import Settings, Stage, load_settings
from finecap_ray.config_models import DEFAULT_PROMPT
from finecap_ray.console import plain_console
from finecap_ray.paths import absolute
from finecap_ray.precision import autocasts
from finecap_ray.records import Bag
from finecap_ray.training.metrics_file import read_metrics

RESULTS = Path(__file__).parent / "results"
PARTS = ("sampling", "scoring", "update", "sync")


@dataclass(frozen=True, slots=True)
class Workload:
    """What all three take; the bags are those of each step, in order."""

    settings: Settings
    captioner: str
    scorer: str
    bag_set: str
    references: list[list[str]]
    steps: list[list[Bag]]
    warm_up: int

    @property
    def captions_per_step(self) -> int:
        return len(self.steps[0]) * len(self.steps[0][0].images) * self.settings.rl.captions_per_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, help="a finished run, of which scorer, mle and bags/train are used")
    parser.add_argument("--bag-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured")
    parser.add_argument("--warm-up", type=int, default=3, help="first steps that are left out")
    options = parser.parse_args()
    if min(options.warm_up, options.steps) < 1:
        parser.error("--warm-up and --steps must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = absolute(options.run_dir or scratch)
        settings = load_settings(f"{run_dir}/config.yaml") if options.run_dir else make_run(run_dir)
        connect(settings.resources)
        workload = read_workload(settings, run_dir, options.bag_size, options.steps, options.warm_up)
        turns = Turns.remote(["ours", "trl", "bare"])
        others = [measure_trl.remote(workload, f"{scratch}/trl", turns), measure_bare.remote(workload, turns)]
        ours = measure_ours(workload, f"{scratch}/ours", turns)
        trl, bare = ray.get(others, timeout=TIMEOUT_S)
    result = summary(workload, ours, trl, bare)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rl_throughput.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "rl_throughput.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def make_run(run_dir: str) -> Settings:
    """Scorer, captioner and bags of the embedded data, trained for a moment; their quality doesn't matter here."""
    from finecap_ray.pipeline import Pipeline
    from finecap_ray.progress import Narrator
    from finecap_ray.stages import Stages

    overrides = [f"run_dir={run_dir}", "tower.image_size=64", "scorer.epochs=4", "mle.epochs=4"]
    settings = load_settings("demo", overrides)
    narrator = Narrator(plain_console())
    pipeline = Pipeline(settings, Stages(run_dir, narrator.started, narrator.ended), narrator)
    pipeline.mle, pipeline.bags("train")
    return settings


def read_workload(settings: Settings, run_dir: str, bag_size: int, steps: int, warm_up: int) -> Workload:
    bag_set = f"{run_dir}/bags/train"
    rl = settings.rl.model_copy(
        update={
            "curriculum": (Stage(bag_size=bag_size, epochs=100),),
            "max_steps": warm_up + steps + 1,  # the last step ends with a checkpoint, and is left out
            "learning_rate": 0.0,
            "save_every": 10**6,
            "num_workers": 1,
        }
    )
    settings = settings.model_copy(update={"rl": rl})
    bags = read_bags(bag_set, bag_size)
    plan = plan_run(read_manifest(bag_set), rl, settings.seed)
    return Workload(
        settings=settings,
        captioner=f"{run_dir}/mle",
        scorer=settings.scorer.spec or f"{run_dir}/scorer",
        bag_set=bag_set,
        references=[list(image.captions) for bag in bags for image in bag.images],
        steps=[[bags[row] for row in step.workers[0]] for step in plan],
        warm_up=warm_up,
    )


def measure_ours(workload: Workload, out: str, turns: Any) -> dict[str, Any]:
    from finecap_ray.training.loop import train_rl

    train_rl(
        workload.settings,
        workload.captioner,
        workload.bag_set,
        workload.scorer,
        workload.references,
        out,
        callbacks=[Clock(turns, "ours")],
    )
    rows = [row for row in read_metrics(Path(out) / "metrics.jsonl") if "reward" in row][workload.warm_up : -1]
    return {
        "step_s": ray.get(turns.reported.remote("ours"), timeout=TIMEOUT_S)[workload.warm_up : -1],
        "tokens_per_caption": statistics.mean(row["completions/mean_length"] for row in rows),
        "reward": statistics.mean(row["reward"] for row in rows),
        "parts_s": {part: statistics.median(row[f"seconds/{part}"] for row in rows) for part in PARTS},
    }


@ray.remote(num_cpus=1, max_retries=0)
def measure_trl(workload: Workload, out: str, turns: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from finecap_ray.captioners import family_of, load_captioner
    from finecap_ray.images import decode_image
    from finecap_ray.rewards.actor import RewardActor
    from finecap_ray.rewards.combine import component_weights, total_reward
    from finecap_ray.rewards.component import RewardRequest

    settings, rl = workload.settings, workload.settings.rl
    torch.set_num_threads(settings.resources.threads)
    captions_per_image = rl.captions_per_image
    in_process = RewardActor.__ray_metadata__.modified_class
    scorer = in_process(workload.scorer, rl.reward, workload.references, None, settings.resources)
    weights = component_weights(rl.reward)
    model, processor = load_captioner(workload.captioner)
    end = processor.tokenizer.eos_token_id
    features = family_of(model.config, processor).reads == "features"
    images = [image for bags in workload.steps for bag in bags for image in bag.images]
    bag_of = [number for number, bag in enumerate(bag for bags in workload.steps for bag in bags) for _ in bag.images]

    def reward(completions: list, completion_ids: list, row: list[int], **_: Any) -> list[float]:
        own = [images[index] for index in row[::captions_per_image]]
        reply = scorer.score(
            RewardRequest(
                texts=[message["content"] for (message,) in completions],
                ended=np.array([ids[-1] == end for ids in completion_ids]),
                target=np.arange(len(own)).repeat(captions_per_image),
                image_ids=[image.image_id for image in own],
                embeddings=np.stack([image.embedding for image in own]),
                bag_of_image=np.array([bag_of[index] for index in row[::captions_per_image]]),
                references=[image.captions for image in own],
            )
        )
        return total_reward(reply.components, weights).tolist()

    prompt = [{"role": "user", "content": settings.captioner.prompt or DEFAULT_PROMPT}]
    dataset = Dataset.from_dict(
        {
            "prompt": [prompt] * len(images),
            "image": [
                image.features.astype(np.float32).tolist() if features else decode_image(image.image)
                for image in images
            ],
            "row": list(range(len(images))),
        }
    )
    captions = workload.captions_per_step
    arguments = GRPOConfig(
        output_dir=out,
        max_steps=len(workload.steps),
        per_device_train_batch_size=captions,  # the whole step at once: as fast as it goes
        num_generations=captions_per_image,
        max_completion_length=settings.captioner.max_tokens,
        temperature=rl.temperature,
        learning_rate=rl.learning_rate,
        max_grad_norm=rl.max_grad_norm,
        beta=rl.kl_weight,
        loss_type=rl.loss_type,
        scale_rewards="none",
        disable_dropout=True,
        bf16=autocasts(rl.bf16, settings.resources.use_gpu),
        gradient_checkpointing=False,
        use_cpu=not settings.resources.use_gpu,
        seed=settings.seed,
        shuffle_dataset=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock(turns, "trl")
    trainer = GRPOTrainer(
        model.train(), reward, args=arguments, train_dataset=dataset, processing_class=processor, callbacks=[clock]
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row][workload.warm_up : -1]
    return {
        "step_s": clock.step_s[workload.warm_up : -1],
        "tokens_per_caption": statistics.mean(row["completions/mean_length"] for row in rows),
        "reward": statistics.mean(row["reward"] for row in rows),
    }


@ray.remote(num_cpus=1, max_retries=0)
def measure_bare(workload: Workload, turns: Any) -> dict[str, Any]:
    """Seconds of vLLM's generate, of our engine on top of it (seeds, log-probs, records), and of forward and backward."""
    import torch
    from vllm import SamplingParams

    from finecap_ray.captioners import load_captioner
    from finecap_ray.sampling.engine import CaptionEngine
    from finecap_ray.sampling.seeds import caption_seed
    from finecap_ray.sampling.spec import SamplingSpec

    settings, rl, resources = workload.settings, workload.settings.rl, workload.settings.resources
    torch.set_num_threads(resources.threads)
    architecture, processor = load_captioner(workload.captioner)
    model, _ = load_captioner(workload.captioner)
    engine = CaptionEngine(architecture, processor, resources)
    engine.load(0, model.state_dict())
    device = "cuda" if resources.use_gpu else "cpu"
    model.to(device)
    spec = SamplingSpec(rl.captions_per_image, settings.captioner.max_tokens, rl.temperature)
    plain = SamplingParams(n=spec.captions_per_image, temperature=spec.temperature, max_tokens=spec.max_tokens)
    prompt, end = processor.prompt_token_ids(), processor.tokenizer.eos_token_id

    def forward_and_backward(captions: list[list[int]], pixels: torch.Tensor) -> None:
        longest = max(map(len, captions))
        ids = torch.tensor([[*prompt, *tokens, *[end] * (longest - len(tokens))] for tokens in captions], device=device)
        lengths = torch.tensor([[len(tokens)] for tokens in captions], device=device)
        inside = torch.arange(longest, device=device) < lengths
        mask = torch.cat([torch.ones(len(ids), len(prompt), device=device).bool(), inside], dim=1).long()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocasts(rl.bf16, resources.use_gpu)):
            outputs = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=longest + 1)
        logits = outputs.logits[:, :-1].float()
        labels = ids[:, len(prompt) :].masked_fill(~inside, -100)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {"generate": [], "engine": [], "forward_and_backward": []}
    lengths = []
    clock = Clock(turns, "bare")
    for step, bags in enumerate(workload.steps):
        clock.on_step_begin()
        images = [image for bag in bags for image in bag.images]
        features = np.stack([image.features for image in images])
        pixels = torch.from_numpy(features.astype(np.float32)).repeat_interleave(rl.captions_per_image, 0).to(device)
        with torch.inference_mode():
            prefixes = engine.beside(torch.from_numpy(features.astype(np.float32))).to(engine.dtype)
        started = time.perf_counter()
        outputs = engine.llm.generate([{"prompt_embeds": prefix} for prefix in prefixes], plain, use_tqdm=False)
        generated = time.perf_counter()
        captions = [list(caption.token_ids) for output in outputs for caption in output.outputs]
        lengths += map(len, captions)
        updating = time.perf_counter()
        forward_and_backward(captions, pixels)
        updated = time.perf_counter()
        image_ids = [image.image_id for image in images]
        engine.sample(image_ids, features, spec, [caption_seed(settings.seed, step, name) for name in image_ids])
        seconds["generate"].append(generated - started)
        seconds["forward_and_backward"].append(updated - updating)
        seconds["engine"].append(time.perf_counter() - updated)
    clock.on_train_end()
    seconds = {name: values[workload.warm_up : -1] for name, values in seconds.items()}
    return seconds | {"tokens_per_caption": statistics.mean(lengths)}


def against_trl(workload: Workload, ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    """What is said of our step and TRL's, with any model."""
    captions, rl = workload.captions_per_step, workload.settings.rl
    every = {"ours": np.array(ours["step_s"]), "trl": np.array(trl["step_s"])}
    step_s = {name: float(np.median(own)) for name, own in every.items()}
    return {
        "machine": {"cpus": os.cpu_count(), "threads": workload.settings.resources.threads, "kind": platform.machine()},
        "batch": {
            "images": captions // rl.captions_per_image,
            "captions_per_image": rl.captions_per_image,
            "captions": captions,
            "bag_size": len(workload.steps[0][0].images),
            "max_tokens": workload.settings.captioner.max_tokens,
            "bf16": autocasts(rl.bf16, workload.settings.resources.use_gpu),
        },
        "steps": len(every["ours"]),
        "captions_per_s": {name: captions / seconds for name, seconds in step_s.items()},
        "ratio_to_trl": float(np.median(every["trl"] / every["ours"])),
        "step_s": step_s,
        "parts_s": ours["parts_s"] | {"other": step_s["ours"] - sum(ours["parts_s"].values())},
        "tokens_per_caption": {name: own["tokens_per_caption"] for name, own in (("ours", ours), ("trl", trl))},
        "mean_reward": {"ours": ours["reward"], "trl": trl["reward"]},
        "every_step_s": {name: own.round(3).tolist() for name, own in every.items()},
    }


def summary(workload: Workload, ours: dict[str, Any], trl: dict[str, Any], bare: dict[str, Any]) -> dict[str, Any]:
    result = against_trl(workload, ours, trl)
    bare_s = np.add(bare["generate"], bare["forward_and_backward"])
    result["batch"]["kl_weight"] = workload.settings.rl.kl_weight
    result["ratio_to_bare"] = float(np.median(np.array(ours["step_s"]) / bare_s))
    result["step_s"]["bare"] = float(np.median(bare_s))
    result["captions_per_s"]["bare"] = workload.captions_per_step / result["step_s"]["bare"]
    result["every_step_s"]["bare"] = bare_s.round(3).tolist()
    names = ("generate", "engine", "forward_and_backward")
    return result | {"bare_s": {name: statistics.median(bare[name]) for name in names}}


def table(result: dict[str, Any]) -> str:
    batch, rate, step = result["batch"], result["captions_per_s"], result["step_s"]
    lines = [
        f"{batch['images']} images x {batch['captions_per_image']} captions a step, bags of {batch['bag_size']}, "
        f"medians of {result['steps']} steps in turns, {result['machine']['cpus']} CPUs.",
        "",
        "| | s per step | captions/s |",
        "|---|---:|---:|",
        f"| finecap-ray | {step['ours']:.2f} | {rate['ours']:.1f} |",
        f"| TRL's GRPOTrainer, transformers' generate | {step['trl']:.2f} | {rate['trl']:.1f} |",
        f"| bare vLLM sampling + torch forward and backward | {step['bare']:.2f} | {batch['captions'] / step['bare']:.1f} |",
        "",
        f"**{result['ratio_to_trl']:.2f} times TRL** (target: 2 or more); "
        f"**{result['ratio_to_bare']:.2f} times the bare step** (target: 1.5 or less).",
        "",
        *parts_of_step(result["parts_s"], step["ours"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
