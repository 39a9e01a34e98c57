"""The tower that tells what its early levels saw, and the layer that takes its features as they are."""

import pytest
import torch
from torch import nn

from finecap_ray.config import TowerSettings
from finecap_ray.errors import ConfigError
from finecap_ray.scorers.levels import LevelPooled
from finecap_ray.scorers.tower import load_tower
from finecap_ray.scorers.train import _fold_standardisation


@pytest.fixture(scope="module")
def plain():
    return load_tower(TowerSettings(model="tf_efficientnet_lite0", image_size=64)).model


def test_the_features_are_the_statistics_of_every_level_and_the_pooled_output(plain):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, pooled = LevelPooled(plain)(images), plain(images)
    # mean and deviation of the 3 + 16 + 24 + 40 + 112 + 320 channels of image and levels, and the 1280 pooled features
    assert features.shape == (2, 2 * (3 + 16 + 24 + 40 + 112 + 320) + 1280)
    torch.testing.assert_close(features[:, :3], images.mean(dim=(2, 3)))
    torch.testing.assert_close(features[:, 3:6], images.flatten(2).std(dim=2, correction=0))
    torch.testing.assert_close(features[:, -1280:], pooled)


def test_an_image_of_one_colour_has_its_colour_as_mean_and_no_deviation(plain):
    colour = torch.tensor([0.25, -0.5, 1.0])
    with torch.no_grad():
        features = LevelPooled(plain)(colour[None, :, None, None].expand(1, 3, 64, 64))
    torch.testing.assert_close(features[0, :6], torch.cat([colour, torch.zeros(3)]), atol=1e-6, rtol=0)


def test_there_is_no_other_pooling(plain):
    with pytest.raises(ValueError, match="no pooling 'max'"):
        LevelPooled(plain).reset_classifier(0, global_pool="max")


def test_the_package_holds_one_tower():
    with pytest.raises(ConfigError, match="holds tf_efficientnet_lite0 only"):
        load_tower(TowerSettings(model="resnet18"))


def test_a_layer_trained_on_standardised_features_takes_them_as_they_are():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.fill_(5.0)
    mean, deviation = torch.tensor([10.0, 20.0]), torch.tensor([2.0, 0.5])
    _fold_standardisation(layer, mean, deviation)
    # 3 (12 - 10) / 2 + 4 (21 - 20) / 0.5 + 5 = 3 + 8 + 5
    assert layer(torch.tensor([12.0, 21.0])).item() == pytest.approx(16.0)
