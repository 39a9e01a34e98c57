"""Scorers whose towers train in part or whole, or whose head sees the tower's last map: EfficientNet-lite0 on a few images."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from finecap_ray.config import JudgeSettings, ScorerSettings, TowerSettings
from finecap_ray.errors import ConfigError
from finecap_ray.scorers.images import CaptionedFeatures, ImageTable, fold_standardisation
from finecap_ray.scorers.scorer import WEIGHTS_FILE, load_scorer
from finecap_ray.scorers.tower import FrozenTower, check_tower, check_trained_tower, load_tower
from finecap_ray.scorers.train import _build, train_scorer

SIZES = {"epochs": 2, "batch_size": 10, "embed_dim": 32, "tower_learning_rate": 1e-3}
KINDS = {
    "spatial": ScorerSettings(pooling="spatial", **SIZES),
    "last blocks": ScorerSettings(image_groups=2, **SIZES),
    "whole, spatial, and two layers of text": ScorerSettings(
        image_groups=99, text_layers=2, pooling="spatial", **SIZES
    ),
    "all of the text tower": ScorerSettings(text_layers=7, **SIZES),
    "text from scratch": JudgeSettings(image_groups=1, **SIZES),
}


@pytest.fixture(scope="module")
def seen(plain_tower, emoji):
    return CaptionedFeatures(plain_tower.embed(emoji.images[:30]), emoji.captions[:30], emoji.images[:30])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_meant_to_train_trains_and_the_saved_scorer_is_the_trained_one(kind, plain_tower, seen, tmp_path):
    settings = KINDS[kind]
    torch.manual_seed(settings.seed)
    before = _build(settings, plain_tower)[0]
    meant = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    facts = train_scorer(settings, plain_tower, seen.rows(range(20)), seen.rows(range(20, 30)), tmp_path)
    after = load_file(tmp_path / WEIGHTS_FILE)
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(after[name], tensor)}
    assert changed == meant
    trunk = [name for name in meant if name.startswith("visual.trunk.")]
    text = [name for name in meant if name.startswith("text.transformer.")]
    # From scratch the text tower's transformer is always meant to train.
    assert bool(trunk) == bool(settings.image_groups)
    assert bool(text) == (settings.text == "scratch" or settings.text_layers > 0)
    assert facts["tower_digest"] == ("" if settings.looks_at_images else plain_tower.digest)
    assert 0 <= facts["recall_at_1_of_all"] <= 1
    scorer = load_scorer(tmp_path)
    assert scorer.made_here and scorer.digest == facts["digest"]
    torch.testing.assert_close(scorer.embed_images(list(seen.images[:4])).norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("pooling", ["pooled", "spatial"])
def test_the_head_takes_over_the_standardisation(pooling, plain_tower, seen):
    settings = ScorerSettings(pooling=pooling, **SIZES)
    visual = _build(settings, plain_tower)[0].visual.eval()
    table = ImageTable(visual, plain_tower, settings, seen)
    features, standard = table.seen(torch.arange(6)), table.standard()
    assert features.shape[1:] == ((1280,) if pooling == "pooled" else (1280, 2, 2))
    with torch.no_grad():
        expected = visual.head(standard(features))
        fold_standardisation(visual.head, standard)
        torch.testing.assert_close(visual.head(features), expected, atol=1e-4, rtol=1e-4)


def test_a_map_that_is_cached_is_the_one_of_the_image(plain_tower, seen):
    cached = ScorerSettings(pooling="spatial", **SIZES)
    visual = _build(cached, plain_tower)[0].visual.eval()
    live = cached.model_copy(update={"image_groups": 1})
    one, other = (ImageTable(visual, plain_tower, own, seen).seen(torch.tensor([3, 1])) for own in (cached, live))
    torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)  # kept as float16


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tf_efficientnet_lite0_levels", {"pooling": "spatial"}, r"doesn't end in a map: take tf_efficientnet_lite0$"),
        ("tf_efficientnet_lite0_levels", {"image_groups": 1}, r"has no groups: take tf_efficientnet_lite0$"),
        ("vit_tiny_patch16_224", {"pooling": "spatial"}, r"tower.model=vit_tiny_patch16_224 doesn't end in a map$"),
    ],
)
def test_a_tower_without_a_map_or_groups_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_trained_tower(TowerSettings(model=model), ScorerSettings(**changes), "scorer")
    check_trained_tower(TowerSettings(model="tf_efficientnet_lite0"), ScorerSettings(**changes), "scorer")


def test_text_layers_are_those_of_a_pretrained_tower():
    with pytest.raises(ValueError, match="text_layers=1 is for text=minilm or smollm2"):
        JudgeSettings(text_layers=1)


def test_without_dev_images_a_scorer_is_trained_and_has_no_warrant(plain_tower, seen, tmp_path):
    for pooling in ("pooled", "spatial"):
        settings = ScorerSettings(pooling=pooling, **SIZES)
        facts = train_scorer(settings, plain_tower, seen.rows(range(20)), seen.rows([]), tmp_path / pooling)
        assert facts["images"] == 20 and not any(name.startswith("recall") for name in facts)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Settings of a tower that pools by its class token, with weights that timm saved beside a classifier."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    return TowerSettings(model="test_vit", weights=str(file), image_size=160)


def test_a_scorer_sees_of_images_what_it_saw_of_features_whatever_its_tower_pools(vit, emoji, tmp_path):
    check_tower(vit)
    tower = load_tower(vit)
    features = CaptionedFeatures(tower.embed(emoji.images[:12]), emoji.captions[:12])
    train_scorer(ScorerSettings(**SIZES), tower, features, features.rows([]), tmp_path)
    scorer = load_scorer(tmp_path)
    torch.testing.assert_close(
        scorer.embed_images(emoji.images[:12]), scorer.project_features(features.features), atol=1e-5, rtol=1e-4
    )


def test_a_tower_sees_images_as_it_was_trained_to(vit, plain_tower):
    expected = timm.create_model("resnet18", pretrained=False).default_cfg
    assert expected["mean"] != plain_tower.mean == (0.5, 0.5, 0.5)
    tower = FrozenTower("resnet18", timm.create_model("resnet18", pretrained=False, num_classes=0), 64)
    assert (tower.mean, tower.std) == (expected["mean"], expected["std"])
    assert tower.preprocess.transforms[-1].mean == expected["mean"]


def test_weights_of_another_tower_are_refused(vit, tmp_path):
    with pytest.raises(ConfigError, match=r"doesn't hold tower\.model=resnet18: \d+ of \d+ weights are absent"):
        check_tower(vit.model_copy(update={"model": "resnet18"}))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        check_tower(vit.model_copy(update={"weights": str(tmp_path / "text.safetensors")}))
