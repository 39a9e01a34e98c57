"""The doctor names what is wrong; that it finds this environment healthy is shown by its command, in test_cli.py."""

import shutil
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from finecap_ray import doctor
from finecap_ray.doctor import Check, check_disk, check_memory, enough, parity_check, version_check


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.60.0", True), ("2.60.3", True), ("2.61.0", False), ("2.59.9", False), (None, False)],
)
def test_a_version_outside_the_range_is_named_with_the_range(version, ok):
    check = version_check("ray", version, SpecifierSet(">=2.60,<2.61"))
    assert check.ok is ok and "2.60" in check.detail
    assert bool(check.remedy) is not ok


def test_a_local_build_of_a_supported_version_is_supported():
    assert version_check("torch", "2.13.0+cpu", SpecifierSet(">=2.13,<2.14")).ok


def test_too_little_is_reported_with_both_numbers():
    check = enough("memory", 3.96, 6, "take a bigger machine")
    assert check == Check("memory", False, "4.0 GiB (needed: 6 GiB)", "take a bigger machine")
    assert enough("memory", 6.0, 6, "take a bigger machine").remedy == ""


@pytest.mark.parametrize(("free_gib", "ok"), [(1.5, False), (900, True)])
def test_disk_is_that_of_the_folder(tmp_path, monkeypatch, free_gib, ok):
    disks = {str(tmp_path): SimpleNamespace(free=free_gib * 2**30)}
    monkeypatch.setattr(shutil, "disk_usage", disks.__getitem__)
    check = check_disk(str(tmp_path))
    assert check.ok is ok and check.detail.startswith(f"{free_gib:.1f} GiB") and bool(check.remedy) is not ok


@pytest.mark.parametrize(("limit", "detail"), [(str(3 * 2**30), "3.0 GiB"), ("max", None)])
def test_memory_is_that_of_the_container(tmp_path, monkeypatch, limit, detail):
    machine = check_memory().detail
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "_CONTAINER_MEMORY", (tmp_path / "memory.max", tmp_path / "absent"))
    assert check_memory().detail.startswith(detail or machine)


@pytest.mark.parametrize(
    ("versions", "drift", "ok"),
    [({7}, 1e-6, True), ({6}, 1e-6, False), ({6, 7}, 1e-6, False), ({7}, 1e-2, False), ({7}, float("nan"), False)],
)
def test_stale_weights_and_drift_are_wrong(versions, drift, ok):
    check = parity_check(versions, 7, drift)
    assert check.ok is ok
    assert bool(check.remedy) is not ok
