"""Ray: join the cluster that is there, or start one here, with the environment that the engines need in every process."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finecap_ray.config import ResourceSettings
from finecap_ray.errors import ConfigError, DeadlineError

# glibc gives freed memory back to the system, and on a virtual machine fresh pages are slow to get (0.4 to 3.7 s per
# GiB): sampling 480 captions then takes 2.4 to 16 s instead of 2.3 s. So: keep what was freed.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
# vllm compiles what counts the rank of a drawn token, also where the model runs eagerly: on a CPU the first captions of
# every sampler wait 2 to 4 s for g++ then.
_EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# vllm's attention for float32 is Triton's, which multiplies in TF32 unless told; the trainer's is float32.
_EXACT = {"TRITON_F32_DEFAULT": "ieee"}
_ANSWER_TIMEOUT_S = 10


def worker_environment(resources: ResourceSettings) -> dict[str, str]:
    """Environment variables of every Ray worker; torch and vllm read their own at import."""
    threads = str(resources.threads)
    environment = _KEEP_FREED_MEMORY | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_V2_ENABLED": "1",
        # Without it Ray shows every GPU to a process that was given none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    return environment | (_EXACT if resources.use_gpu else _EAGER)


def connect(resources: ResourceSettings, otherwise: str = "local") -> None:
    """Joins `resources.address`, RAY_ADDRESS or the cluster of the running job, else starts Ray here (`otherwise`: auto joins the
    one that runs on this machine). Does nothing twice."""
    if ray.is_initialized():
        return
    # Not None: Ray would then join whatever `ray start` left running on this machine, and refuse `num_cpus`.
    address = resources.address or os.environ.get("RAY_ADDRESS") or otherwise
    options = {}
    if address == "local":
        options = {
            "num_cpus": resources.num_cpus,
            "object_store_memory": resources.object_store_mb * 2**20,
            "include_dashboard": False,
        }
    # Ray Data says what it does on the console and Ray Train prints whole stack traces there; both also write log files.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray's C++ side warns on the console of what it works around itself, and prints its own stack at Ctrl-C.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _without_announcement(), _start_errors(address):
        _check_answers(address)
        ray.init(
            address=address,
            runtime_env={"env_vars": worker_environment(resources)},
            log_to_driver=False,
            logging_level="error",
            **options,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Half an hour by default: a batch that an engine captions on a CPU may take longer.
    context.execution_no_progress_timeout_s = resources.work_timeout_s
    context.execution_options.preserve_order = True
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


def _check_answers(address: str) -> None:
    """Raises OSError where nothing answers at HOST:PORT, which Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()


@contextmanager
def _start_errors(address: str) -> Iterator[None]:
    """What Ray raises where it can't be joined (ConfigError) or doesn't start (DeadlineError), said so that a user can act on it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if address == "local":
            raise
        raise ConfigError(
            f"Ray can't be joined at {address}: {error}\nThe address is resources.address or RAY_ADDRESS: HOST:PORT of a running head (`ray "
            "start --head` says which), or auto for one on this machine; without either Ray is started here"
        ) from error
    except Exception as error:  # Ray has no class for it
        if "timed out during startup" not in str(error):
            raise
        raise DeadlineError(
            "Ray didn't start within the 30 s that it gives itself: is this machine busy with something else?"
        ) from error


@contextmanager
def _without_announcement() -> Iterator[None]:
    """Ray's C++ side says on stderr which log level it was told to keep: that line is left out, any other comes through."""
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            os.write(2, b"".join(line for line in said if b"Set ray log level" not in line))


def get_within(references: Any, timeout_s: float, late: str) -> Any:
    """`ray.get`, with DeadlineError(`late`) after `timeout_s` seconds: `late` names the peer and what is missing."""
    try:
        return ray.get(references, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineError(late) from error


def work_within(references: Any, resources: ResourceSettings, peer: str, work: str) -> Any:
    """`ray.get` of a long piece of work. Raises DeadlineError after `resources.work_timeout_s`."""
    late = (
        f"{peer} didn't {work} within resources.work_timeout_s={resources.work_timeout_s:.0f} s: `ray status` tells "
        "whether it waits for a CPU or GPU; raise the deadline if the work is that long"
    )
    return get_within(references, resources.work_timeout_s, late)


def check_room(resources: ResourceSettings) -> None:
    """Raises DeadlineError where Ray finds no room for one process that computes. Ray Data would wait for it for ever."""
    late = (
        f"no room for a process of {resources.asked} within resources.start_timeout_s={resources.start_timeout_s:.0f} s: "
        "`ray status` tells what the cluster has, and resources.use_gpu whether a GPU is asked for"
    )
    get_within(_stand.options(num_gpus=resources.gpus).remote(), resources.start_timeout_s, late)


@ray.remote(num_cpus=1, max_retries=0)
def _stand() -> None:
    """Nothing: it only needs its place."""


def check_shared(folder: Path, resources: ResourceSettings) -> None:
    """Raises ConfigError, naming the nodes, where a node doesn't see the files that this one writes into a folder. With `use_gpu`
    and no GPU here, of the nodes that come for one the first is asked too."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-from-everywhere-") as file:
        blind = unseeing_nodes(file.name, resources)
    if blind:
        raise ConfigError(
            f"what this node writes into {folder} isn't seen on {', '.join(blind)}: a run on several nodes needs a run_dir on a file "
            "system that all of them share"
        )


def unseeing_nodes(file: str, resources: ResourceSettings) -> list[str]:
    """Addresses of the other nodes that don't see a file of this one."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = [
        _see.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(file)
        for node in nodes
        if node["NodeID"] != here
    ]
    if resources.use_gpu and not any(node["Resources"].get("GPU") for node in nodes):
        answers.append(_see.options(num_gpus=resources.gpus).remote(file))
    late = (
        f"the nodes of the cluster didn't say within resources.start_timeout_s={resources.start_timeout_s:.0f} s whether they see "
        "the run folder: `ray status` tells which are there; a node with a GPU may take longer to come"
    )
    found = get_within(answers, resources.start_timeout_s, late)
    return sorted({address for address, seen in found if not seen})


@ray.remote(num_cpus=0, max_retries=0)
def _see(file: str) -> tuple[str, bool]:
    return ray.util.get_node_ip_address(), Path(file).is_file()
