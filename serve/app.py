"""The Ray Serve application: `Service` answers HTTP, `Captioner` holds the engine, and a ClipCap's tower.

request -> Service: read, refuse -> Captioner: decode -> batch of those that arrived together -> (tower,) vLLM
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState
from starlette.exceptions import HTTPException

from finecap_ray.captioning import CaptionerFacts, ImageCaptioner, open_checkpoint, sampling_spec
from finecap_ray.config import ResourceSettings, ServeSettings, Settings, TowerSettings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.records import Rollout
from finecap_ray.sampling.spec import SamplingSpec
from serve.request import read_request
from serve.schema import (
    HTTP_STATUS,
    Caption,
    CaptionParameters,
    CaptionRequest,
    CaptionResponse,
    Error,
    ErrorResponse,
    ErrorType,
    Health,
    Limits,
    Model,
    RequestError,
)

APPLICATION = "finecap"
PAGE = Path(__file__).with_name("page.html")
HEALTH_TIMEOUT_S = 5
# Files of a captioner's folder.
_OF_AN_ENGINE = ("*config.json", "*token*", "chat_template*", "vocab*", "merges*")


@dataclass(frozen=True, slots=True)
class Job:
    prepared: Any  # by ImageCaptioner.prepare
    spec: SamplingSpec


@dataclass(frozen=True, slots=True)
class Answer:
    rollouts: list[Rollout]
    model: Model  # that they are of


@serve.deployment
class Captioner:
    """One engine. Images that arrive together are captioned together, each as its own request asks for."""

    def __init__(
        self, tower: TowerSettings, resources: ResourceSettings, max_batch_size: int, batch_wait_s: float
    ) -> None:
        self._caption_batch.set_max_batch_size(max_batch_size)
        self._caption_batch.set_batch_wait_timeout_s(batch_wait_s)
        self._tower, self._resources = tower, resources
        self._captioner: ImageCaptioner | None = None
        self._failure: Exception | None = None
        self._busy_since: float | None = None
        # torch keeps a pool of threads per calling thread: the engine is only ever called from this one.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def reconfigure(self, config: dict[str, str]) -> None:
        """Serve says which captioner: before the first request, and when another takes its place (`finecap serve --swap`)."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._take, config["captioner"])

    def _take(self, captioner: str) -> None:
        checkpoint = open_checkpoint(captioner, self._tower)
        if self._captioner is None:
            self._captioner = ImageCaptioner(checkpoint, self._tower.batch_size, self._resources)
            self._captioner.warm_up()
        else:
            self._captioner.take(checkpoint)
        self._model = Model(captioner=checkpoint.facts.name, weights=checkpoint.facts.weights)

    async def check_health(self) -> None:
        """Raises where the engine failed or hangs, and Serve puts another in its place: vLLM would wait in every later batch for
        what a failed one was asked."""
        if self._failure is not None:
            raise RuntimeError("a batch failed in the engine") from self._failure
        if self._busy_since is not None and time.monotonic() - self._busy_since > self._resources.step_timeout_s:
            raise RuntimeError(
                f"a batch has been in the engine for more than resources.step_timeout_s={self._resources.step_timeout_s:g} s"
            )

    async def caption(self, image: bytes, spec: SamplingSpec) -> Answer:
        """Raises DataError for an image that can't be decoded to its end; its neighbours don't notice."""
        prepared = await asyncio.to_thread(self._captioner.prepare, image)
        return await self._caption_batch(Job(prepared, spec))

    @serve.batch
    async def _caption_batch(self, jobs: list[Job]) -> list[Answer]:
        return await self._run(jobs)

    async def _run(self, jobs: list[Job]) -> list[Answer]:
        self._busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, jobs)
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._busy_since = None

    def _answer(self, jobs: list[Job]) -> list[Answer]:
        captions = self._captioner.caption([job.prepared for job in jobs], [job.spec for job in jobs])
        return [Answer(own, self._model) for own in captions]


api = FastAPI(title="finecap", docs_url=None, redoc_url=None)  # both pages load scripts from elsewhere


def _answer(type: ErrorType, message: str, status: int | None = None) -> JSONResponse:
    body = ErrorResponse(error=Error(type=type, message=message))
    return JSONResponse(body.model_dump(), status_code=HTTP_STATUS[type] if status is None else status)


@api.exception_handler(RequestError)
async def _refused(request: Request, error: RequestError) -> JSONResponse:
    return _answer(error.type, str(error))


@api.exception_handler(HTTPException)
async def _unroutable(request: Request, error: HTTPException) -> JSONResponse:
    return _answer("not_found" if error.status_code == 404 else "invalid_request", error.detail, error.status_code)


@api.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _answer(
        "internal", "captioning failed; the service's log says why"
    )  # Starlette raises it again, into the log


def _request_body() -> dict[str, Any]:
    """For /openapi.json: the body is read by hand, since it has two forms."""
    form = CaptionParameters.model_json_schema()
    form["properties"]["image"] = {"type": "string", "format": "binary"}
    form["required"] = ["image"]
    content = {"multipart/form-data": form, "application/json": CaptionRequest.model_json_schema()}
    return {
        "requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in content.items()}}
    }


_ERRORS = {status: {"model": ErrorResponse} for status in sorted(set(HTTP_STATUS.values()))}


@serve.deployment
@serve.ingress(api)
class Service:
    def __init__(self, captioner: DeploymentHandle, settings: ServeSettings) -> None:
        self._captioner, self._settings = captioner, settings
        self._page = PAGE.read_text(encoding="utf-8")

    def reconfigure(self, facts: dict[str, Any]) -> None:
        """Of the captioner, as for `Captioner`."""
        self._facts = CaptionerFacts(**facts)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        return HTMLResponse(self._page)

    @api.get("/healthz", responses={503: {"model": ErrorResponse}})
    async def healthz(self) -> Health:
        """200 when at least one engine is ready."""
        try:
            status = await asyncio.wait_for(asyncio.to_thread(serve.status), HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise RequestError("not_ready", f"Ray Serve didn't answer within {HEALTH_TIMEOUT_S} s") from None
        ready = status.applications[APPLICATION].deployments[Captioner.name].replica_states.get(ReplicaState.RUNNING, 0)
        if not ready:
            raise RequestError("not_ready", f"0 of {self._settings.replicas} caption engines are ready: try again soon")
        limits = Limits(
            max_image_bytes=self._settings.max_image_bytes,
            max_image_pixels=self._settings.max_image_pixels,
            max_captions=self._settings.max_captions,
            max_tokens=self._facts.max_tokens,
            default_max_tokens=self._facts.trained_tokens,
        )
        model = Model(captioner=self._facts.name, weights=self._facts.weights)
        return Health(status="ready", replicas=ready, model=model, limits=limits)

    @api.post("/v1/captions", responses=_ERRORS, openapi_extra=_request_body())
    async def captions(self, request: Request) -> CaptionResponse:
        """Captions of one image."""
        asked = await read_request(request, self._settings)
        started = time.perf_counter()
        answer = await self._ask(asked.image, self._spec(asked.parameters))
        captions = [
            Caption(
                text=rollout.text,
                logprob=sum(rollout.logprobs),
                tokens=len(rollout.token_ids),
                finish_reason=rollout.finish_reason,
            )
            for rollout in answer.rollouts
        ]
        return CaptionResponse(captions=captions, model=answer.model, seconds=time.perf_counter() - started)

    def _spec(self, parameters: CaptionParameters) -> SamplingSpec:
        if parameters.n > self._settings.max_captions:
            raise RequestError(
                "invalid_request", f"n must be at most {self._settings.max_captions}, got {parameters.n}"
            )
        try:
            return sampling_spec(parameters.n, parameters.temperature, parameters.max_tokens, self._facts)
        except ConfigError as error:
            raise RequestError("invalid_request", str(error)) from None

    async def _ask(self, image: bytes, spec: SamplingSpec) -> Answer:
        timeout_s = self._settings.request_timeout_s
        try:
            return await asyncio.wait_for(self._captioner.caption.remote(image, spec), timeout_s)
        except TimeoutError:
            raise RequestError("timeout", f"no engine answered within {timeout_s:g} s: try again later") from None
        except BackPressureError:
            raise RequestError(
                "overloaded", f"{self._settings.max_queued} images are waiting already: try again later"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                raise RequestError("not_an_image", str(error.cause)) from None
            raise


def build_application(settings: Settings, captioner: str, facts: CaptionerFacts) -> serve.Application:
    """`captioner` is the absolute path of a captioner folder that every node sees.

    Deployed again with another captioner of the same architecture and the same settings, Serve keeps the engines and has them
    load its weights (`reconfigure`); with anything else it starts new ones.
    """
    limits, resources = settings.serve, settings.resources
    # Serve's own version would be another at every deployment.
    version = {"version": _version(settings, captioner), "_internal": True}
    engines = Captioner.options(
        num_replicas=limits.replicas,
        max_ongoing_requests=2 * limits.max_batch_size,  # one batch in the engine, the next one being decoded
        max_queued_requests=limits.max_queued,
        ray_actor_options={"num_cpus": 1, "num_gpus": resources.gpus},
        user_config={"captioner": captioner},
        **version,
    ).bind(settings.tower, resources, limits.max_batch_size, limits.batch_wait_s)
    held = limits.max_queued + 2 * limits.max_batch_size * limits.replicas  # by the engines and before them
    return Service.options(
        max_ongoing_requests=2 * held,  # the rest is told so, and `healthz` answers: the proxy itself turns nobody away
        ray_actor_options={"num_cpus": 0},
        user_config=asdict(facts),
        **version,
    ).bind(engines, limits)


def _version(settings: Settings, captioner: str) -> str:
    """Of all that an engine is built from: settings, architecture, tokenizer and processor."""
    digest = hashlib.sha256()
    for part in (settings.tower, settings.resources, settings.serve):
        digest.update(part.model_dump_json(exclude={"address"}).encode())
    for file in sorted(Path(captioner).iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in _OF_AN_ENGINE):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
