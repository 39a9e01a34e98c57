"""cluster.yaml passes Ray's own validation, and keeps the promises of its comments."""

import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict:
    """As the launcher sees it: merged with Ray's defaults for the provider."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")))
    validate_config(config)
    return config


def node_types(cluster: dict, gpu: bool) -> dict:
    return {name: node for name, node in cluster["available_node_types"].items() if ("GPU" in node["resources"]) == gpu}


def is_spot(node: dict) -> bool:
    return node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"


def test_the_head_has_no_gpu_and_is_not_on_spot(cluster):
    assert list(node_types(cluster, gpu=False)) == [cluster["head_node_type"]]
    assert not is_spot(cluster["available_node_types"][cluster["head_node_type"]])


def test_gpu_workers_scale_from_zero_and_prefer_spot(cluster):
    workers = node_types(cluster, gpu=True)
    assert all(node["min_workers"] == 0 for node in workers.values())
    spot = [node for node in workers.values() if is_spot(node)]
    on_demand = [node for node in workers.values() if not is_spot(node)]
    assert spot and min(node["priority"] for node in spot) > max(node["priority"] for node in on_demand)
    assert sum(node["max_workers"] for node in on_demand) < sum(node["max_workers"] for node in spot)


def test_idle_workers_go(cluster):
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False  # spot instances can't be stopped


def test_every_command_is_one_for_the_shell(cluster):
    """YAML takes what follows a # for a comment, and an open quote is left."""
    commands = [one for name, own in cluster.items() if name.endswith("_commands") for one in own]
    assert len(commands) > 10
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_authentication_is_on(cluster, commands):
    (start,) = [command for command in cluster[commands] if "ray start" in command]
    assert "RAY_AUTH_MODE=token" in start
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_dashboard_is_not_open_to_the_network(cluster):
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])


def test_what_the_wheel_is_built_from_is_mounted_and_installed(cluster):
    local = {Path(path) for path in cluster["file_mounts"].values() if not path.startswith("~")}
    assert all((ROOT / path).exists() for path in local)
    build = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("finecap_ray", "serve", "tools", "README.md", "LICENSE", "NOTICE"):
        assert needed in build and Path(needed) in local
    assert any("finecap-ray'[gpu]'" in command for command in cluster["worker_setup_commands"])


def test_all_nodes_mount_one_file_system(cluster):
    for kind in ("head", "worker"):
        assert any(
            "mount -t nfs4" in command and "/mnt/shared" in command for command in cluster[f"{kind}_setup_commands"]
        )
