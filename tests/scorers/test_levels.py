"""The tower that tells what its early levels saw."""

import pytest
import torch

from finecap_ray.config import TowerSettings
from finecap_ray.errors import ConfigError
from finecap_ray.scorers.levels import LevelPooled
from finecap_ray.scorers.tower import load_tower


@pytest.fixture
def plain(plain_tower):
    return plain_tower.model


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
