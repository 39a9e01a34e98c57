"""What all tests share: one Ray, and a small world that is made once (images, features, scorers, bags, captioner, engines).

The images of the bags are garbage bytes: whatever trains on these bags can't have looked at them.
"""

import io
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from finecap_ray.config import (
    BagSettings,
    CaptionerSettings,
    JudgeSettings,
    ResourceSettings,
    RewardSettings,
    ScorerSettings,
    TowerSettings,
)
from finecap_ray.images import decode_image
from finecap_ray.records import BagImage

# Ray Train sees that its workers are done when it next looks after them: every 2 s by default.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
IMAGE_SIZE = 64  # pixels; a quarter of the work of the default
MAX_TOKENS = 8


# Fixtures that start engines, half a minute each, and the files that use them.
ENGINES = {
    "vlm": {"captioners/test_families.py", "training/test_vlm.py"},
    "samplers": {"sampling/test_sampler.py", "training/test_trainer.py", "training/test_workers.py"},
}
TESTS = Path(__file__).parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Shares out the tests of `make test` by file; all files that use the same engines go to one process.

    (With pytest 9.2 the groups of xdist 3.8, `loadgroup`, share out nothing but single tests.)
    """
    from xdist.scheduler import LoadFileScheduling

    class ByEngine(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return _engines_of(nodeid.split("::")[0].removeprefix(f"{TESTS.name}/")) or super()._split_scope(nodeid)

    return ByEngine(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    """Those with engines first, since they take longest."""
    items.sort(key=lambda item: _engines_of(_file(item)) is None)


def _file(item):
    return item.path.relative_to(TESTS).as_posix()


def _engines_of(file):
    return next((name for name, files in ENGINES.items() if file in files), None)


@pytest.fixture(scope="session")
def engines():
    return ENGINES


@dataclass(frozen=True)
class Emoji:
    """60 training images and what the frozen tower sees of them."""

    image_ids: list[str]
    images: list[bytes]
    captions: list[list[str]]
    features: np.ndarray  # [60, F] float16


@pytest.fixture(scope="session")
def resources():
    return ResourceSettings(num_cpus=8, threads=1, samplers=2, sampler_max_sequences=64, step_timeout_s=120)


@pytest.fixture(scope="session")
def ray_session(resources, tmp_path_factory):
    import ray

    from finecap_ray.cluster import connect

    # One process of pytest after the other: Ray gives a node 30 s to start.
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        connect(resources)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tower():
    from finecap_ray.scorers.tower import load_tower

    return load_tower(TowerSettings(image_size=IMAGE_SIZE))


@pytest.fixture(scope="session")
def emoji(tower):
    from finecap_ray.sources import read_examples

    rows = [row for row in read_examples("fluent").to_pylist() if row["split"] == "train"][200:260]
    images = [row["image"] for row in rows]
    features = tower.embed(images).numpy().astype(np.float16)
    return Emoji([row["image_id"] for row in rows], images, [row["captions"] for row in rows], features)


def _trained_scorer(settings, tower, emoji, folder: Path) -> Path:
    import torch

    from finecap_ray.scorers.images import CaptionedFeatures
    from finecap_ray.scorers.train import train_scorer

    every = CaptionedFeatures(torch.from_numpy(emoji.features.astype(np.float32)), emoji.captions, emoji.images)
    train_scorer(settings, tower, every.rows(range(50)), every.rows(range(50, len(every))), folder)
    return folder


@pytest.fixture(scope="session")
def scorer_folder(tower, emoji, tmp_path_factory):
    """A reward scorer on frozen MiniLM."""
    settings = ScorerSettings(epochs=4, batch_size=25, embed_dim=32)
    return _trained_scorer(settings, tower, emoji, tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="session")
def judge_folder(tower, emoji, tmp_path_factory):
    """A judge whose text tower is trained from scratch."""
    settings = JudgeSettings(epochs=2, batch_size=25, embed_dim=32)
    return _trained_scorer(settings, tower, emoji, tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def scorer(scorer_folder):
    from finecap_ray.scorers.scorer import load_scorer

    return load_scorer(scorer_folder)


@pytest.fixture(scope="session")
def bag_source(emoji, scorer, tower):
    import torch

    from finecap_ray.bags.source import BagSource

    return BagSource(
        image_ids=emoji.image_ids,
        images=[b"not an image"] * len(emoji.images),
        captions=emoji.captions,
        embeddings=scorer.project_features(torch.from_numpy(emoji.features)).numpy(),
        features=emoji.features,
        name="train",
        left_out={"undecodable": 0},
        scorer={"name": scorer.name, "digest": scorer.digest},
        tower={"digest": tower.digest},
    )


@pytest.fixture(scope="session")
def bag_folder(bag_source, tmp_path_factory):
    """Bags of 2 and 3, a few per row group."""
    from finecap_ray.bags.build import build_bags

    folder = tmp_path_factory.mktemp("bags")
    build_bags(bag_source, folder, (2, 3), BagSettings(rows_per_group=4), seed=0)
    return folder


@pytest.fixture(scope="session")
def captioner_settings():
    """One head of 32: vLLM on CPU has no attention kernel for narrower heads."""
    return CaptionerSettings(
        prefix_length=2,
        mapper="mlp",
        mapper_width=32,
        width=32,
        layers=2,
        heads=1,
        vocabulary=400,
        max_tokens=MAX_TOKENS,
        dropout=0,
    )


@pytest.fixture(scope="session")
def captioner_folder(captioner_settings, emoji, tower, tmp_path_factory):
    """A captioner of random weights, large enough for its distributions to be far from uniform."""
    import torch

    from finecap_ray.captioners.build import build_clipcap

    captions = [text for own in emoji.captions for text in own]
    model, processor = build_clipcap(captioner_settings, captions, tower.width, tower.digest, 0.0, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("captioner")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def captioner(captioner_folder):
    """Model and processor, new for each test: it may change the weights."""
    from finecap_ray.captioners import load_captioner

    return load_captioner(captioner_folder)


@pytest.fixture(scope="session")
def samplers(ray_session, captioner_folder, resources, tmp_path_factory):
    """Two samplers; engines take long to start, so all tests use these."""
    from finecap_ray.sampling.sampler import SamplerPool

    pool = SamplerPool(str(captioner_folder), resources, logs=str(tmp_path_factory.mktemp("logs")))
    pool.wait_until_ready()
    yield pool
    pool.close()


@dataclass(frozen=True)
class TinyVlm:
    """An image-text captioner of random weights, and a sampler of it."""

    kind: str
    folder: Path
    samplers: object
    images: list  # BagImage, no two of one size, and none square


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl", "idefics3"])
def vlm(request, ray_session, resources, emoji, tmp_path_factory):
    """One kind after the other, so that one engine at a time is up. Two of them tie word embeddings and output layer."""
    from finecap_ray.captioners.tiny import save_tiny
    from finecap_ray.sampling.sampler import SamplerPool

    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder, tied=request.param != "qwen3_vl")
    one = resources.model_copy(update={"samplers": 1, "sampler_max_sequences": 128})
    pool = SamplerPool(str(folder), one, logs=str(tmp_path_factory.mktemp("logs")))
    pool.wait_until_ready()
    yield TinyVlm(request.param, folder, pool, pictures(emoji.images))
    pool.close()


def pictures(images):
    """Four of them, scaled to 40 x 90 and other sizes."""
    sizes = ((40, 90), (200, 60), (64, 96), (300, 100))
    found = []
    for row, size in enumerate(sizes):
        file = io.BytesIO()
        decode_image(images[row]).resize(size).save(file, "PNG")
        found.append(BagImage(f"picture {row}", file.getvalue(), ("a caption",), None, None))
    return found


@pytest.fixture(scope="session")
def versions():
    """Weight versions for the shared samplers: each test takes the next one, which is newer than all before."""
    return itertools.count(1000, 1000)


@pytest.fixture(scope="session")
def rewards(ray_session, scorer_folder, emoji, resources):
    from finecap_ray.rewards.actor import RewardPool

    pool = RewardPool(
        str(scorer_folder), RewardSettings(scope="bag", cider=0.5, ended=0, repetition=0), emoji.captions, resources
    )
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A causal language model as people have them: tied, grouped heads, a tokenizer of its own, and more rows than words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finecap_ray.captioners.decoders import train_tokenizer

    tokenizer = train_tokenizer(["a red apple on a plate", "two dogs run on the beach", "a man rides a bike"], 300)
    tokenizer.add_special_tokens({"eos_token": "</s>", "extra_special_tokens": ["<tool>"]})
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 13,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():  # far from uniform distributions
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
