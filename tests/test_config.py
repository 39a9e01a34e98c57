"""Settings: an unknown key names the nearest one, overrides are typed, and what is dumped loads again."""

import pytest

from finecap_ray.config import Settings, dump_settings, load_settings
from finecap_ray.errors import ConfigError
from finecap_ray.settings_file import preset_names, read_tree


def settings_file(folder, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_round_trips(name, tmp_path):
    settings = load_settings(name)
    assert load_settings(settings_file(tmp_path, dump_settings(settings))) == settings


def test_there_is_a_demo_preset():
    assert "demo" in preset_names()


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_settings(settings_file(tmp_path, "")) == Settings()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rl.learning_rat=1e-4", "rl.learning_rate"),
        ("rl.reward.sope=batch", "rl.reward.scope"),
        ("sede=3", "seed"),
        ("scorer.epoch=3", "scorer.epochs"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override, nearest):
    with pytest.raises(ConfigError, match=f"unknown setting '{override.partition('=')[0]}'.*'{nearest}'"):
        load_settings("demo", [override])


def test_an_unknown_key_in_a_file_names_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match=r"'evaluation\.bagsize'.*'evaluation\.bag_size'"):
        load_settings(settings_file(tmp_path, "evaluation: {bagsize: 3}"))


def test_all_wrong_keys_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_settings("demo", ["rl.temprature=1", "mle.epoch=1"])
    assert "'rl.temprature'" in str(error.value) and "'mle.epoch'" in str(error.value)


def test_one_caption_per_image_needs_an_advantage_that_compares_it_with_others():
    with pytest.raises(ConfigError, match=r"advantage group_normalised compares the captions of an image.* is 1"):
        load_settings("demo", ["rl.captions_per_image=1"])
    assert load_settings("demo", ["rl.captions_per_image=1", "rl.advantage=running_mean"]).rl.captions_per_image == 1


def test_overrides_are_typed_and_the_last_one_wins():
    settings = load_settings(
        "demo", ["seed=3", "seed=4", "rl.learning_rate=1e-4", "scorer.spec=ViT-B-32/openai", "rl.max_steps=null"]
    )
    assert (settings.seed, settings.rl.learning_rate) == (4, 1e-4)
    assert (settings.scorer.spec, settings.rl.max_steps) == ("ViT-B-32/openai", None)


def test_an_override_of_a_list_of_stages():
    settings = load_settings("demo", ["bags.sizes=[2, 4]", "rl.curriculum=[{bag_size: 4, epochs: 2}]"])
    assert [(stage.bag_size, stage.epochs) for stage in settings.rl.curriculum] == [(4, 2)]


def test_an_override_keeps_the_rest_of_its_section():
    changed = load_settings("demo", ["rl.temperature=0.7"])
    assert (
        changed.rl.model_copy(update={"temperature": load_settings("demo").rl.temperature}) == load_settings("demo").rl
    )


def test_an_override_leaves_the_judge_another_scorer_than_the_rewards():
    settings = load_settings("demo", ["judge.epochs=1"])
    assert (settings.judge.text, settings.judge.half) != (settings.scorer.text, settings.scorer.half)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.images_per_step", "has no '='"),
        ("name.x=1", "name is a value, not a section"),
        ("rl.images_per_step=1", r"rl\.images_per_step: .*greater than or equal to 2, got 1"),
        ("rl.advantage=best", r"rl\.advantage: .*'leave_one_out'.*got 'best'"),
        ("rl.learning_rate=fast", r"rl\.learning_rate: .*got 'fast'"),
        ("run_dir=s3://bucket/run", "run_dir: a run folder is a path, on a file system that all nodes share"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override, message):
    with pytest.raises(ConfigError, match=message):
        load_settings("demo", [override])


@pytest.mark.parametrize(
    "change", ["bags.sizes=[1, 2]", "evaluation.more_bag_sizes=[1]", "bags.max_bags_per_image=0", "seed=-1"]
)
def test_what_would_fail_hours_later_is_refused_at_once(change):
    with pytest.raises(ConfigError, match="greater than or equal to"):
        load_settings("demo", [change])


def test_nothing_is_evaluated_on_what_training_sees():
    with pytest.raises(ConfigError, match="the split `train` is what training sees"):
        load_settings("demo", ["evaluation.groups={all: train}"])


def test_a_curriculum_whose_bag_sizes_are_not_built_is_refused():
    with pytest.raises(ConfigError, match=r"uses bags of \[7\], bags\.sizes builds \[2, 3, 5\]"):
        load_settings("demo", ["bags.sizes=[2, 3, 5]", "rl.curriculum=[{bag_size: 7, epochs: 1}]"])


@pytest.mark.parametrize(
    ("overrides", "gpus", "asked"),
    [
        ([], 0, "1 CPU"),
        (["resources.use_gpu=true"], 1, "1 CPU and 1 GPU"),
        (["resources.use_gpu=true", "resources.gpu_share=0.3"], 0.3, "1 CPU and 0.3 GPU"),
    ],
)
def test_a_process_takes_its_share_of_a_gpu(overrides, gpus, asked):
    resources = load_settings("demo", overrides).resources
    assert (resources.gpus, resources.asked) == (gpus, asked)
    # Where nothing is said of its cache, vLLM takes what a GPU has, and of a CPU's memory 1 GiB.
    assert resources.kv_cache_bytes == (None if gpus else 2**30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rl: [", "isn't valid YAML"),
        ("rl: {}\nseed: 1\nrl: {}", "'rl' comes twice"),
        ("- a\n- b", "found a list"),
        ("rl: 3", "rl: "),
    ],
)
def test_a_file_that_is_not_a_tree_of_settings_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_settings(settings_file(tmp_path, text))


def test_a_section_may_be_merged_into_another_and_change_it(tmp_path):
    text = "rl: &rl {seed: 1, steps: 2}\ndeep: {inner: &inner {<<: *rl, seed: 3}}\nmore: {<<: *inner, steps: 4}"
    tree = read_tree(settings_file(tmp_path, text))
    assert tree["deep"]["inner"] == {"seed": 3, "steps": 2} and tree["more"] == {"seed": 3, "steps": 4}


def test_a_missing_file_and_a_mistyped_preset_name_the_presets():
    with pytest.raises(ConfigError, match=r"no config file nowhere\.yaml.*demo"):
        load_settings("nowhere.yaml")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_settings("dmeo")


def test_settings_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load_settings("demo").seed = 5


def test_the_home_folder_in_what_names_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["captioner.spec", "captioner.decoder", "scorer.spec", "judge.spec", "tower.weights"]
    settings = load_settings("demo", [f"{name}=~/models/x" for name in names])
    found = {settings.captioner.spec, settings.captioner.decoder, settings.scorer.spec, settings.judge.spec}
    assert found | {settings.tower.weights} == {str(tmp_path / "models" / "x")}
    assert load_settings("demo", ["scorer.spec=ViT-B-32/openai"]).scorer.spec == "ViT-B-32/openai"
