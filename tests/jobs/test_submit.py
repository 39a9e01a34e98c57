"""A job of jobs/ on a real cluster: a head of our own, `ray job submit`, and an answer in the run folder."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.sources import read_examples

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_S, JOB_S, STOP_S = 60, 240, 5
LARGEST_UPLOAD_MIB = 10  # the package and its embedded pictures; an environment or a .git folder would be far more


@dataclass(frozen=True)
class Head:
    environment: dict[str, str]  # of a `ray job submit` to it
    folder: Path  # where it keeps its files


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]


@pytest.fixture
def head(tmp_path) -> Iterator[Head]:
    """A head that ends with the test; other Rays on the machine stay."""
    port, dashboard, agent, client = free_ports(4)
    # Not tmp_path: Ray puts sockets there, whose paths may have 107 characters.
    temporary = tempfile.mkdtemp(prefix="finecap-")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH")
    }
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
    }
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "temp-dir": temporary,
        "num-cpus": 8,
        "object-store-memory": 100 * 2**20,
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_port(process, dashboard, tmp_path / "head.log")
        yield Head(environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}, Path(temporary))
    finally:
        process.send_signal(signal.SIGTERM)  # `ray start --block` then ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_port(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"no dashboard on port {port} within {START_S} s:\n{log.read_text()}")


def few_examples(path: Path) -> None:
    table = read_examples("fluent")
    splits = {"train": 32, "dev_seen": 8}
    assert splits.keys() <= set(table["split"].to_pylist())
    parts = [table.filter(pa.compute.equal(table["split"], split)).slice(0, count) for split, count in splits.items()]
    pq.write_table(pa.concat_tables(parts), path)


def test_a_submitted_job_trains_a_scorer(head, tmp_path):
    few_examples(tmp_path / "examples.parquet")
    run_dir = tmp_path / "run"
    overrides = [
        f"run_dir={run_dir}",
        f"data.examples={tmp_path / 'examples.parquet'}",
        "tower.image_size=64",
        "scorer={text: scratch, epochs: 1, batch_size: 16}",
        "judge={spec: ViT-B-32/openai}",  # named only: nothing judges here
        "resources={num_cpus: 8, threads: 1}",
    ]
    job = ["python", "jobs/scorer.py", "--config", "demo", *overrides]
    done = subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", *job],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=JOB_S,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "succeeded" in said, said
    facts = json.loads((run_dir / "scorer" / "scorer.json").read_text(encoding="utf-8"))
    assert facts["images"] == 16 and facts["dev_images"] == 8  # the first half of 32
    (uploaded,) = head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert sum(file.stat().st_size for file in uploaded.rglob("*") if file.is_file()) < LARGEST_UPLOAD_MIB * 2**20
    assert not (uploaded / ".venv").exists() and not (uploaded / "tests").exists()
