"""The tower that looks at an image and at its mirror image."""

import torch

from finecap_ray.config import ScorerSettings, TowerSettings
from finecap_ray.scorers.images import CaptionedFeatures
from finecap_ray.scorers.scorer import load_scorer
from finecap_ray.scorers.tower import load_tower
from finecap_ray.scorers.train import train_scorer

SETTINGS = TowerSettings(model="tf_efficientnet_lite0_mirrored", image_size=64)


def test_an_image_and_its_mirror_image_are_one_to_it(plain_tower):
    tower = load_tower(SETTINGS)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = tower.model(images), tower.model(images.flip(3))
        both = plain_tower.model(images), plain_tower.model(images.flip(3))
    assert one.shape == (2, 1280) and tower.width == 1280
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, sum(both) / 2)
    assert (both[0] - both[1]).abs().max() > 0.01
    assert tower.digest != plain_tower.digest


def test_a_scorer_on_it_sees_images_as_their_features(emoji, tmp_path):
    tower = load_tower(SETTINGS)
    seen = CaptionedFeatures(tower.embed(emoji.images[:20]), emoji.captions[:20])
    train_scorer(ScorerSettings(epochs=1, batch_size=10), tower, seen, seen.rows(range(5)), tmp_path)
    scorer = load_scorer(tmp_path)
    torch.testing.assert_close(scorer.embed_images(emoji.images[:4]), scorer.project_features(seen.features[:4]))
