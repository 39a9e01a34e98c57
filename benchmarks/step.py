"""Where the time of an RL step goes, and how long a step of NDLB's shape takes, on this machine.

    python benchmarks/step.py clipcap --run-dir runs/demo    (scorer, captioner and bags of a finished demo; without it, small ones)
    python benchmarks/step.py vlm                            (likewise, but for the captioner)
    python benchmarks/step.py ndlb

clipcap   The real loop, `train_rl`, in turns with forward and backward of the very same captions in plain torch: the policy
          doesn't change (learning rate 0) and a caption's seed is its own, so both processes have the same ones.
vlm       The same with a tiny Qwen2.5-VL of random weights. In plain torch every caption has the prompt and the image before it.
ndlb      Steps of the shape and size of NDLB's: 100 images with one caption each, GPT-2 small behind ClipCap's mapper,
          features and embeddings of 512 numbers in the bags, a text tower of ViT-B/32 for the reward; LoRA on the decoder as
          in the preset. The weights are random, so that captions have all 40 tokens. In float32, then in bfloat16.

First steps are left out. A step's time is from its turn to the call that asks for the next one, logging included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rl_throughput import Workload, make_run, read_workload
from turns import TIMEOUT_S, Clock, Turns, parts_of_step
from vlm_step import vlm_workload

from finecap_ray.bags.build import BagSource, build_bags
from finecap_ray.cluster import connect
from finecap_ray.config import Settings, load_settings
from finecap_ray.paths import absolute
from finecap_ray.precision import autocasts
from finecap_ray.training.metrics_file import read_metrics

RESULTS = Path(__file__).parent / "results"
PARTS = ("sampling", "scoring", "update", "sync")
SYNC_SHARE, UPDATE_RATIO = 0.05, 1.6  # targets
NDLB_S = 84  # of a step of NDLB's own code on two such cores
IMAGES, WIDTH = 400, 512  # of the bag set of NDLB's shape; of its features and embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=("clipcap", "vlm", "ndlb"))
    parser.add_argument(
        "--run-dir", type=Path, help="clipcap, vlm: a finished run, of which scorer, mle and bags/train are used"
    )
    parser.add_argument("--steps", type=int, help="steps that are measured; default 20, ndlb 5")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps that are left out")
    parser.add_argument("--micro-batch", type=int, default=50, help="ndlb: captions per forward pass")
    options = parser.parse_args()
    steps = options.steps or {"clipcap": 20, "vlm": 20, "ndlb": 5}[options.shape]
    if min(options.warm_up, steps) < 1:
        parser.error("--warm-up and --steps must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        if options.shape == "ndlb":
            result = measure_ndlb(scratch, steps, options.warm_up, options.micro_batch)
        else:
            result = measure_parts(options.shape, options.run_dir, scratch, steps, options.warm_up)
    name = " ".join(filter(None, (options.shape, result.get("preset"))))
    path = RESULTS / "step.json"
    every = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    every[name] = {"cpus": os.cpu_count()} | result
    path.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(TABLES[name.split()[0]](own) for name, own in sorted(every.items()))
    (RESULTS / "step.md").write_text(text, encoding="utf-8")
    print(text)


# --- ClipCap and a tiny image-text model, against the bare update


def measure_parts(shape: str, run_dir: Path | None, scratch: str, steps: int, warm_up: int) -> dict[str, Any]:
    folder = absolute(run_dir or scratch)
    settings = load_settings(f"{folder}/config.yaml") if run_dir else make_run(folder)
    connect(settings.resources)
    if shape == "vlm":
        workload = vlm_workload(settings, folder, f"{scratch}/captioner", steps, warm_up)
    else:
        workload = read_workload(settings, folder, settings.rl.curriculum[-1].bag_size, steps, warm_up)
    turns = Turns.remote(["ours", "bare"])
    bare = bare_updates.remote(workload, turns)
    ours = train(workload, f"{scratch}/ours", turns, "ours")
    every = np.array(ours["parts_s"]["update"]) / ray.get(bare, timeout=TIMEOUT_S)[warm_up:-1]
    parts = {part: statistics.median(values) for part, values in ours["parts_s"].items()}
    step_s = statistics.median(ours["step_s"])
    return {
        "preset": settings.name,
        "captions": workload.captions_per_step,
        "steps": len(every),
        "step_s": step_s,
        "parts_s": parts | {"other": step_s - sum(parts.values())},
        "sync_share": float(np.median(np.array(ours["parts_s"]["sync"]) / ours["step_s"])),
        "update_to_bare": float(np.median(every)),
    }


def train(workload: Workload, out: str, turns: Any, name: str) -> dict[str, Any]:
    """Seconds of every measured step of the real loop, and of its parts."""
    from finecap_ray.training.loop import train_rl

    train_rl(
        workload.settings,
        workload.captioner,
        workload.bag_set,
        workload.scorer,
        workload.references,
        out,
        callbacks=[Clock(turns, name)],
    )
    rows = [row for row in read_metrics(Path(out) / "metrics.jsonl") if "reward" in row][workload.warm_up : -1]
    return {
        "step_s": ray.get(turns.reported.remote(name), timeout=TIMEOUT_S)[workload.warm_up : -1],
        "parts_s": {part: [row[f"seconds/{part}"] for row in rows] for part in PARTS},
        "tokens_per_caption": statistics.mean(row["completions/mean_length"] for row in rows),
    }


@ray.remote(num_cpus=1, max_retries=0)
def bare_updates(workload: Workload, turns: Any) -> list[float]:
    """Seconds of forward and backward of the captions of every step, in micro-batches as ours."""
    import torch

    from finecap_ray.captioners import family_of, load_captioner
    from finecap_ray.captioners.family import StepImages
    from finecap_ray.sampling.engine import CaptionEngine
    from finecap_ray.sampling.seeds import caption_seed
    from finecap_ray.sampling.spec import SamplingSpec

    settings, rl, resources = workload.settings, workload.settings.rl, workload.settings.resources
    torch.set_num_threads(resources.threads)
    model, processor = load_captioner(workload.captioner)
    engine = CaptionEngine(load_captioner(workload.captioner)[0], processor, resources)
    engine.load(0, model.state_dict())
    spec = SamplingSpec(rl.captions_per_image, settings.captioner.max_tokens, rl.temperature)
    family, end = family_of(model.config, processor), processor.tokenizer.eos_token_id

    def forward_and_backward(images: StepImages, captions: list[tuple[int, tuple[int, ...]]]) -> None:
        """captions: of which image, and its tokens."""
        longest = max(len(tokens) for _, tokens in captions)
        rows = torch.tensor([row for row, _ in captions])
        texts = torch.tensor([[*tokens, *[end] * (longest - len(tokens))] for _, tokens in captions])
        inside = torch.arange(longest) < torch.tensor([[len(tokens)] for _, tokens in captions])
        inputs = images.of(rows)
        if "prompt_ids" in inputs:
            prompts, prompt_mask = inputs.pop("prompt_ids"), inputs.pop("prompt_mask")
        else:
            prompts = torch.tensor([images.prompts[row] for row in rows])
            prompt_mask = torch.ones_like(prompts)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, longest))
        ids, mask = torch.cat([prompts, texts], dim=1), torch.cat([prompt_mask, inside.long()], dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts(rl.bf16, resources.use_gpu)):
            outputs = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1, **inputs)
        labels = texts.masked_fill(~inside, -100)
        logits = outputs.logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()

    seconds = []
    clock = Clock(turns, "bare")
    for step, bags in enumerate(workload.steps):
        images = [image for bag in bags for image in bag.images]
        seeds = [caption_seed(settings.seed, step, image.image_id) for image in images]
        clock.on_step_begin()
        rollouts = engine.sample([image.image_id for image in images], family.images_of(images), spec, seeds)
        captions = [(place // rl.captions_per_image, one.token_ids) for place, one in enumerate(rollouts)]
        read = family.read(images, "cpu")
        started = time.perf_counter()
        for start in range(0, len(captions), rl.micro_batch):
            forward_and_backward(read, captions[start : start + rl.micro_batch])
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    clock.on_train_end()
    return seconds


# --- the shape of NDLB


def measure_ndlb(scratch: str, steps: int, warm_up: int, micro_batch: int) -> dict[str, Any]:
    overrides = [
        "bags.sizes=[5]",
        "rl.curriculum=[{bag_size: 5, epochs: 100}]",
        f"rl.max_steps={warm_up + steps + 1}",  # the last step ends with a checkpoint, and is left out
        f"rl.micro_batch={micro_batch}",
        "rl.save_every=1000000",
        "rl.drift_bound=1",
        "resources.object_store_mb=3072",  # the weights of a step and of the one before: 640 MB each
    ]
    kinds = {"float32": [], "bfloat16": ["rl.bf16=true", "resources.sampler_dtype=bfloat16"]}
    settings = {name: load_settings("ndlb", overrides + own) for name, own in kinds.items()}
    connect(settings["float32"].resources)
    scorer, captioner, bags = (f"{scratch}/{name}" for name in ("scorer", "captioner", "bags"))
    ray.get(make_ndlb.remote(scorer, captioner, bags), timeout=TIMEOUT_S)
    seen = {}
    for name, own in settings.items():
        workload = Workload(own, captioner, scorer, bags, [["a caption"]] * 2, [], warm_up)
        seen[name] = train(workload, f"{scratch}/{name}", Turns.remote([name]), name)
    rl = settings["float32"].rl
    return {
        "images": rl.images_per_step,
        "captions_per_image": rl.captions_per_image,
        "micro_batch": micro_batch,
        "steps": steps,
        "tokens_per_caption": {name: own["tokens_per_caption"] for name, own in seen.items()},
        "step_s": {name: statistics.median(own["step_s"]) for name, own in seen.items()},
        "parts_s": {
            name: {part: statistics.median(values) for part, values in own["parts_s"].items()}
            for name, own in seen.items()
        },
        "every_step_s": {name: [round(value, 2) for value in own["step_s"]] for name, own in seen.items()},
    }


@ray.remote(num_cpus=1, max_retries=0)
def make_ndlb(scorer: str, captioner: str, bags: str) -> None:
    """Scorer, captioner and bags of NDLB's sizes, with random weights and features."""
    import open_clip
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    from finecap_ray.captioners.clipcap import (
        IMAGE_TOKEN,
        ClipCapConfig,
        ClipCapForConditionalGeneration,
        ClipCapProcessor,
    )
    from finecap_ray.captioners.decoders import END_TOKEN
    from finecap_ray.scorers.scorer import load_scorer, save_scorer

    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32")
    save_scorer(Path(scorer), open_clip.create_model("ViT-B-32"), config, {}, None, {"tower_digest": ""})

    # Made-up words: what counts is that there are as many as GPT-2 has.
    decoder = GPT2Config(n_positions=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(decoder.vocab_size - len(letters) - 1)]
    bpe = Tokenizer(models.BPE({word: place for place, word in enumerate([END_TOKEN, *letters, *words])}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_TOKEN)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    clipcap = ClipCapConfig(
        decoder, feature_dim=WIDTH, prefix_length=10, mapper="mlp", mapper_width=3840, feature_tower="random"
    )
    ClipCapForConditionalGeneration(clipcap).save_pretrained(captioner)
    ClipCapProcessor(tokenizer, prefix_length=10).save_pretrained(captioner)

    rows = np.random.default_rng(0).standard_normal((IMAGES, WIDTH)).astype(np.float32)
    names = [f"image {row}" for row in range(IMAGES)]
    source = BagSource(
        image_ids=names,
        images=[b"not an image"] * IMAGES,
        captions=[[name] for name in names],
        embeddings=rows / np.linalg.norm(rows, axis=1, keepdims=True),
        features=rows.astype(np.float16),
        name="random",
        left_out={},
        scorer={"name": "random", "digest": load_scorer(scorer).digest},
        tower={"digest": "random"},
    )
    build_bags(source, Path(bags), (5,), Settings().bags.model_copy(update={"kind": "random"}), seed=0)


# --- tables


def parts_table(captioner: str, result: dict[str, Any]) -> str:
    step = result["step_s"]
    return "\n".join(
        [
            f"{captioner}, {result['preset']}, {result['captions']} captions a step, medians of {result['steps']} steps, {result['cpus']} CPUs: "
            f"{step:.2f} s per step.",
            "",
            *parts_of_step(result["parts_s"], step),
            f"Weight sync: **{100 * result['sync_share']:.1f} %** of a step (target: less than {100 * SYNC_SHARE:.0f} %). "
            f"Update: **{result['update_to_bare']:.2f} times** forward and backward of the same captions in torch, in turns "
            f"(target: {UPDATE_RATIO} or less).",
            "",
        ]
    )


def ndlb_table(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"Shape of NDLB: {result['images']} images x {result['captions_per_image']} caption of "
            f"{result['tokens_per_caption']['float32']:.0f} tokens, GPT-2 small, random weights, micro-batches of "
            f"{result['micro_batch']}; medians of {result['steps']} steps, {result['cpus']} CPUs. NDLB's code took "
            f"{NDLB_S} s a step.",
            "",
            f"| | s per step | {' | '.join(PARTS)} |",
            f"|---|{'---:|' * (len(PARTS) + 1)}",
            *(
                f"| {name} | {result['step_s'][name]:.1f} | {' | '.join(f'{parts[part]:.1f}' for part in PARTS)} |"
                for name, parts in result["parts_s"].items()
            ),
            "",
        ]
    )


TABLES = {
    "clipcap": partial(parts_table, "ClipCap"),
    "vlm": partial(parts_table, "Tiny Qwen2.5-VL"),
    "ndlb": ndlb_table,
}


if __name__ == "__main__":
    main()
