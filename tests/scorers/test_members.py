"""Ensembles of heads: what a member is, that members learn apart, and that the whole is one plain open_clip model."""

import pytest
import torch
from safetensors.torch import load_file

from finecap_ray.config import JudgeSettings, ScorerSettings
from finecap_ray.scorers.images import CaptionedFeatures
from finecap_ray.scorers.members import split_heads
from finecap_ray.scorers.scorer import WEIGHTS_FILE, load_scorer
from finecap_ray.scorers.train import _build, train_scorer

SETTINGS = ScorerSettings(members=3, embed_dim=24, epochs=2, batch_size=10)


@pytest.fixture
def heads(plain_tower):
    model = _build(SETTINGS, plain_tower)[0]
    return model.visual.head, model.text.proj


def test_the_wide_heads_are_the_members_side_by_side(heads):
    image, text = heads
    members = split_heads(image, text, 3)
    features, pooled = torch.randn(5, 1280), torch.randn(4, 384)
    torch.testing.assert_close(image(features), torch.cat([member.image(features) for member in members], dim=1))
    torch.testing.assert_close(text(pooled), torch.cat([member.text(pooled) for member in members], dim=1))


def test_a_member_learns_by_its_own_weights_alone(heads):
    image, text = heads
    _, second, _ = split_heads(image, text, 3)
    second.image(torch.randn(5, 1280)).sum().backward()
    assert image.mlp.fc2.weight.grad[8:16, 16:32].abs().min() > 0
    assert image.mlp.fc2.weight.grad.count_nonzero() == 8 * 16
    assert image.mlp.fc1.weight.grad[16:32].abs().sum() > 0
    assert image.mlp.fc1.weight.grad.count_nonzero() <= 16 * 1280


def test_a_trained_ensemble_is_a_plain_scorer_whose_members_stayed_apart(plain_tower, emoji, tmp_path):
    seen = CaptionedFeatures(plain_tower.embed(emoji.images[:30]), emoji.captions[:30])
    facts = train_scorer(SETTINGS, plain_tower, seen.rows(range(20)), seen.rows(range(20, 30)), tmp_path)
    assert 0 <= facts["recall_at_1_of_all"] <= 1
    weights = load_file(tmp_path / WEIGHTS_FILE)
    hidden = {"visual.head.mlp.fc2.weight": 48, "text.proj.2.weight": (384 + 24) // 2}
    for name, width in hidden.items():
        blocks = torch.block_diag(*[torch.ones(8, width // 3)] * 3)
        assert torch.equal(weights[name] != 0, blocks.bool())
    scorer = load_scorer(tmp_path)
    assert scorer.digest == facts["digest"]
    torch.testing.assert_close(scorer.embed_texts(["a red apple"]).norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        (ScorerSettings, {"members": 3, "embed_dim": 256}, "can't be divided among 3 members"),
        (ScorerSettings, {"members": 2, "text_layers": 1}, "is for frozen towers"),
        (ScorerSettings, {"members": 2, "image_groups": 1}, "is for frozen towers"),
        (JudgeSettings, {"members": 2}, "name a pretrained text tower"),
    ],
)
def test_members_need_room_and_frozen_towers(settings, changes, says):
    with pytest.raises(ValueError, match=says):
        settings(**changes)
