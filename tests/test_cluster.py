"""Paths as processes on other nodes take them, and what processes of two real nodes see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finecap_ray.cluster import check_room
from finecap_ray.errors import ConfigError, DeadlineError
from finecap_ray.paths import absolute
from finecap_ray.preflight import check_engine

# Two nodes on this machine; the second claims a GPU. In a process of its own, for a process is in one cluster.
TWO_NODES = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from finecap_ray.cluster import check_shared, connect, unseeing_nodes
from finecap_ray.config import ResourceSettings

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1, num_gpus=1)
resources = ResourceSettings(address=cluster.address, use_gpu=True, start_timeout_s=60)
connect(resources)

@ray.remote(num_cpus=0)
def gpus():
    import os
    return os.environ.get("CUDA_VISIBLE_DEVICES")

folder = Path(sys.argv[1])
check_shared(folder, resources)
print(json.dumps({
    "left": [path.name for path in folder.iterdir()],
    "unseeing": len(unseeing_nodes(str(folder / "absent"), resources)),
    "gpus": [ray.get(gpus.remote()), ray.get(gpus.options(num_gpus=1).remote())],
}))
ray.shutdown()
cluster.shutdown()
"""

# Nothing listens on port 1. In a process of its own, for this one may have joined a cluster already.
NO_CLUSTER = """
import sys
from finecap_ray.cluster import connect
from finecap_ray.config import ResourceSettings
from finecap_ray.errors import ConfigError

for address in ("127.0.0.1:1", "nonsense"):
    try:
        connect(ResourceSettings(address=address))
    except ConfigError as error:
        print(str(error).replace("\\n", " "))
"""


def test_an_address_without_a_ray_is_told_of_at_once():
    done = subprocess.run([sys.executable, "-c", NO_CLUSTER], capture_output=True, text=True, timeout=60)
    refused, nonsense = done.stdout.splitlines()
    assert "Ray can't be joined at 127.0.0.1:1" in refused and "resources.address" in refused
    assert "Ray can't be joined at nonsense" in nonsense


def test_a_path_is_made_absolute_the_home_folder_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/runs") == str(tmp_path.resolve() / "runs")
    assert absolute("runs") == str(Path.cwd() / "runs")
    assert absolute("s3://bucket/~/runs") == "s3://bucket/~/runs"


def test_processes_of_two_nodes_see_the_run_folder_and_the_gpu_they_were_given(tmp_path):
    done = subprocess.run([sys.executable, "-c", TWO_NODES, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"left": [], "unseeing": 1, "gpus": ["", "0"]}


def test_a_process_without_room_is_told_of_in_time(ray_session, resources):
    check_room(resources)
    gpu = resources.model_copy(update={"use_gpu": True, "start_timeout_s": 1})
    with pytest.raises(
        DeadlineError, match=r"no room for a process of 1 CPU and 1 GPU within resources.start_timeout_s=1 s"
    ):
        check_room(gpu)


def test_an_engine_built_for_other_processors_is_refused():
    check_engine(use_gpu=True, for_gpus=True)
    with pytest.raises(ConfigError, match=r"samples on CPUs only: set resources.use_gpu=false, or .* extra \[gpu\]"):
        check_engine(use_gpu=True, for_gpus=False)
    with pytest.raises(ConfigError, match=r"samples on GPUs only: set resources.use_gpu=true, or .* extra \[cpu\]"):
        check_engine(use_gpu=False, for_gpus=True)
