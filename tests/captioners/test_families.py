"""Image-text models in the sampler and in the trainer: the same prompts, weights and log-probs, for every family.

Real vLLM engines, tiny models of random weights, pictures of different sizes and shapes.
"""

import io
from dataclasses import replace

import pytest
import torch
from PIL import ImageOps

from finecap_ray.captioners import family_of, load_captioner
from finecap_ray.captioners.family import training_batch
from finecap_ray.errors import MismatchError
from finecap_ray.images import decode_image
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.sampling.weights import publish
from finecap_ray.training.guards import caption_logits, check_captions, token_drift

SPEC = SamplingSpec(captions_per_image=3, max_tokens=8)
# Nats: what rounding in float32 makes of the log-prob of a single token (see tests/training/test_trainer.py).
LARGEST = 3e-5


@pytest.fixture
def loaded(vlm):
    """Model, processor and family, new for each test: it may change the weights."""
    model, processor = load_captioner(vlm.folder)
    return model, family_of(model.config, processor)


@pytest.fixture
def sample(vlm, versions):
    """A function: weights are published, and the pictures captioned with them, together or one by one."""

    def go(model, family, spec=SPEC, together=4, images=vlm.images):
        version = next(versions)
        publish(vlm.samplers.board, version, model.state_dict(), timeout_s=120)
        rollouts = []
        for start in range(0, len(images), together):
            own = images[start : start + together]
            names, seeds = [image.image_id for image in own], range(start, start + len(own))
            rollouts += vlm.samplers.sample(version, names, family.images_of(own), spec, seeds)
        return rollouts

    return go


def largest_drift(model, images, rollouts, temperature=1.0):
    """Of any token, in nats."""
    return max(
        token_drift(caption_logits(model, images, row // SPEC.captions_per_image, rollout), rollout, temperature).max()
        for row, rollout in enumerate(rollouts)
    )


def inverted(images):
    """Pictures of the same sizes, in other colours."""
    found = []
    for image in images:
        file = io.BytesIO()
        ImageOps.invert(decode_image(image.image)).save(file, "PNG")
        found.append(replace(image, image=file.getvalue()))
    return found


def perturb(parameters, scale):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampler_s_log_probs_are_the_trainer_s(vlm, loaded, sample, temperature):
    model, family = loaded
    spec = SamplingSpec(SPEC.captions_per_image, SPEC.max_tokens, temperature)
    rollouts = sample(model, family, spec)
    assert len({rollout.token_ids for rollout in rollouts}) > len(vlm.images)
    images = family.read(vlm.images, "cpu")
    assert largest_drift(model, images, rollouts, temperature) <= LARGEST / temperature
    # Of another temperature, or of other pictures, they aren't.
    assert largest_drift(model, images, rollouts, temperature / 2) > 0.1
    assert largest_drift(model, family.read(inverted(vlm.images), "cpu"), rollouts, temperature) > 0.01


def test_every_weight_reaches_the_sampler_under_its_name(vlm, loaded, sample):
    """Each moves in its own way, so that one that didn't arrive would show. None is left out, and none made up."""
    model, family = loaded
    names = family.engine_names(model)
    assert set(names) == set(model.state_dict())
    images = family.read(vlm.images, "cpu")
    before = sample(model, family)
    perturb(model.parameters(), 0.05)
    assert largest_drift(model, images, before) > 0.01  # the captions of the old weights are not the new ones'
    assert largest_drift(model, images, sample(model, family)) <= LARGEST


@pytest.mark.parametrize("part", ["vision", "mapper", "decoder"])
def test_the_weights_of_each_part_change_what_the_sampler_says(vlm, loaded, sample, part):
    model, family = loaded
    parameters = [one for name, one in model.named_parameters() if family.part_of(name) == part]
    assert parameters
    before = sample(model, family)
    perturb(parameters, 0.1)
    after = sample(model, family)
    assert [one.logprobs[0] for one in after] != [one.logprobs[0] for one in before]
    assert largest_drift(model, family.read(vlm.images, "cpu"), after) <= LARGEST


def test_prompts_hold_the_trainer_s_image_tokens_and_captions_none(vlm, loaded, sample):
    model, family = loaded
    images = family.read(vlm.images, "cpu")
    counts = [prompt.count(family.image_token_id) for prompt in images.prompts]
    assert min(counts) > 1 and len(set(counts)) > 1  # sizes differ, and so do the prompts
    # A policy that wants nothing but image tokens and the like.
    with torch.no_grad():
        model.get_output_embeddings().weight[list(family.banned_token_ids)] *= 50
    assert family.image_token_id in family.banned_token_ids
    rollouts = sample(model, family)
    names = [image.image_id for image in vlm.images]
    expected = (images.prompts, family.image_token_id, family.banned_token_ids)
    check_captions(rollouts, names, SPEC.captions_per_image, *expected)
    assert largest_drift(model, images, rollouts) <= LARGEST
    with pytest.raises(MismatchError, match="'picture 0' came with a prompt of"):
        check_captions(rollouts, names, SPEC.captions_per_image, images.prompts[::-1], *expected[1:])


def test_captions_do_not_depend_on_how_many_are_asked_for_at_once(loaded, sample):
    """128 prompts hold more tokens than vLLM takes in a step (4,096 on a CPU)."""
    spec = SamplingSpec(captions_per_image=32, max_tokens=4)
    together, alone = sample(*loaded, spec), sample(*loaded, spec, together=1)
    assert sum(len(rollout.prompt_token_ids) for rollout in together) > 4096
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_more_images_than_lie_in_the_engine_at_once_keep_their_order(vlm, loaded, sample):
    greedy = SamplingSpec(captions_per_image=1, max_tokens=4, temperature=0.0)
    few, many = (sample(*loaded, greedy, together=70, images=vlm.images[:2] * pairs) for pairs in (1, 35))
    assert [(one.image_id, one.token_ids) for one in many] == [(one.image_id, one.token_ids) for one in few] * 35


def test_captions_of_one_prompt_have_the_loss_and_gradients_of_captions_with_a_prompt_each(vlm, loaded):
    """Captions of 5, 3 and 4 tokens, of pictures 1, 0 and 1: the prompts are read once per picture."""
    model, family = loaded
    model.train()
    images = family.read(vlm.images[:2], "cpu")
    captions, image_of_caption = [[40, 41, 42, 43, 44], [45, 46, 47], [48, 49, 50, 51]], [1, 0, 1]
    one_by_one = 0.0
    for tokens, image in zip(captions, image_of_caption, strict=True):
        logits = model(**images.alone(image, tokens)).logits[0, len(images.prompts[image]) - 1 : -1]
        one_by_one += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="sum") / 12
    one_by_one.backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    loss = model(**training_batch(images, image_of_caption, captions, pad=0)).loss
    loss.backward()
    assert loss.item() == pytest.approx(one_by_one.item(), rel=1e-5)
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name
