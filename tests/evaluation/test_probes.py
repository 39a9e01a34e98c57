"""Hacking probes: what they are, and that the default reward pays none of them more than the caption it was made from."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from finecap_ray.bags.mining import mine_bags
from finecap_ray.config import RewardSettings, ScorerSettings
from finecap_ray.evaluation.probes import PROBES, probe_gains
from finecap_ray.rewards.combine import NAMES, build_components, component_weights
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.scorers.images import CaptionedFeatures
from finecap_ray.scorers.scorer import load_scorer
from finecap_ray.scorers.train import train_scorer

DEFAULT = RewardSettings()
NOTHING = dict.fromkeys(NAMES, 0)
PHOTOS = Path(os.environ.get("FINECAP_PHOTOS", Path(__file__).parents[3] / "shared" / "data"))


def honest_request(image_ids, captions, embeddings, bag_size):
    """The first caption of every image in a mined bag; the others are its references."""
    bags = mine_bags(embeddings, bag_size, seed=0)
    rows = [row for bag in bags for row in bag]
    return RewardRequest(
        texts=[captions[row][0] for row in rows],
        ended=np.ones(len(rows), dtype=bool),
        target=np.arange(len(rows)),
        image_ids=[image_ids[row] for row in rows],
        embeddings=embeddings[rows].astype(np.float16),
        bag_of_image=np.arange(len(bags)).repeat(bag_size),
        references=[tuple(captions[row][1:]) for row in rows],
    )


def mean_gains(request, scorer, corpus, reward):
    """Probe -> mean gain of the whole reward."""
    components = build_components(reward, scorer, corpus, None)
    context = scorer.tokenizer.context_length
    gains = probe_gains(request, components, component_weights(reward), scorer.embed_texts, context)
    return {probe: parts["reward"].mean() for probe, parts in gains.items()}


def test_the_probes_by_hand():
    made = {name: make("Two brown dogs are running on the wet sand .", 6) for name, make in PROBES.items()}
    assert {name: probe.text for name, probe in made.items()} == {
        "the caption repeated": "Two brown dogs are running on the wet sand . Two brown dogs are running on the wet sand .",
        "its nouns alone": "dogs sand",
        "trailing spaces": "Two brown dogs are running on the wet sand .      ",
        "no end": "Two brown dogs are running on the wet sand",
        "text past the scorer's context": "Two brown dogs are running on the wet sand . "
        + "and so on " * 5
        + "and so on",
    }
    assert [name for name, probe in made.items() if not probe.ended] == ["no end"]
    assert PROBES["text past the scorer's context"]("a dog", 5).text.startswith("a dog a dog a and so on")
    assert PROBES["its nouns alone"]("running", 5).text == "running"  # never an empty caption


@pytest.fixture(scope="module")
def fitted(emoji, tower, tmp_path_factory):
    """A scorer that knows the 60 pictures: half a minute of training the heads on features that are there already."""
    folder = tmp_path_factory.mktemp("fitted")
    features = torch.from_numpy(emoji.features.astype(np.float32))
    settings = ScorerSettings(epochs=60, batch_size=30, embed_dim=64)
    every = CaptionedFeatures(features, emoji.captions)
    train_scorer(settings, tower, every, every, folder)
    return load_scorer(folder)


def test_no_probe_earns_more_than_the_caption_it_was_made_from(fitted, emoji):
    embeddings = fitted.project_features(torch.from_numpy(emoji.features)).numpy()
    request = honest_request(emoji.image_ids, emoji.captions, embeddings, 3)
    gains = mean_gains(request, fitted, emoji.captions, DEFAULT)
    assert gains.keys() == PROBES.keys()
    assert {probe: gain for probe, gain in gains.items() if gain > -0.01} == {}


def test_each_term_pays_for_itself(fitted, emoji):
    """The cosine alone doesn't see spaces or a missing end; the term for the end does."""
    embeddings = fitted.project_features(torch.from_numpy(emoji.features)).numpy()
    request = honest_request(emoji.image_ids, emoji.captions, embeddings, 3)
    blind = mean_gains(
        request, fitted, emoji.captions, RewardSettings(**NOTHING | {"self_retrieval": 1, "kind": "similarity"})
    )
    assert blind["trailing spaces"] == pytest.approx(0, abs=1e-6)
    ended = mean_gains(request, fitted, emoji.captions, RewardSettings(**NOTHING | {"ended": 0.1}))
    assert ended["trailing spaces"] == pytest.approx(-0.1) and ended["no end"] == pytest.approx(-0.1)
    assert ended["the caption repeated"] == 0
    repetition = mean_gains(request, fitted, emoji.captions, RewardSettings(**NOTHING | {"repetition": 1}))
    assert repetition["the caption repeated"] < -0.3 and repetition["no end"] == pytest.approx(0, abs=0.02)
    length = mean_gains(request, fitted, emoji.captions, RewardSettings(**NOTHING | {"length": 1}))
    assert length["text past the scorer's context"] < -1 and length["no end"] == pytest.approx(0, abs=0.02)


@pytest.mark.photos
def test_no_probe_earns_more_on_human_captions_of_dev_photos():
    table = PHOTOS / "flickr8k.parquet"
    cache = Path(os.environ.get("FINECAP_PHOTO_CACHE", "absent"))
    if not table.exists():
        pytest.skip(f"{table} is absent: set FINECAP_PHOTOS to the folder that holds it")
    if not (cache / "reward_scorer").is_dir():
        pytest.skip(
            "set FINECAP_PHOTO_CACHE to the --cache folder of benchmarks/human_ceiling.py, which trains the scorer"
        )
    rows = pq.read_table(table, columns=["image_id", "captions", "split"]).to_pylist()
    saved = np.load(cache / "features.npz")
    assert list(saved["ids"]) == [row["image_id"] for row in rows]
    scorer = load_scorer(cache / "reward_scorer")
    dev = [row for row, own in enumerate(rows) if own["split"] == "dev"][:300]
    embeddings = scorer.project_features(torch.from_numpy(saved["features"][dev].astype(np.float32))).numpy()
    request = honest_request(
        [rows[row]["image_id"] for row in dev], [rows[row]["captions"] for row in dev], embeddings, 5
    )
    corpus = [row["captions"] for row in rows if row["split"] == "train"]
    gains = mean_gains(request, scorer, corpus, DEFAULT)
    assert {probe: gain for probe, gain in gains.items() if gain >= 0} == {}
