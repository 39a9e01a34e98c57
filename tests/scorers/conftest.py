"""The image tower of the scorers' tests."""

import pytest

from finecap_ray.config import TowerSettings
from finecap_ray.scorers.tower import load_tower


@pytest.fixture(scope="session")
def plain_tower():
    return load_tower(TowerSettings(model="tf_efficientnet_lite0", image_size=64))
