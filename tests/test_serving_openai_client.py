"""OpenAI's own Python client, unmodified, against the service over HTTP; and the raw JSON beneath it."""

import asyncio
import base64
import io
import json
import threading
import time

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from jsonschema import Draft202012Validator
from openai.types import ImagesResponse, Model
from PIL import Image
from serving_parts import DIGITS, FakeBackend, pixels, service

from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.keys import new_token

ERROR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "additionalProperties": False,
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
TOKEN, DIGEST = new_token()
SLOW_TOKEN, SLOW_DIGEST = new_token()
KEYS = [
    {"name": "me", "sha256": DIGEST},
    {"name": "slow", "sha256": SLOW_DIGEST, "requests_per_minute": 1},
]
GOLDEN_HEADERS = {
    "authorization": f"Bearer {TOKEN}", "accept": "application/json", "content-type": "application/json",
    "user-agent": "OpenAI/Python 3.54.0", "x-stainless-lang": "python",
    "x-stainless-package-version": "3.54.0", "x-stainless-os": "Linux", "x-stainless-arch": "x64",
    "x-stainless-runtime": "CPython", "x-stainless-runtime-version": "3.11.7", "x-stainless-async": "false",
    "x-stainless-retry-count": "0", "x-stainless-read-timeout": "600",
}  # fmt: skip
GOLDEN_BODY = (
    b'{"model":"digits","prompt":"a three","n":2,"response_format":"b64_json","size":"16x16","seed":7,'
    b'"num_inference_steps":2}'
)


class Service:
    """The application in a thread of its own; keeps what came in over HTTP."""

    def __init__(self, backend, config):
        self.backend, self.requests = backend, []
        app = create_app(backend, config)

        async def recorded(scope, receive, send):
            async def listen():
                message = await receive()
                if message["type"] == "http.request":
                    self.requests.append((scope["path"], dict(scope["headers"]), message.get("body", b"")))
                return message

            await app(scope, listen, send)

        options = uvicorn.Config(recorded, port=0, log_level="warning", lifespan="off", ws="none")
        self.server = uvicorn.Server(options)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, token=TOKEN, **options):
        """Return OpenAI's client of this service."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, **options)

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def running():
    running = Service(FakeBackend(), service(keys=KEYS))
    yield running
    running.close()


@pytest.fixture
def served(running):
    running.requests.clear()
    running.backend.asked.clear()
    running.backend.error = running.backend.lookup_error = None
    return running


@pytest.fixture
def naps(monkeypatch):
    """Seconds that the client would have slept before it tried again, one entry a time."""
    slept = []
    monkeypatch.setattr(openai._base_client.time, "sleep", slept.append)
    return slept


def decode(data):
    """Return the images of an answer as arrays."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))) for entry in data]


def matches(schema, content):
    """Assert that JSON fits a schema, which the client would not notice."""
    faults = [fault.message for fault in Draft202012Validator(schema).iter_errors(content)]
    assert faults == []


# Success


def test_the_client_gets_images_that_its_seed_determines(served):
    client = served.client()
    ours = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 1.5}
    answer = client.images.generate(model="digits", prompt="a three", n=2, size="auto", extra_body=ours)
    assert isinstance(answer, ImagesResponse)
    wanted = [pixels(3, 2, 1.5, 7, index)[..., 0] for index in range(2)]
    assert all((got == image).all() for got, image in zip(decode(answer.data), wanted, strict=True))
    assert (answer.output_format, answer.size, answer.background) == ("png", "8x8", "opaque")
    assert (answer.seed, answer.version, answer.num_inference_steps) == (7, "digits-v1", 2)
    assert abs(answer.created - time.time()) < 60
    assert (answer.usage.total_tokens, answer.usage.input_tokens_details.text_tokens) == (0, 0)
    again = client.images.generate(prompt="3", n=2, extra_body=ours)
    assert [entry.b64_json for entry in again.data] == [entry.b64_json for entry in answer.data]


def test_the_asynchronous_client_gets_the_same(served):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=TOKEN) as client:
            return await asyncio.gather(
                *[client.images.generate(prompt="3", extra_body={"seed": seed}) for seed in range(8)]
            )

    for seed, answer in enumerate(asyncio.run(ask())):
        assert (decode(answer.data)[0] == pixels(3, 1, 1.0, seed, 0)[..., 0]).all()


def test_all_that_the_client_can_send_and_means_nothing_here_is_taken(served):
    answer = served.client().images.generate(
        prompt="3", background="auto", model="digits", moderation="auto", n=1, output_compression=100,
        output_format="webp", partial_images=0, quality="high", response_format="b64_json", size="16x16",
        stream=False, style="natural", user="me", safety_identifier="me", complexity="low",
    )  # fmt: skip
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == "WEBP"


def test_the_client_lists_and_retrieves_models(served):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["digits", "blocks"]
    digits = client.models.retrieve("digits")
    assert (digits.object, digits.created, digits.owned_by) == ("model", DIGITS.created, "counterpoint")
    assert digits.details["classes"][3] == "three"


def test_answers_have_a_request_id_and_say_what_they_took(served):
    raw = served.client().images.with_raw_response.generate(prompt="3")
    assert raw.headers["x-request-id"]
    assert (raw.headers["x-model-version"], raw.headers["x-batch-size"]) == ("digits-v1", "1")
    assert raw.parse().data


def test_the_golden_request_is_what_the_client_sends(served):
    served.client().images.generate(
        prompt="a three", model="digits", n=2, response_format="b64_json", size="16x16",
        extra_body={"seed": 7, "num_inference_steps": 2},
    )  # fmt: skip
    ((path, headers, body),) = served.requests
    assert (path, json.loads(body)) == ("/v1/images/generations", json.loads(GOLDEN_BODY))
    told = {name.decode() for name in headers}
    assert set(GOLDEN_HEADERS) <= told
    assert headers[b"authorization"].decode() == GOLDEN_HEADERS["authorization"]


def test_the_golden_request_gets_the_golden_answer(served):
    response = httpx2.post(f"{served.url}/v1/images/generations", content=GOLDEN_BODY, headers=GOLDEN_HEADERS)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert isinstance(answer.pop("created"), int)
    assert answer["timings"].pop("total_ms") > 0
    files = [base64.b64decode(entry.pop("b64_json"), validate=True) for entry in answer["data"]]
    assert answer == {
        "data": [{}, {}], "background": "opaque", "output_format": "png", "size": "16x16", "model": "digits",
        "version": "digits-v1", "class_label": 3, "seed": 7, "num_inference_steps": 2, "guidance_scale": 1.0,
        "scheduler": "DDIMScheduler", "guider": None, "guider_options": {},
        "usage": {
            "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "images": 2, "evaluations": 2,
        },
        "timings": {"queue_ms": 1.0, "compute_ms": 2.0, "batch_size": 2.0},
    }  # fmt: skip
    for index, file in enumerate(files):
        assert file.startswith(b"\x89PNG\r\n\x1a\n")
        wanted = np.kron(pixels(3, 2, 1.0, 7, index)[..., 0], np.ones((2, 2), np.uint8))
        assert (np.asarray(Image.open(io.BytesIO(file))) == wanted).all()


def test_raw_answers_fit_the_types_of_the_client_and_our_own_document(served):
    headers = {"authorization": f"Bearer {TOKEN}"}
    document = httpx2.get(f"{served.url}/openapi.json").json()
    own = {"components": document["components"]}
    image = httpx2.post(f"{served.url}/v1/images/generations", json={"prompt": "3"}, headers=headers).json()
    matches(ImagesResponse.model_json_schema(), image)
    matches({"$ref": "#/components/schemas/ImagesAnswer", **own}, image)
    models = httpx2.get(f"{served.url}/v1/models", headers=headers).json()
    matches({"$ref": "#/components/schemas/ModelList", **own}, models)
    assert list(models) == ["object", "data"]
    for model in models["data"]:
        matches(Model.model_json_schema(), model)
        single = httpx2.get(f"{served.url}/v1/models/{model['id']}", headers=headers).json()
        assert single == model


# Errors


def refused(call, kind, status):
    """Return the client's exception and check the JSON that it was made from."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.status_code == status
    matches(ERROR, error.response.json())
    told = error.response.json()["error"]
    assert (error.code, error.param, error.type) == (told["code"], told["param"], told["type"])
    assert told["message"] in error.message
    assert error.request_id == error.response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": "3", "n": 11}, "n"),
        ({"prompt": "3", "n": "two"}, "n"),
        ({"prompt": "3", "size": "1024x1536"}, "size"),
        ({"prompt": "3", "response_format": "url"}, "response_format"),
        ({"prompt": "3", "stream": True}, "stream"),
        ({"prompt": "3", "extra_body": {"seed": "7"}}, "seed"),
        ({"prompt": "3", "extra_body": {"negative_prompt": "4"}}, "negative_prompt"),
        ({"prompt": "3", "model": "blocks"}, "model"),
    ],
)
def test_bad_requests_are_told_apart_by_their_field_and_never_sent_again(served, arguments, param):
    error = refused(lambda: served.client().images.generate(**arguments), openai.BadRequestError, 400)
    assert (error.code, error.param) == ("invalid_value", param)
    assert len(served.requests) == 1


def test_a_wrong_key_is_an_authentication_error(served):
    for call in (
        lambda: served.client("wrong").images.generate(prompt="3"),
        lambda: served.client("wrong").models.list(),
    ):
        assert refused(call, openai.AuthenticationError, 401).code == "invalid_api_key"
    assert served.backend.asked == []


def test_unknown_models_and_routes_are_not_found(served):
    client = served.client()
    error = refused(lambda: client.images.generate(prompt="3", model="dall-e-3"), openai.NotFoundError, 404)
    assert (error.code, error.param) == ("model_not_found", "model")
    error = refused(lambda: client.models.retrieve("../../etc/passwd"), openai.NotFoundError, 404)
    assert error.code == "model_not_found"
    error = refused(
        lambda: client.chat.completions.create(model="digits", messages=[]), openai.NotFoundError, 404
    )
    assert error.code == "not_found"


def test_a_method_that_a_route_lacks_is_an_error_in_form(served):
    headers = {"authorization": f"Bearer {TOKEN}"}
    response = httpx2.delete(f"{served.url}/v1/models/digits", headers=headers)
    matches(ERROR, response.json())
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_full_service_is_asked_again_when_it_said(served, naps):
    served.backend.error = ApiError("queue_full", "128 requests are under way", retry_after=17.0)
    client = served.client(max_retries=2)
    error = refused(lambda: client.images.generate(prompt="3"), openai.RateLimitError, 429)
    assert (error.code, error.type) == ("queue_full", "rate_limit_error")
    assert naps == [17.0, 17.0]
    assert [int(headers[b"x-stainless-retry-count"]) for _, headers, _ in served.requests] == [0, 1, 2]


def test_a_client_that_comes_back_later_is_served(served, monkeypatch):
    served.backend.error = ApiError("queue_full", "128 requests are under way", retry_after=1.0)

    def recover(seconds):
        served.backend.error = None

    monkeypatch.setattr(openai._base_client.time, "sleep", recover)
    answer = served.client(max_retries=1).images.generate(prompt="3", extra_body={"seed": 4})
    assert (decode(answer.data)[0] == pixels(3, 1, 1.0, 4, 0)[..., 0]).all()
    assert len(served.requests) == 2


def test_a_key_that_asks_too_often_is_told_to_wait(served, naps):
    client = served.client(SLOW_TOKEN, max_retries=0)
    client.models.list()
    error = refused(client.models.list, openai.RateLimitError, 429)
    assert error.code == "rate_limit_exceeded"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    served.client().models.list()


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (ApiError("unavailable", "no replica answers", retry_after=1.0), 503, "unavailable"),
        (ApiError("deadline_exceeded", "no answer within 30 s"), 504, "deadline_exceeded"),
        (ApiError("internal_error", "the model failed on this request"), 500, "internal_error"),
        (RuntimeError("/srv/app/secret.py broke"), 500, "internal_error"),
    ],
)
def test_faults_of_the_service_are_server_errors_and_tried_again(served, naps, fault, status, code):
    served.backend.error = fault
    client = served.client(max_retries=1)
    error = refused(lambda: client.images.generate(prompt="3"), openai.InternalServerError, status)
    assert (error.code, error.type) == (code, "server_error")
    assert "secret" not in error.message
    assert len(naps) == 1
    assert len(served.requests) == 2


def test_a_service_that_has_lost_its_replicas_still_answers_in_form(served, naps):
    served.backend.lookup_error = ApiError("unavailable", "no replica answers", retry_after=1.0)
    client = served.client(max_retries=0)
    assert refused(client.models.list, openai.InternalServerError, 503).code == "unavailable"
    assert httpx2.get(f"{served.url}/healthz").text == "OK\n"
