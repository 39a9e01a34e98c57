"""Paths as processes on other nodes take them."""

from pathlib import Path

from finecap_ray.cluster import absolute


def test_a_path_is_made_absolute_the_home_folder_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/runs") == str(tmp_path.resolve() / "runs")
    assert absolute("runs") == str(Path.cwd() / "runs")
    assert absolute("s3://bucket/~/runs") == "s3://bucket/~/runs"
