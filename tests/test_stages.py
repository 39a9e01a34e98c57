"""A stage is done once per digest of its inputs, and an interrupted one goes on from what is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finecap_ray.errors import DataError
from finecap_ray.stages import STAGE_FILE, Stages

OTHER = """
import sys
from finecap_ray.errors import DataError
from finecap_ray.stages import Stages

stages = Stages(sys.argv[1], lambda name: None, lambda result: None)
print(stages.run("mle", {"epochs": 2}, print).cached)
try:
    stages.run("judge", {}, print)
except DataError as error:
    print(error)
"""


def stages(root: Path) -> Stages:
    return Stages(root, on_start=lambda name: None, on_end=lambda result: None)


def append(out: Path) -> None:
    with (out / "work").open("a") as file:
        file.write("x")


def test_equal_inputs_are_worked_on_once(tmp_path):
    first = stages(tmp_path).run("mle", {"epochs": 2, "seed": 0}, append)
    again = stages(tmp_path).run("mle", {"seed": 0, "epochs": 2}, append)
    assert (first.cached, again.cached) == (False, True)
    assert (again.digest, again.seconds) == (first.digest, first.seconds)
    assert (tmp_path / "mle" / "work").read_text() == "x"


def test_changed_inputs_start_from_nothing(tmp_path):
    first = stages(tmp_path).run("mle", {"epochs": 2}, append)
    (tmp_path / "mle" / "leftover").touch()
    changed = stages(tmp_path).run("mle", {"epochs": 3}, append)
    assert not changed.cached and changed.digest != first.digest
    assert (tmp_path / "mle" / "work").read_text() == "x"
    assert not (tmp_path / "mle" / "leftover").exists()


def test_what_is_left_of_a_stage_whose_removal_was_interrupted_is_no_stage(tmp_path, monkeypatch):
    stages(tmp_path).run("mle", {"epochs": 2}, append)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", interrupted)
        stages(tmp_path).run("mle", {"epochs": 3}, append)
    for epochs in (2, 3):
        assert not stages(tmp_path).run("mle", {"epochs": epochs}, append).cached
        assert (tmp_path / "mle" / "work").read_text() == "x"


def test_a_link_is_not_thrown_away(tmp_path):
    stages(tmp_path / "one").run("mle", {"epochs": 2}, append)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mle").symlink_to(tmp_path / "one" / "mle")
    assert stages(tmp_path / "two").run("mle", {"epochs": 2}, append).cached
    with pytest.raises(DataError, match="is a link to a stage that was made with other inputs"):
        stages(tmp_path / "two").run("mle", {"epochs": 3}, append)
    assert stages(tmp_path / "one").run("mle", {"epochs": 2}, append).cached


def test_two_processes_do_not_work_in_one_run_folder(tmp_path):
    def work(out: Path) -> None:
        done = subprocess.run([sys.executable, "-c", OTHER, str(tmp_path)], capture_output=True, text=True, timeout=60)
        (out / "said").write_text(done.stdout)

    stages(tmp_path).run("mle", {"epochs": 2}, append)
    stages(tmp_path).run("rl", {}, work)
    cached, said = (tmp_path / "rl" / "said").read_text().splitlines()
    assert cached == "True"
    assert said.startswith(f"{tmp_path} is in use by process {os.getpid()} of ")
    stages(tmp_path).run("judge", {}, append)  # the lock is free again


def test_a_folder_that_no_stage_made_is_left_alone(tmp_path):
    (tmp_path / "features").mkdir()
    stages(tmp_path).run("features", {}, append)  # an empty one is taken
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "verdict.txt").write_text("guilty")
    with pytest.raises(DataError, match=r"isn't a stage of a run, it has no stage\.json: take another run_dir"):
        stages(tmp_path).run("judge", {}, append)
    assert (tmp_path / "judge" / "verdict.txt").read_text() == "guilty"


def test_an_interrupted_stage_goes_on(tmp_path):
    def interrupted(out: Path) -> None:
        append(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path).run("rl", {"seed": 0}, interrupted)
    state = json.loads((tmp_path / "rl" / STAGE_FILE).read_text())
    assert not state["finished"]
    result = stages(tmp_path).run("rl", {"seed": 0}, append)
    assert not result.cached
    assert (tmp_path / "rl" / "work").read_text() == "xx"  # what was there is still there
    assert result.seconds >= state["seconds"]  # both runs count


def test_an_interrupted_stage_with_other_inputs_starts_from_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        stages(tmp_path).run("rl", {"seed": 0}, lambda out: (append(out), 1 / 0))
    stages(tmp_path).run("rl", {"seed": 1}, append)
    assert (tmp_path / "rl" / "work").read_text() == "x"


def test_results_are_kept_in_order_and_told(tmp_path):
    told = []
    own = Stages(tmp_path, on_start=told.append, on_end=lambda result: told.append(result.name))
    own.run("features", {}, append)
    own.run("bags/train", {}, append)
    own.run("features", {}, append)
    assert told == ["features", "features", "bags/train", "bags/train", "features"]  # a cached one only ends
    assert [result.cached for result in own.results] == [False, False, True]


def test_a_kept_stage_refuses_changed_inputs_and_names_them(tmp_path):
    own = Stages(tmp_path, on_start=lambda name: None, on_end=lambda result: None, kept=("rl",))
    own.run("rl", {"rl": {"learning_rate": 0.1, "temperature": 1}, "seed": 0}, append)
    with pytest.raises(DataError, match=r"\(rl.learning_rate was 0.1, is 0.2; seed was 0, is 1\): go back to those"):
        own.run("rl", {"rl": {"learning_rate": 0.2, "temperature": 1}, "seed": 1}, append)
    assert (tmp_path / "rl" / "work").read_text() == "x"
    assert own.run("rl", {"rl": {"learning_rate": 0.1, "temperature": 1}, "seed": 0}, append).cached


def test_a_kept_stage_of_another_version_is_refused_as_that(tmp_path):
    own = Stages(tmp_path, on_start=lambda name: None, on_end=lambda result: None, kept=("rl",))
    own.run("rl", {"data": "fluent"}, append)
    file = tmp_path / "rl" / STAGE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": "0.0.1"}))
    with pytest.raises(DataError, match=r"rl was made with other inputs \(another version of finecap-ray\): go back"):
        own.run("rl", {"examples": "fluent"}, append)


def test_a_rehearsal_refuses_what_a_run_would_and_names_what_changed_before_it(tmp_path):
    def run(own, size):
        bags = own.run("bags", {"size": size}, append)
        own.run("rl", {"bags": bags.digest, "seed": 0}, append)

    own = Stages(tmp_path, on_start=lambda name: None, on_end=lambda result: None, kept=("rl",))
    assert own.rehearsal() is None
    run(own, 2)
    run(own.rehearsal(), 2)
    with pytest.raises(DataError, match=r"rl was made with other inputs \(size was 2, is 3\): "):
        run(own.rehearsal(), 3)
    assert [(tmp_path / name / "work").read_text() for name in ("bags", "rl")] == ["x", "x"]
    assert stages(tmp_path).rehearsal() is None
