"""Samplers: real vLLM engines in Ray actors, and a captioner of random weights.

The order of the tests doesn't matter: each publishes weights of its own under a newer version.
"""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from finecap_ray.errors import StaleWeightsError
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.sampler import SamplerPool
from finecap_ray.sampling.seeds import caption_seed
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.sampling.weights import as_engine_holds, publish, stored

SPEC = SamplingSpec(captions_per_image=3, max_tokens=8)
IMAGES = 12


@pytest.fixture
def images(emoji):
    """(ids, features, seeds) of 12 images."""
    ids = emoji.image_ids[:IMAGES]
    return ids, emoji.features[:IMAGES], [caption_seed(0, 0, image_id) for image_id in ids]


@pytest.fixture
def published(samplers, versions, captioner):
    """The captioner's weights, published; (version, model, processor)."""
    model, processor = captioner
    version = next(versions)
    publish(samplers.board, version, model.state_dict(), timeout_s=60)
    return version, model, processor


def perturb(model, scale=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def trainer_logprobs(model, features, rollouts, captions_per_image, temperature):
    """log p of each rollout's tokens by the model itself: log softmax(logits / temperature)."""
    found = []
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        pixels = torch.from_numpy(features[[row // captions_per_image]].astype(np.float32))
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(rollout.prompt_token_ids) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0].numpy())
    return found


def contents(rollouts):
    """Captions per image and their tokens, in an order of their own."""
    return {(rollout.image_id, rollout.token_ids, rollout.logprobs) for rollout in rollouts}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_logprobs_are_those_of_the_trained_model_at_the_temperature_sampled_from(
    samplers, published, images, temperature
):
    version, model, _ = published
    ids, features, seeds = images
    spec = SamplingSpec(captions_per_image=3, max_tokens=8, temperature=temperature)
    rollouts = samplers.sample(version, ids, features, spec, seeds)
    expected = trainer_logprobs(model, features, rollouts, 3, temperature)
    for rollout, logprobs in zip(rollouts, expected, strict=True):
        assert rollout.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)
    # The test is about something: tokens are neither certain nor all alike.
    assert -6 < np.concatenate(expected).mean() < -0.05


def test_rollouts_say_what_they_are(samplers, published, images):
    version, model, processor = published
    ids, features, seeds = images
    rollouts = samplers.sample(version, ids, features, SPEC, seeds)
    assert [rollout.image_id for rollout in rollouts] == [image_id for image_id in ids for _ in range(3)]
    assert {rollout.weights_version for rollout in rollouts} == {version}
    end = processor.tokenizer.eos_token_id
    for rollout in rollouts:
        assert len(rollout.token_ids) == len(rollout.logprobs) <= SPEC.max_tokens
        assert (rollout.token_ids[-1] == end) == (rollout.finish_reason == "stop")
        assert end not in rollout.token_ids[:-1]
        # A byte-level vocabulary of random weights may stop inside a character: the engine leaves that one out.
        whole = processor.tokenizer.decode(rollout.token_ids, skip_special_tokens=True).rstrip("\ufffd")
        assert rollout.text.rstrip("\ufffd") == whole
        assert rollout.prompt_token_ids == (model.config.image_token_id,) * model.config.prefix_length


def test_a_version_that_nobody_published_is_refused(samplers, published, images):
    version, _, _ = published
    with pytest.raises(StaleWeightsError, match=f"captions of weights {version + 1} .* the board holds {version}"):
        samplers.sample(version + 1, *images[:2], SPEC, images[2])


def test_tied_weights_are_sent_once_and_a_transposed_view_is_no_copy_of_them(ray_session):
    weight = torch.arange(4.0).view(2, 2)
    sent = ray.get(stored({"in": weight, "out": weight, "turned": weight.T}))
    assert np.shares_memory(sent["in"].array, sent["out"].array)
    assert sent["turned"].tensor().tolist() == [[0, 2], [1, 3]] and sent["out"].tensor().tolist() == [[0, 1], [2, 3]]


def test_weights_travel_in_the_type_of_the_engine_and_what_runs_beside_it_as_it_trains(ray_session, captioner):
    model, _ = captioner
    weights = model.state_dict()
    held = as_engine_holds(weights, torch.bfloat16, "model.mapper.")
    sent = {name: own.tensor() for name, own in ray.get(stored(held)).items()}
    assert sent.keys() == weights.keys()
    kept = {name for name, tensor in sent.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in weights if name.startswith("model.mapper.")}
    for name, tensor in sent.items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype))
    # The output layer is the token embeddings, and is sent with them.
    assert held["lm_head.weight"] is held["model.language_model.wte.weight"]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says which files a process has mapped")
def test_a_sampler_keeps_nothing_of_the_file_that_its_architecture_came_from(samplers, published):
    """Mapped, a captioner's file counts as memory of the sampler, all of it."""
    version, _, _ = published
    samplers.sync(version)
    maps = samplers.samplers[0].__ray_call__.remote(lambda sampler: Path("/proc/self/maps").read_text())
    assert "model.safetensors" not in ray.get(maps, timeout=60)


def test_a_bfloat16_engine_samples_by_the_weights_it_is_sent(captioner, captioner_folder, resources, images, tmp_path):
    """Rounded where the trainer is; the mapper beside it is the trainer's to the last bit."""
    model, _ = captioner
    perturb(model)
    one = resources.model_copy(update={"samplers": 1, "sampler_dtype": "bfloat16"})
    pool = SamplerPool(str(captioner_folder), one, logs=str(tmp_path))
    try:
        assert pool.wait_until_ready() == "bfloat16"
        held = as_engine_holds(model.state_dict(), torch.bfloat16, "model.mapper.")
        pool.send(0, held)()
        rollouts = pool.sample(0, images[0], images[1], SPEC, images[2])
        (found,) = pool.fingerprints(0)()
        expected = fingerprints(held)
        assert found == {name: expected[name] for name in found} and any("mapper" in name for name in found)
        mapper = pool.samplers[0].__ray_call__.remote(lambda sampler: sampler.engine.beside.state_dict())
        for name, tensor in ray.get(mapper, timeout=60).items():
            assert torch.equal(tensor, model.state_dict()[f"model.mapper.{name}"])
    finally:
        pool.close()
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts])
    drift = np.abs(logprobs - np.concatenate(trainer_logprobs(model, images[1], rollouts, 3, 1.0)))
    assert 1e-5 < drift.mean() < 0.05


def test_weights_never_go_back(samplers, published):
    version, model, _ = published
    with pytest.raises(ValueError, match=f"weights {version} published after {version}"):
        publish(samplers.board, version, model.state_dict(), timeout_s=60)


def test_each_sync_brings_the_new_weights_and_a_restarted_sampler_has_them_before_its_first_caption(
    samplers, versions, captioner, images
):
    model, _ = captioner
    ids, features, seeds = images
    captions = {}
    for _ in range(2):
        perturb(model)
        version = next(versions)
        publish(samplers.board, version, model.state_dict(), timeout_s=60)
        captions[version] = contents(samplers.sample(version, ids, features, SPEC, seeds))
    old, new = captions.values()
    assert old.isdisjoint(new)

    restarted = samplers.samplers[1]
    ray.kill(restarted, no_restart=False)
    again = ray.get(restarted.sample.remote(version, ids, features, SPEC, seeds), timeout=120)
    assert {rollout.weights_version for rollout in again} == {version}
    # An engine that reloaded twice and one that began with these weights: the same captions, to the last bit.
    assert contents(again) == new
    # And they are those of the weights published last.
    expected = trainer_logprobs(model, features, again, SPEC.captions_per_image, 1.0)
    for rollout, logprobs in zip(again, expected, strict=True):
        assert rollout.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_a_caption_does_not_depend_on_its_sampler_nor_its_neighbours(samplers, published, images):
    version, _, _ = published
    ids, features, seeds = images

    def sample(pool_or_actor, rows):
        arguments = (version, [ids[row] for row in rows], features[rows], SPEC, [seeds[row] for row in rows])
        if pool_or_actor is samplers:
            return samplers.sample(*arguments)
        return ray.get(pool_or_actor.sample.remote(*arguments), timeout=120)

    def texts(rollouts):
        return sorted((rollout.image_id, rollout.token_ids) for rollout in rollouts)

    every, half = list(range(IMAGES)), IMAGES // 2
    first, second = samplers.samplers
    over_two = texts(sample(samplers, every))
    assert texts(sample(first, every)) == over_two
    assert texts(sample(second, every[:half]) + sample(first, every[half:])) == over_two
    assert texts(sample(first, every[::-1])) == over_two
    assert texts([rollout for row in every for rollout in sample(second, [row])]) == over_two
    assert len(set(over_two)) > 2 * IMAGES  # the captions of an image differ


def test_the_policy_has_no_word_for_the_image_placeholder(samplers, versions, captioner, images):
    model, processor = captioner
    placeholder = model.config.image_token_id
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == placeholder
    assert model.lm_head.out_features == model.config.text_config.vocab_size == placeholder
    # A policy that knows nothing, at the highest temperature: every token is as likely, and 12 images x 40 captions x
    # up to 8 tokens are some 9 of each of the 400 (p of none of one: e^-9).
    with torch.no_grad():
        model.lm_head.weight.zero_()
    version = next(versions)
    publish(samplers.board, version, model.state_dict(), timeout_s=60)
    hot = SamplingSpec(captions_per_image=40, max_tokens=8, temperature=2.0)
    tokens = {token for rollout in samplers.sample(version, *images[:2], hot, images[2]) for token in rollout.token_ids}
    assert max(tokens) < placeholder
    assert len(tokens) > 0.9 * placeholder
