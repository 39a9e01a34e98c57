"""Rewards through real actors with a real scorer: the numbers of the pure module, and ties that are shared."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from finecap_ray.config import ResourceSettings, RewardSettings
from finecap_ray.errors import ConfigError, DeadlineError
from finecap_ray.records import ImageBank
from finecap_ray.rewards.actor import RewardPool
from finecap_ray.rewards.combine import NAMES, NEED_REFERENCES, build_components
from finecap_ray.rewards.component import RewardRequest
from finecap_ray.rewards.self_retrieval import own_bag, retrieval_rank

TEXTS = ["a red apple", "a green pear", "a red apple", "a flag", "a green pear", "apple apple"]
ALONE = dict.fromkeys(NAMES, 0) | {"self_retrieval": 1}


def request(bag_source, rows, bag_of_image, texts=TEXTS, references=None):
    """Captions shared out evenly among the images `rows` of the bag source."""
    return RewardRequest(
        texts=list(texts),
        ended=np.arange(len(texts)) % 2 == 0,
        target=np.arange(len(rows)).repeat(-(-len(texts) // len(rows)))[: len(texts)],
        image_ids=[bag_source.image_ids[row] for row in rows],
        embeddings=bag_source.embeddings[rows].astype(np.float16),
        bag_of_image=np.array(bag_of_image),
        references=references or [tuple(bag_source.captions[row]) for row in rows],
    )


def test_rewards_follow_the_formula_on_the_embeddings_of_the_bag(rewards, scorer, bag_source):
    asked = request(bag_source, [4, 9, 20], [0, 0, 1])
    reply = rewards.score(asked)
    text = scorer.embed_texts(TEXTS).double().numpy()
    images = asked.embeddings.astype(np.float64)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    p = np.exp(scorer.logit_scale * text @ images.T)
    # Two captions per image; images 0 and 1 compete, image 2 is alone in its bag: log 1.
    expected = [math.log(p[c, c // 2] / (p[c, 0] + p[c, 1])) for c in range(4)] + [0.0, 0.0]
    assert reply.components["self_retrieval"] == pytest.approx(expected, abs=1e-4)
    assert reply.metrics["unique_captions"] == 4 / 6
    assert reply.metrics["truncated"] == 0


def test_the_reward_looks_at_embeddings_and_at_no_image(rewards, bag_source):
    """The record that crosses to the actor has no place for an image; other embeddings, other rewards."""
    one, other = (rewards.score(request(bag_source, rows, [0, 0])) for rows in ([4, 9], [9, 4]))
    # The two images changed places: caption 0 is now paid for the other one, and p + (1 - p) = 1.
    first, second = (np.exp(reply.components["self_retrieval"].astype(float)) for reply in (one, other))
    assert first + second == pytest.approx(np.ones(6), abs=1e-5)


def test_a_scorer_in_bfloat16_pays_nearly_the_same(scorer_folder, rewards, bag_source):
    asked = request(bag_source, [4, 9, 20], [0, 0, 1])
    resources = ResourceSettings(scorer_dtype="bfloat16", threads=1)
    pool = RewardPool(str(scorer_folder), RewardSettings(scope="bag", **ALONE), [], resources)
    try:
        half, whole = (one.score(asked).components["self_retrieval"] for one in (pool, rewards))
    finally:
        pool.close()
    assert half == pytest.approx(whole, abs=0.1)
    assert not np.array_equal(half, whole)
    assert half[4:].tolist() == [0.0, 0.0]


def test_equal_images_share_the_reward(rewards, bag_source):
    reply = rewards.score(request(bag_source, [4, 4, 4], [0, 0, 0]))
    # A tie among 3: -log 3 each, whatever the caption; rank (3 + 1) / 2, accuracy 1 / 3.
    assert reply.components["self_retrieval"] == pytest.approx(np.full(6, -math.log(3)), abs=1e-6)
    assert reply.metrics["rank"] == 2
    assert reply.metrics["accuracy"] == pytest.approx(1 / 3)


def test_equal_captions_share_the_reward(rewards, bag_source):
    reply = rewards.score(request(bag_source, [4, 9, 20], [0, 0, 0], texts=["a red apple"] * 3))
    # One caption for all three: its probabilities add up to 1, and it finds one image of the three.
    assert np.exp(reply.components["self_retrieval"].astype(float)).sum() == pytest.approx(1, abs=1e-5)
    assert reply.metrics["accuracy"] == pytest.approx(1 / 3)
    twice = rewards.score(request(bag_source, [4, 9], [0, 0], texts=["a flag", "a flag", "a red apple", "a flag"]))
    first, second, _, _ = twice.components["self_retrieval"]
    assert first == second


def test_cider_has_no_signal_for_images_without_captions(rewards, bag_source):
    own = tuple(bag_source.captions[4])
    texts = [own[0], "zzz", own[0], own[0]]
    reply = rewards.score(request(bag_source, [4, 9], [0, 0], texts=texts, references=[own, ()]))
    right, wrong, *none = reply.components["cider"]
    assert right > wrong == 0
    assert np.isnan(none).all() and reply.metrics["without_references"] == 0.5


def test_other_kinds_and_scopes(ray_session, scorer_folder, scorer, bag_source):
    resources = ResourceSettings()
    asked = request(bag_source, [4, 9, 20], [0, 0, 1])
    cosine = (scorer.embed_texts(TEXTS) @ torch.from_numpy(asked.embeddings.astype(np.float32)).T).numpy()
    settings = RewardSettings(kind="probability", scope="batch", logit_scale=10.0, **ALONE)
    pool = RewardPool(str(scorer_folder), settings, [], resources)
    try:
        assert pool.digest() == scorer.digest
        p = np.exp(10.0 * cosine)
        expected = [p[c, c // 2] / p[c].sum() for c in range(6)]  # all three images compete
        reply = pool.score(asked)
    finally:
        pool.close()
    assert reply.components["self_retrieval"] == pytest.approx(expected, abs=1e-3)
    assert "cider" not in reply.components


def test_a_reward_of_nothing_is_refused(ray_session):
    with pytest.raises(ConfigError, match="every reward weight is 0"):
        RewardPool("none", RewardSettings(**ALONE | {"self_retrieval": 0}), [], ResourceSettings())


def test_an_actor_that_does_not_answer_in_time_is_named(ray_session, scorer_folder):
    pool = RewardPool(str(scorer_folder), RewardSettings(**ALONE), [], ResourceSettings(start_timeout_s=0.05))
    try:
        with pytest.raises(DeadlineError, match=r"reward actors didn't start within 0 s: see `ray status`"):
            pool.digest()
    finally:
        pool.close()


def test_a_pool_of_three_actors_equals_one_process(ray_session, scorer_folder, scorer, bag_source):
    """Every component at once, in batch scope and with a bank: seven captions, so that the shares are uneven."""
    weights = dict.fromkeys(NAMES, 0.5)
    settings = RewardSettings(**weights, scope="batch", hard_negatives=5, cider_frequencies="batch", longest=2)
    bank = ImageBank(bag_source.image_ids, bag_source.embeddings.astype(np.float16))
    texts = [*TEXTS, "a flag a flag a flag "]
    asked = replace(
        request(bag_source, [4, 9, 20], [0, 0, 1], texts=texts, references=None),
        target=np.array([0, 0, 1, 1, 2, 2, 2]),
        references=[tuple(bag_source.captions[4]), (), tuple(bag_source.captions[20])],
    )
    pool = RewardPool(str(scorer_folder), settings, [], ResourceSettings(scorers=3), bank)
    try:
        reply = pool.score(asked)
        alone = pool.score(asked.captions(np.array([2])))  # fewer captions than actors
    finally:
        pool.close()
    text = scorer.embed_texts(texts)
    components = build_components(settings, scorer, [], bank)
    assert reply.components.keys() == components.keys() == weights.keys()
    for name, component in components.items():
        expected = component(asked, text)
        np.testing.assert_allclose(reply.components[name], expected, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(alone.components[name], expected[[2]], rtol=0, atol=1e-5, err_msg=name)
        assert np.isnan(expected).tolist() == [name in NEED_REFERENCES and image == 1 for image in asked.target]
    assert reply.metrics["without_references"] == 2 / 7 and alone.metrics["without_references"] == 1
    assert reply.metrics["unique_captions"] == 5 / 7
    # The pool's mean over captions is that of one process.
    rank = retrieval_rank(text, asked.images(), asked.own_image(), own_bag(asked)).mean().item()
    assert reply.metrics["rank"] == pytest.approx(rank)
