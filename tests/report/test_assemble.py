"""The report of a run from its files: what it needs."""

from pathlib import Path

import pytest

from finecap_ray.config import Settings
from finecap_ray.errors import DataError
from finecap_ray.report.assemble import rebuild_report, run_names


def test_a_run_that_was_not_evaluated_has_no_report(tmp_path):
    (tmp_path / "config.yaml").write_text("name: run\n")
    with pytest.raises(DataError, match=r"has no summary\.json"):
        rebuild_report([tmp_path])


def test_a_damaged_run_is_one_message(tmp_path):
    (tmp_path / "config.yaml").write_text("name: run\n")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"has no evaluation/bags\.json"):
        rebuild_report([tmp_path])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "bags.json").write_text("[]")
    with pytest.raises(DataError, match=r"summary\.json is damaged .* `finecap evaluate` writes it again"):
        rebuild_report([tmp_path])
    (tmp_path / "summary.json").write_text('{"groups": {}, "bag_size": 5}')
    with pytest.raises(DataError, match=r"summary\.json has no caption_metrics, captions_per_s"):
        rebuild_report([tmp_path])


def test_runs_are_told_apart_by_name_then_by_folder():
    settings = [Settings(name="a"), Settings(name="b")]
    assert run_names([Path("x"), Path("y")], settings) == ["a", "b"]
    assert run_names([Path("x"), Path("y")], settings[:1] * 2) == ["a (x)", "a (y)"]
    assert run_names([Path("1/x"), Path("2/x")], settings[:1] * 2) == ["a (x) 1", "a (x) 2"]
