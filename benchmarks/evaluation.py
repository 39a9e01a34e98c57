"""End to end against its parts: 5,000 images captioned and evaluated, and bare sampling, scoring and metrics beside it.

    python benchmarks/evaluation.py --checkpoint runs/demo/rl/captioner

Each part runs alone in a process of its own, warm, on the same threads: sampling is tower and engine without Ray, scoring
the judge's embeddings and ranks, metrics what needs no model. End to end is `finecap evaluate` from the moment its engine is
ready. The images are the run's own, repeated under new names up to the number asked for.
Writes benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    from finecap_ray.captioning import find_captioner, run_settings
    from finecap_ray.evaluation.evaluate import Request, default_scorers, evaluate

    captioner = find_captioner(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        source = run_settings(captioner, None).data.examples
        examples = _repeated(source, arguments.images, Path(folder) / "examples.parquet")
        settings = run_settings(
            captioner,
            None,
            [
                f"data.examples={examples}",
                "evaluation.java_metrics=[]",
                f"resources.threads={arguments.threads}",
            ],
        )
        judge, _ = default_scorers(settings, captioner)
        load_before = os.getloadavg()[0]
        results = evaluate(settings, Request(None, captioner, ("bench",), judge, None))
        whole = results["seconds"]["sampling"] + results["seconds"]["scoring and metrics"]
        import ray

        ray.shutdown()
        context = multiprocessing.get_context("spawn")
        bare = {}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as captions:
            for name, part in {"sampling": _sample, "scoring": _score, "metrics": _metrics}.items():
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    bare[name] = pool.submit(part, settings, captioner, judge, captions.name).result()
    result = {
        "images": arguments.images,
        "threads": arguments.threads,
        "end_to_end_s": whole,
        "end_to_end_parts_s": results["seconds"],
        "bare_s": bare,
        "ratio": whole / sum(bare.values()),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg()[0],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _repeated(source: str, count: int, path: Path) -> Path:
    from finecap_ray.sources import read_examples

    table = read_examples(source)
    rows = [row % table.num_rows for row in range(count)]
    many = table.take(rows)
    names = pa.array([f"{name}-{row}" for row, name in enumerate(many["image_id"].to_pylist())], pa.string())
    many = many.set_column(0, many.schema.field("image_id"), names)
    pq.write_table(many.set_column(3, many.schema.field("split"), pa.array(["bench"] * count, pa.string())), path)
    return path


def _rows(settings) -> list[dict]:
    return pq.read_table(settings.data.examples).to_pylist()


def _sample(settings, captioner: str, judge: str, captions: str) -> float:
    from finecap_ray.captioning import ImageCaptioner, open_checkpoint, sampling_spec

    opened = open_checkpoint(captioner, settings.tower)
    engine = ImageCaptioner(opened, settings.tower.batch_size, settings.resources)
    engine.warm_up()
    spec, rows, texts = sampling_spec(1, 0.0, None, opened.facts), _rows(settings), {}
    started = time.perf_counter()
    size = settings.evaluation.batch_size
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        several = engine.caption([engine.prepare(row["image"]) for row in part], [spec] * len(part))
        texts |= {row["image_id"]: own[0].text for row, own in zip(part, several, strict=True)}
    seconds = time.perf_counter() - started
    Path(captions).write_text(json.dumps(texts), encoding="utf-8")
    return seconds


def _score(settings, captioner: str, judge: str, captions: str) -> float:
    """As the judge does it: features come from the captioner's tower."""
    import numpy as np
    import torch

    from finecap_ray.captioning import open_checkpoint
    from finecap_ray.evaluation.clip_score import clip_score
    from finecap_ray.evaluation.pools import random_pools
    from finecap_ray.evaluation.ranking import place_captions, retrieval_numbers
    from finecap_ray.scorers.scorer import load_scorer

    torch.set_num_threads(settings.resources.threads)
    scorer, rows = load_scorer(judge), _rows(settings)
    given = json.loads(Path(captions).read_text(encoding="utf-8"))
    first = {row["image"]: row for row in rows}
    tower = open_checkpoint(captioner, settings.tower).tower
    seen = list(first)
    parts = [tower.embed(seen[start : start + 64]) for start in range(0, len(seen), 64)]
    of_image = dict(zip(seen, torch.cat(parts).half(), strict=True))
    features = np.stack([of_image[row["image"]].numpy() for row in rows])
    scorer.embed_texts(["warm"])
    started = time.perf_counter()
    images = scorer.project_features(torch.from_numpy(features.astype(np.float32)))
    texts = list(dict.fromkeys([*given.values(), *(text for row in rows for text in row["captions"])]))
    embedded, place = scorer.embed_texts(texts), {text: row for row, text in enumerate(texts)}
    index = {row["image_id"]: number for number, row in enumerate(rows)}
    pools = random_pools(list(index), 100, settings.seed)
    for own in (
        {image_id: [place[text]] for image_id, text in given.items()},
        {row["image_id"]: [place[text] for text in row["captions"]] for row in rows},
    ):
        placed = place_captions(pools.pools, index, images, own, embedded)
        retrieval_numbers(pools, placed, settings.evaluation.bootstrap_samples, settings.seed)
    clip_score(embedded[[place[given[image_id]] for image_id in index]], images).mean()
    return time.perf_counter() - started


def _metrics(settings, captioner: str, judge: str, captions: str) -> float:
    from finecap_ray.evaluation.captions import caption_metrics
    from finecap_ray.evaluation.objects import object_precision, read_synonyms

    given = json.loads(Path(captions).read_text(encoding="utf-8"))
    human = {row["image_id"]: row["captions"] for row in _rows(settings)}
    started = time.perf_counter()
    caption_metrics(given, human, settings.evaluation.tokenisation)
    object_precision(given, human, read_synonyms(settings.evaluation.synonyms))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
