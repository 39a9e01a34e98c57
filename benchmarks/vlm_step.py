"""Captions per second of our RL step on an image-text model, against TRL's own GRPOTrainer with transformers' generate.

    python benchmarks/vlm_step.py --run-dir runs/demo        (scorer and bags of a finished demo)
    python benchmarks/vlm_step.py                            (makes small ones first)

A tiny Qwen2.5-VL of random weights, trained in all its parts; both take the same weights, images, prompt, batch, reward, dtype
(float32) and threads. They take turns, step by step, as in rl_throughput.py, where the two sides are described; the ratio is
the median over the rounds. The learning rate is 0: the update is computed in full, and changes nothing. TRL's model has our
ban on image tokens as well: without it TRL's step fails on the first caption that holds one. First steps are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from rl_throughput import Workload, against_trl, make_run, measure_ours, measure_trl, read_workload
from turns import TIMEOUT_S, Turns, parts_of_step

from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.captioners.loader import load_processor
from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.cluster import connect
from finecap_ray.config import Settings, load_settings
from finecap_ray.paths import absolute

RESULTS = Path(__file__).parent / "results"
KIND, BAG_SIZE = "qwen2_5_vl", 5
IMAGE_SIZE, MAX_TOKENS = 448, 20  # pixels, which are 256 tokens, as of a small photograph; of a caption
TARGET = 4  # times TRL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="a finished run, of which scorer and bags/train are used")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps that are left out")
    options = parser.parse_args()
    if min(options.warm_up, options.steps) < 1:
        parser.error("--warm-up and --steps must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = absolute(options.run_dir or scratch)
        settings = load_settings(f"{run_dir}/config.yaml") if options.run_dir else make_run(run_dir)
        connect(settings.resources)
        workload = vlm_workload(settings, run_dir, f"{scratch}/captioner", options.steps, options.warm_up)
        turns = Turns.remote(["ours", "trl"])
        other = measure_trl.remote(workload, f"{scratch}/trl", turns)
        ours = measure_ours(workload, f"{scratch}/ours", turns)
        trl = ray.get(other, timeout=TIMEOUT_S)
        result = summary(workload, ours, trl)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vlm_step.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "vlm_step.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def vlm_workload(settings: Settings, run_dir: str, captioner: str, steps: int, warm_up: int) -> Workload:
    """The bags and scorer of a run, with a tiny image-text model in the place of its captioner, which is written there."""
    start = settings.captioner.model_copy(
        update={"spec": captioner, "image_size": IMAGE_SIZE, "max_tokens": MAX_TOKENS}
    )
    save_tiny(KIND, captioner)
    model, processor = load_captioner(captioner, start)
    images = processor.image_processor
    images.size = dict.fromkeys(images.size, IMAGE_SIZE**2)  # no fewer either: the demo's pictures are small
    for part in (model, processor):
        part.save_pretrained(captioner)
    rl = settings.rl.model_copy(update={"images_per_step": 20, "captions_per_image": 6, "micro_batch": 120})
    changed = settings.model_copy(update={"rl": rl, "captioner": start})
    return replace(read_workload(changed, run_dir, BAG_SIZE, steps, warm_up), captioner=captioner)


def summary(workload: Workload, ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    result = against_trl(workload, ours, trl)
    prompt_tokens = family_of(*load_processor(workload.captioner)).longest_prompt
    return result | {"batch": result["batch"] | {"image_size": IMAGE_SIZE, "prompt_tokens": prompt_tokens}}


def table(result: dict[str, Any]) -> str:
    batch, rate, step = result["batch"], result["captions_per_s"], result["step_s"]
    lines = [
        f"Tiny Qwen2.5-VL, float32, {batch['images']} images x {batch['captions_per_image']} captions a step, images of {batch['image_size']} pixels (prompts of {batch['prompt_tokens']} tokens), medians of "
        f"{result['steps']} steps in turns, {result['machine']['cpus']} CPUs.",
        "",
        "| | s per step | captions/s | tokens per caption |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {step[key]:.2f} | {rate[key]:.1f} | {result['tokens_per_caption'][key]:.1f} |"
            for key, name in (("ours", "finecap-ray"), ("trl", "TRL's GRPOTrainer, transformers' generate"))
        ),
        "",
        f"**{result['ratio_to_trl']:.2f} times TRL** (target: {TARGET} or more).",
        "",
        *parts_of_step(result["parts_s"], step["ours"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
