from finecap_ray.config import load_settings
from finecap_ray.report.settings_diff import Change, settings_diff


def test_a_run_differs_from_the_preset_of_its_name():
    assert settings_diff(load_settings("demo", ["run_dir=elsewhere"])).changes == ()
    diff = settings_diff(load_settings("demo", ["rl.temperature=0.5", "bags.sizes=[2, 3, 5]", "rl.max_steps=7"]))
    base = load_settings("demo")
    assert diff.base == "preset demo"
    assert Change("rl.temperature", "0.5", str(base.rl.temperature)) in diff.changes
    assert {change.key for change in diff.changes} == {"rl.temperature", "bags.sizes", "rl.max_steps"} - (
        {"bags.sizes"} if base.bags.sizes == (2, 3, 5) else set()
    )


def test_a_run_of_another_name_differs_from_the_defaults():
    diff = settings_diff(load_settings("demo", ["name=mine"]))
    assert diff.base == "the defaults"
    assert any(change.key == "rl.curriculum" and "bag_size 3 epochs 1" in change.value for change in diff.changes)
