"""Every preset loads, adds up to steps, and is something that the trainer takes."""

from importlib import resources

import pytest

from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.cli import main
from finecap_ray.config import load_settings
from finecap_ray.rewards.combine import component_weights
from finecap_ray.settings_file import preset_names
from finecap_ray.training.loop import estimator
from finecap_ray.training.trainer import grpo_arguments

# What a recipe is, whatever our defaults: captions of an image, advantage, components of the reward.
PUBLISHED = {
    "discritune": (1, "running_mean", {"self_retrieval": 1}),
    "ndlb": (1, "running_mean", {"self_retrieval": 1}),
    "scst_cider": (5, "greedy", {"cider": 1}),
    "clip_reward": (5, "greedy", {"clip_score": 1}),
    "rloo": (8, "leave_one_out", {"self_retrieval": 1, "cider": 5, "ended": 0.1}),
    "grpo": (8, "group_normalised", {"self_retrieval": 1, "cider": 5, "ended": 0.1}),
    "dr_grpo": (8, "group_mean", {"self_retrieval": 1, "cider": 5, "ended": 0.1}),
}


def test_the_presets_that_a_user_may_ask_for_by_name():
    assert set(preset_names()) >= {*PUBLISHED, "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_keeps_its_reward_and_ends_with_its_last_weights(name):
    rl = load_settings(name).rl
    assert (rl.captions_per_image, rl.advantage, component_weights(rl.reward)) == PUBLISHED[name]
    assert rl.average_decay == rl.start_share == 0


@pytest.mark.parametrize("name", preset_names())
def test_a_dry_run_of_a_preset(name, tmp_path, capsys):
    settings, overrides = load_settings(name), [f"run_dir={tmp_path / 'run'}"]
    if settings.captioner.spec is not None:  # of a hub: its architecture in small
        save_tiny("qwen2_5_vl", tmp_path / "tiny")
        overrides.append(f"captioner.spec={tmp_path / 'tiny'}")
    with pytest.raises(SystemExit) as stop:
        main(["train", "rl", "--config", name, "--dry-run", *overrides])
    assert not stop.value.code
    out = capsys.readouterr().out
    rl = settings.rl
    assert f"name: {name}\n" in out
    for stage in rl.curriculum:
        bags = rl.images_per_step // stage.bag_size
        sequences = bags * stage.bag_size * rl.captions_per_image
        assert (
            f"{bags} bags x {stage.bag_size} images x {rl.captions_per_image} captions = {sequences} sequences per step"
            in out
        )


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_one_that_the_trainer_takes(name, tmp_path):
    settings = load_settings(name)
    assert component_weights(settings.rl.reward)
    assert estimator(settings.rl.advantage)
    arguments = grpo_arguments(settings.rl, str(tmp_path), 1, settings.captioner.max_tokens, use_gpu=False, seed=0)
    assert arguments.reward_weights == list(component_weights(settings.rl.reward).values())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_first_where_it_comes_from(name):
    text = (resources.files("finecap_ray") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
