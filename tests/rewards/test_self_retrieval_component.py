"""Self-retrieval as a component: its kinds, its scopes, and closed forms that a person can check."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from finecap_ray.errors import DataError
from finecap_ray.records import ImageBank
from finecap_ray.rewards.hard_negatives import HardNegatives
from finecap_ray.rewards.self_retrieval import SelfRetrieval

# Two captions and three images on the axes of a plane: cosines are (1, 0, -1) and (0, 1, 0).
TEXT = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
IMAGES = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]


def unit(rows, width, seed):
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def component(kind="logprob", scope="bag", logit_scale=2.0, negatives=None):
    return SelfRetrieval(kind, scope, logit_scale, negatives)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
@pytest.mark.parametrize("scale", [1.0, 15.5, 100.0])
def test_n_orthonormal_images_at_scale_s(step, n, scale):
    """Every caption is its image: log(e^s / (e^s + n - 1)) = -log(1 + (n - 1) e^-s)."""
    rewards = component(logit_scale=scale)(step(["x"] * n, range(n), torch.eye(n)), torch.eye(n))
    assert rewards.dtype == np.float32
    assert rewards.tolist() == pytest.approx([-math.log1p((n - 1) * math.exp(-scale))] * n, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_n_equal_images_share(step, n):
    """-log n, whatever the caption and the scale."""
    images = unit(1, 32, seed=0).expand(n, -1)
    rewards = component(logit_scale=100.0)(step(["x"] * n, range(n), images), unit(n, 32, seed=1))
    assert rewards.tolist() == pytest.approx([-math.log(n)] * n, abs=1e-6)
    assert component("accuracy")(step(["x"] * n, range(n), images), unit(n, 32, seed=1)) == pytest.approx(1 / n)


def test_the_kinds_by_hand(step):
    request = step(["a", "b"], [0, 2], IMAGES)
    p = [math.exp(2) / (math.exp(2) + 1 + math.exp(-2)), 1 / (1 + math.exp(2) + 1)]
    assert component("probability")(request, TEXT).tolist() == pytest.approx(p)
    assert component("logprob")(request, TEXT).tolist() == pytest.approx([math.log(one) for one in p])
    assert component("accuracy")(request, TEXT).tolist() == [1, 0]
    assert component("similarity")(request, TEXT).tolist() == [1, 0]


def test_scope_bag_and_scope_batch(step):
    request = step(["a", "b"], [0, 2], IMAGES, bags=[0, 0, 1])
    # bag: caption 0 against images 0 and 1; caption 1 alone with image 2
    assert component(scope="bag")(request, TEXT).tolist() == pytest.approx([-math.log1p(math.exp(-2)), 0])
    whole = component(scope="bag")(replace(request, bag_of_image=np.zeros(3, dtype=int)), TEXT)
    assert component(scope="batch")(request, TEXT).tolist() == whole.tolist()


@pytest.fixture
def many(step):
    """12 images in bags of 3 with 2 captions each: (request, text)."""
    target = np.arange(12).repeat(2)
    request = step([f"caption {row}" for row in range(24)], target, unit(12, 16, seed=0), bags=np.arange(12) // 3)
    return request, unit(24, 16, seed=1)


@pytest.fixture(params=["bag", "batch", "bag and hard negatives"])
def any_component(request):
    bank = ImageBank([f"image-{row}" for row in range(30)], torch.cat([unit(12, 16, seed=0), unit(18, 16, seed=2)]))
    bank = replace(bank, embeddings=bank.embeddings.numpy().astype(np.float16))
    negatives = HardNegatives(bank, 4) if "negatives" in request.param else None
    return component(scope=request.param.split()[0], logit_scale=20.0, negatives=negatives)


def test_permuted_captions_have_permuted_rewards(many, any_component):
    request, text = many
    order = np.random.default_rng(0).permutation(24)
    assert any_component(request.captions(order), text[order]) == pytest.approx(
        any_component(request, text)[order], abs=1e-5
    )


def test_permuted_bags_have_permuted_rewards(many, any_component):
    request, text = many
    bags = np.random.default_rng(1).permutation(4)
    images = np.concatenate([np.arange(3) + 3 * bag for bag in bags])  # where the image of a place comes from
    place = np.argsort(images)
    moved = replace(
        request,
        target=place[request.target],
        image_ids=[request.image_ids[row] for row in images],
        embeddings=request.embeddings[images],
        bag_of_image=np.arange(12) // 3,
    )
    assert any_component(moved, text) == pytest.approx(any_component(request, text), abs=1e-5)


def test_a_batch_equals_one_by_one(many, any_component):
    request, text = many
    together = any_component(request, text)
    alone = [any_component(request.captions(np.array([row])), text[[row]])[0] for row in range(24)]
    assert together == pytest.approx(alone, abs=1e-5)
    if any_component.scope == "bag":  # nor does a bag need the others
        bags = [
            any_component(
                replace(
                    request.captions(np.arange(6) + 6 * bag),
                    target=np.arange(3).repeat(2),
                    image_ids=request.image_ids[3 * bag : 3 * bag + 3],
                    embeddings=request.embeddings[3 * bag : 3 * bag + 3],
                    bag_of_image=np.zeros(3, dtype=int),
                ),
                text[6 * bag : 6 * bag + 6],
            )
            for bag in range(4)
        ]
        assert together == pytest.approx(np.concatenate(bags), abs=1e-5)


# Four bank images: the own one (cosine 1), one at 0.8, one at 0.6, and the opposite.
BANK = ImageBank(["image-0", "near", "next", "far"], np.array([[1, 0], [0.8, 0.6], [0.6, -0.8], [-1, 0]], np.float16))


def test_the_nearest_of_the_bank_compete_as_well(step):
    request, text = step(["a"], [0], [[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    # in the bag: cosines 1 and 0; from the bank, without the own image, which competes already: 0.8, then 0.6
    one = component(negatives=HardNegatives(BANK, 1))(request, text)
    assert one.tolist() == pytest.approx([2 - math.log(math.exp(2) + 1 + math.exp(1.6))], abs=1e-3)
    two = component(negatives=HardNegatives(BANK, 2))(request, text)
    assert two.tolist() == pytest.approx([2 - math.log(math.exp(2) + 1 + math.exp(1.6) + math.exp(1.2))], abs=1e-3)


def test_negatives_of_one_image_do_not_compete_for_another(step):
    images = [[1.0, 0.0], [-1.0, 0.0]]
    request = replace(step(["a", "b"], [0, 1], images, bags=[0, 1]), image_ids=["image-0", "new"])
    rewards = component(negatives=HardNegatives(BANK, 1))(request, torch.tensor(images))
    # image-0 against `near` (0.8); the other against `far`, which is its equal
    assert rewards.tolist() == pytest.approx([-math.log1p(math.exp(-0.4)), -math.log(2)], abs=1e-3)


def test_a_bank_that_is_too_small_is_refused_with_the_numbers(step):
    with pytest.raises(DataError, match=r"asks for 4 images beside the own one, and the bank holds 4"):
        HardNegatives(BANK, 4)
    request = replace(step(["a"], [0], [[1.0, 0.0], [0.8, 0.6]]), image_ids=["image-0", "near"])
    with pytest.raises(DataError, match=r"bank of 4 images has fewer than rl.reward.hard_negatives 3"):
        component(negatives=HardNegatives(BANK, 3))(request, torch.tensor([[1.0, 0.0]]))
