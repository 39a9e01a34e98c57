"""Starts the captioning service on Ray, waits until it answers, and takes it down again."""

from __future__ import annotations

import logging
import signal
import socket
import time

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from finecap_ray.captioning import CaptionerFacts, connect_to_caption, find_captioner, open_checkpoint
from finecap_ray.cluster import connect, get_within
from finecap_ray.config import Settings, TowerSettings
from finecap_ray.errors import ConfigError, DeadlineError, UnsupportedError
from serve.app import APPLICATION, build_application

_POLL_S = 0.5


def start_service(settings: Settings, checkpoint: str) -> None:
    """Serves a captioner folder until Ctrl-C or SIGTERM. Raises what `deploy` raises."""
    try:
        url = deploy(settings, checkpoint)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own prints a stack trace
        print(f"captions at {url}   page {url}/   health {url}/healthz   Ctrl-C stops", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            print("stopping", flush=True)
            take_down()
    except KeyboardInterrupt:
        pass  # what runs by then was taken down
    finally:
        ray.shutdown()


def swap_captioner(settings: Settings, checkpoint: str) -> None:
    """Gives the service that runs in this cluster (by default the one on this machine) another captioner. One of the same
    architecture is loaded by the engines between two batches; for another, Serve stops each engine and starts a new one.

    Raises ConfigError where no service runs, and else what `deploy` raises.
    """
    captioner = find_captioner(checkpoint)
    connect(settings.resources, otherwise="auto")
    if APPLICATION not in serve.status().applications:
        raise ConfigError("no captioner is served in this Ray cluster: leave out --swap to start one")
    check_address(settings)
    print(f"{_run(settings, captioner)} captions with {captioner} from now on", flush=True)


def deploy(settings: Settings, checkpoint: str) -> str:
    """The URL of the service, once it answers.

    Raises DataError where there is no captioner, MismatchError when it was trained on another tower's features,
    UnsupportedError when the engines don't start, DeadlineError when they don't start in time, ConfigError when the port is
    another program's, or Serve runs in this cluster at another, or serves a captioner already.
    """
    captioner = find_captioner(checkpoint)
    connect_to_caption(settings.resources)
    running = serve.status()
    if APPLICATION in running.applications:
        raise ConfigError(
            "a captioner is served in this cluster already: --swap gives that service this one, `serve shutdown` ends it"
        )
    if running.proxies:  # Serve runs in this cluster, and the port is its own
        check_address(settings)
    else:
        check_port(settings)
    try:
        return _run(settings, captioner)
    except BaseException:
        take_down()
        raise


def _run(settings: Settings, captioner: str) -> str:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deadline = time.monotonic() + settings.resources.start_timeout_s
    reading = _read_facts.remote(captioner, settings.tower)
    serve.start(http_options={"host": settings.serve.host, "port": settings.serve.port})
    late = f"{captioner} wasn't read within {settings.resources.start_timeout_s:.0f} s: see `ray status` for a free CPU"
    facts = get_within(reading, settings.resources.start_timeout_s, late)
    target = serve.RunTarget(build_application(settings, captioner, facts), name=APPLICATION)
    serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running(deadline, settings)
    return f"http://{settings.serve.host}:{settings.serve.port}"


def take_down() -> None:
    """Removes the service after the requests in flight. Serve itself stays: it ends with Ray, or others use it."""
    if ray.is_initialized() and APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)  # at a swap engines may hold every CPU
def _read_facts(captioner: str, tower: TowerSettings) -> CaptionerFacts:
    """In a process of its own, which ends: the driver stays small, and what doesn't fit is refused before engines start."""
    return open_checkpoint(captioner, tower).facts


def check_port(settings: Settings) -> None:
    """Serve would share a port with any program that lets it (SO_REUSEPORT), another service too: each answers some requests."""
    host, port = settings.serve.host, settings.serve.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(
            f"can't serve at {host}:{port} ({error.strerror}): choose another serve.port or serve.host"
        ) from None


def check_address(settings: Settings) -> None:
    """Raises ConfigError where the Serve of this cluster listens elsewhere: it takes no new address."""
    running, asked = _get_global_client().http_config, settings.serve
    if (running.host, running.port) != (asked.host, asked.port):
        raise ConfigError(
            f"Ray Serve runs in this cluster already, at {running.host}:{running.port}: set serve.host and serve.port to that, or "
            "end it and what it serves with `serve shutdown`"
        )


def _wait_until_running(deadline: float, settings: Settings) -> None:
    while True:
        application = serve.status().applications[APPLICATION]
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [one.message.strip() for one in application.deployments.values() if one.message.strip()]
            reason = messages[0].splitlines()[-1] if messages else application.message  # the end of a stack trace
            raise UnsupportedError(
                f"the service doesn't start: {reason} (all of it is in Ray's logs, serve/controller_*)"
            )
        if time.monotonic() > deadline:
            states = {name: dict(one.replica_states) for name, one in application.deployments.items()}
            raise DeadlineError(
                f"the service didn't start within {settings.resources.start_timeout_s:.0f} s; replicas: {states}; "
                f"each of {settings.serve.replicas} engines needs {settings.resources.asked}: "
                "see `ray status` for what the cluster has"
            )
        time.sleep(_POLL_S)
