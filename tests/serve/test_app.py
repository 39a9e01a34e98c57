"""The captioning service over HTTP: real Ray Serve, real vLLM, a captioner of random weights and real images."""

import asyncio
import base64
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from PIL import Image
from ray.serve.context import _get_global_client

from finecap_ray.captioners.build import build_clipcap
from finecap_ray.captioning import CaptionerFacts, find_captioner, run_settings, sampling_spec
from finecap_ray.config import ServeSettings, Settings, TowerSettings
from finecap_ray.errors import ConfigError, DataError, MismatchError
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.scorers.tower import load_tower
from finecap_ray.sources import read_examples
from serve.app import APPLICATION, Captioner, Job
from serve.start import check_address, check_port, deploy, swap_captioner, take_down

MAX_TOKENS = 8
MAX_IMAGE_BYTES = 200_000
FACTS = CaptionerFacts("rl/captioner", "0" * 16, MAX_TOKENS, MAX_TOKENS - 1)


@pytest.fixture(scope="module")
def images():
    return [row["image"] for row in read_examples("fluent").slice(0, 16).to_pylist()]


def write_captioner(folder, captioner_settings, seed):
    tower = load_tower(TowerSettings())
    settings = captioner_settings.model_copy(update={"layers": 1, "vocabulary": 300})
    texts = ["a red apple", "a green pear"]
    for part in build_clipcap(settings, texts, tower.width, tower.digest, 0.0, seed):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(captioner_settings, tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("run") / "captioner", captioner_settings, seed=0)


@pytest.fixture(scope="module")
def settings():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ServeSettings(
        port=port,
        max_image_bytes=MAX_IMAGE_BYTES,
        max_image_pixels=1_000_000,
        max_captions=4,
        max_batch_size=4,
        max_queued=16,
    )
    return Settings(serve=limits)


@pytest.fixture(scope="module")
def service(ray_session, settings, checkpoint):
    try:
        with httpx.Client(base_url=deploy(settings, str(checkpoint)), timeout=60) as client:
            yield client
    finally:
        take_down()


def as_json(image: bytes, **fields):
    return {"image": base64.b64encode(image).decode(), **fields}


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["type"]


def test_multipart_and_base64_give_the_same_greedy_caption_twice(service, images):
    answers = [
        service.post("/v1/captions", files={"image": ("apple.webp", images[0])}),
        service.post("/v1/captions", json=as_json(images[0])),
        service.post("/v1/captions", json=as_json(images[0])),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    first, *others = [answer.json()["captions"] for answer in answers]
    assert all(other == first for other in others)
    [caption] = first
    assert caption["text"] and 1 <= caption["tokens"] <= MAX_TOKENS and caption["logprob"] < 0
    body = answers[0].json()
    assert body["model"]["captioner"].endswith("/captioner") and body["seconds"] > 0


def test_n_captions_of_max_tokens(service, images):
    answer = service.post("/v1/captions", files={"image": images[0]}, data={"n": 4, "max_tokens": 3, "temperature": 1})
    captions = answer.json()["captions"]
    assert len(captions) == 4
    assert all(caption["tokens"] <= 3 for caption in captions)
    assert len({caption["text"] for caption in captions}) > 1


def test_together_each_request_gets_what_it_asked_for(service, images):
    asked = [{"n": 1 + row % 4, "max_tokens": 1 + row % MAX_TOKENS} for row in range(len(images))]
    alone = [service.post("/v1/captions", json=as_json(image, max_tokens=5)).json() for image in images[::4]]
    with ThreadPoolExecutor(len(images)) as pool:
        answers = list(
            pool.map(
                lambda image, fields: service.post("/v1/captions", json=as_json(image, **fields)),
                images + images[::4],
                asked + [{"max_tokens": 5}] * 4,
            )
        )
    for answer, fields in zip(answers, asked, strict=False):
        captions = answer.json()["captions"]
        assert len(captions) == fields["n"]
        assert all(caption["tokens"] <= fields["max_tokens"] for caption in captions)
    for one, crowded in zip(
        alone, answers[-4:], strict=True
    ):  # the same caption among neighbours of other temperatures
        [expected], [found] = one["captions"], crowded.json()["captions"]
        assert found["text"] == expected["text"]
        assert found["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)


@pytest.mark.parametrize("garbage", [b"not an image", b"", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_not_an_image(service, garbage):
    assert refusal(service.post("/v1/captions", files={"image": ("a.png", garbage)})) == (400, "not_an_image")
    assert refusal(service.post("/v1/captions", json=as_json(garbage))) == (400, "not_an_image")


def test_an_image_cut_short_and_text_that_is_not_base64(service, images):
    assert refusal(service.post("/v1/captions", files={"image": images[0][:1000]})) == (400, "not_an_image")
    assert refusal(service.post("/v1/captions", json={"image": "no base64!"})) == (400, "not_an_image")


@pytest.mark.parametrize("size", [MAX_IMAGE_BYTES + 1, 20 * MAX_IMAGE_BYTES])
def test_too_many_bytes(service, size):
    large = bytes(size)
    answers = [
        service.post("/v1/captions", files={"image": large}),
        service.post("/v1/captions", json=as_json(large)),
    ]
    assert [refusal(answer) for answer in answers] == [(413, "image_too_large")] * 2


def test_too_many_bytes_of_undeclared_length(service):
    chunks = (b" " * 2**16 for _ in range(20))
    answer = service.post("/v1/captions", content=chunks, headers={"content-type": "application/json"})
    assert refusal(answer) == (413, "image_too_large")


def test_too_many_pixels_in_few_bytes(service):
    file = io.BytesIO()
    Image.new("1", (2000, 2000)).save(file, "PNG")
    assert len(file.getvalue()) < 10_000
    assert refusal(service.post("/v1/captions", files={"image": file.getvalue()})) == (413, "image_too_large")


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 5}, "n must be at most 4, got 5"),
        ({"n": "many"}, "n:"),
        ({"n": 2, "temperature": 0}, "greedy"),
        ({"temperature": -1}, "temperature must be from 0"),
        ({"max_tokens": MAX_TOKENS + 1}, f"max_tokens must be from 1 to {MAX_TOKENS}"),
        ({"beams": 3}, "beams"),
    ],
)
def test_bad_parameters_are_named(service, images, fields, named):
    for answer in (
        service.post("/v1/captions", json=as_json(images[0], **fields)),
        service.post("/v1/captions", files={"image": images[0]}, data=fields),
    ):
        assert refusal(answer) == (422, "invalid_request")
        assert named in answer.json()["error"]["message"]


def test_requests_of_another_form(service):
    assert refusal(service.post("/v1/captions", data={"n": 1})) == (415, "unsupported_media_type")
    assert refusal(service.post("/v1/captions", files={"picture": b"1"})) == (422, "invalid_request")
    assert refusal(service.post("/v1/captions", content=b"{", headers={"content-type": "application/json"})) == (
        422,
        "invalid_request",
    )
    assert refusal(service.get("/v1/nothing")) == (404, "not_found")


def test_health_page_and_description(service):
    health = service.get("/healthz")
    assert health.status_code == 200
    assert health.json()["status"] == "ready" and health.json()["replicas"] == 1
    assert health.json()["limits"]["max_tokens"] == MAX_TOKENS
    assert health.json()["limits"]["default_max_tokens"] == MAX_TOKENS
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "v1/captions" in page.text and "http://" not in page.text and "https://" not in page.text
    body = service.get("/openapi.json").json()["paths"]["/v1/captions"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}


def engines() -> set[str]:
    deployments = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"]
    return {replica["replica_id"] for replica in deployments["Captioner"]["replicas"]}


def test_another_captioner_takes_over_while_requests_come(
    service, settings, checkpoint, captioner_settings, images, tmp_path
):
    other, running = write_captioner(tmp_path / "captioner", captioner_settings, seed=1), engines()
    (other / "optimizer.pt").write_bytes(b"as in a checkpoint of a run")
    swapped = threading.Event()

    def ask() -> list[httpx.Response]:
        answers = []
        while not (swapped.is_set() and len(answers) > 3):
            answers.append(service.post("/v1/captions", json=as_json(images[0])))
        return answers

    with ThreadPoolExecutor(1) as pool:
        try:
            asking = pool.submit(ask)
            swap_captioner(settings, str(other))
        finally:
            swapped.set()
        answers = asking.result()
    assert {answer.status_code for answer in answers} == {200}
    texts = {answer.json()["model"]["weights"]: answer.json()["captions"][0]["text"] for answer in answers}
    last = answers[-1].json()
    assert len(texts) == 2 and len(set(texts.values())) == 2
    assert all(answer.json()["captions"][0]["text"] == texts[answer.json()["model"]["weights"]] for answer in answers)
    assert service.get("/healthz").json()["model"] == last["model"]
    swap_captioner(settings, str(checkpoint))
    assert service.post("/v1/captions", json=as_json(images[0])).json()["model"] == answers[0].json()["model"]
    assert engines() == running  # the very same, that loaded other weights


@pytest.mark.usefixtures("service")
def test_a_service_that_runs_is_not_replaced_unasked(settings, checkpoint):
    with pytest.raises(ConfigError, match=r"served in this cluster already: --swap"):
        deploy(settings, str(checkpoint))


def test_an_engine_in_which_a_batch_failed_says_so(checkpoint, resources):
    engine = Captioner.func_or_class(TowerSettings(), resources, 1, 0.0)

    async def fail() -> None:
        await engine.reconfigure({"captioner": str(checkpoint)})
        await engine.check_health()
        with pytest.raises(RuntimeError):
            await engine._run([Job(torch.zeros(3), SamplingSpec(1, 2, 0.0))])
        with pytest.raises(RuntimeError, match="a batch failed in the engine"):
            await engine.check_health()

    asyncio.run(fail())


def test_a_captioner_of_another_tower_is_refused(service, settings, checkpoint, tmp_path):
    other = tmp_path / "captioner"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"feature_tower": "f" * 16}))
    with pytest.raises(MismatchError, match="f" * 16):
        swap_captioner(settings, str(other))
    assert service.get("/healthz").json()["model"]["captioner"] == f"{checkpoint.parent.name}/captioner"


def test_what_is_too_much_is_turned_away_and_the_page_answers_meanwhile(service, images):
    """Engine and queue hold 24 images; Serve's proxy would keep the others waiting, without an answer."""

    def ask(number):
        if number == 100:
            return service.get("/healthz")
        return service.post("/v1/captions", json=as_json(images[0], n=4))

    with ThreadPoolExecutor(128) as pool:
        answers = list(pool.map(ask, range(128)))
    assert answers[100].status_code == 200
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 104
    assert {refusal(answer) for answer in refused} == {(503, "overloaded")}


@pytest.mark.usefixtures("service")
def test_another_address_than_that_of_the_serve_that_runs_is_refused():
    with pytest.raises(ConfigError, match=r"Ray Serve runs in this cluster already, at 127\.0\.0\.1:"):
        check_address(Settings(serve=ServeSettings(port=1)))


def test_how_captions_are_drawn():
    assert sampling_spec(1, None, None, FACTS).temperature == 0  # greedy
    assert sampling_spec(3, None, None, FACTS).temperature == 1
    assert sampling_spec(1, None, None, FACTS).max_tokens == MAX_TOKENS - 1
    for n, temperature, max_tokens in [(0, 1, 1), (1, float("nan"), 1), (1, 2.1, 1), (1, 1, 0), (2, 0, 1)]:
        with pytest.raises(ConfigError):
            sampling_spec(n, temperature, max_tokens, FACTS)


def test_a_captioner_is_found_or_what_lies_below_is_named(checkpoint, tmp_path):
    assert find_captioner(checkpoint) == str(checkpoint)
    with pytest.raises(DataError, match=f"below it are {checkpoint.as_posix()}"):
        find_captioner(checkpoint.parent)
    with pytest.raises(DataError, match=r"config\.json"):
        find_captioner(tmp_path)


def test_the_settings_of_the_run_are_found(tmp_path):
    (tmp_path / "config.yaml").write_text("tower: {image_size: 64}")
    captioner = str(tmp_path / "rl" / "captioner")
    assert run_settings(captioner, None).tower.image_size == 64
    assert run_settings(captioner, None, ["serve.port=8123"]).serve.port == 8123
    assert run_settings(captioner, "demo").tower == TowerSettings()
    assert run_settings("/captioner", None).tower == TowerSettings()


def test_a_port_of_another_program_is_refused():
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        taken = Settings(serve=ServeSettings(port=port))
        with pytest.raises(ConfigError, match=rf"can't serve at 127\.0\.0\.1:{port} \(Address already in use"):
            check_port(taken)
    check_port(taken)
