"""POST /v1/images/generations and GET /v1/models: what the backend is asked, and what clients get to see."""

import asyncio
import base64
import io
from dataclasses import replace
from http import HTTPStatus

import httpx2
import numpy as np
import pytest
from PIL import Image
from serving_parts import DIGITS, SIDE, FakeBackend, pixels, service
from starlette.testclient import TestClient

from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.messages import ImageRequest

URL = "/v1/images/generations"


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def client(backend):
    with TestClient(create_app(backend, service())) as client:
        yield client


def decode(answer):
    """Return the images of an answer as arrays."""
    files = [base64.b64decode(entry["b64_json"], validate=True) for entry in answer["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def error(response, status=400):
    """Return what an error says, in OpenAI's form."""
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert "\n" not in told["message"]
    return told


# The route


def test_images_are_those_of_the_seed(client, backend):
    body = {"prompt": "a three", "n": 3, "seed": 7, "num_inference_steps": 2, "guidance_scale": 1.5}
    response = client.post(URL, json=body)
    answer = response.json()
    assert response.status_code == HTTPStatus.OK
    wanted = [pixels(3, 2, 1.5, 7, index)[..., 0] for index in range(3)]
    assert all((got == image).all() for got, image in zip(decode(answer), wanted, strict=True))
    assert backend.asked == [(ImageRequest("digits", 3, 3, 2, 1.5, 7), 30.0)]
    told = {key: answer[key] for key in ("model", "version", "class_label", "seed", "num_inference_steps")}
    assert told == {
        "model": "digits", "version": "digits-v1", "class_label": 3, "seed": 7, "num_inference_steps": 2,
    }  # fmt: skip
    assert (answer["guidance_scale"], answer["output_format"], answer["size"]) == (1.5, "png", "8x8")
    assert client.post(URL, json=body).json()["data"] == answer["data"]


def test_defaults_are_one_image_in_one_step_of_the_first_model(client, backend):
    client.post(URL, json={"prompt": "3", "seed": 5})
    client.post(URL, json={"prompt": "3", "seed": 5, "n": None, "size": None, "guidance_scale": None})
    assert [asked for asked, _ in backend.asked] == [ImageRequest("digits", 3, 1, 1, 1.0, 5)] * 2


def test_the_solver_and_the_guidance_are_the_requests_own(client, backend):
    body = {
        "prompt": "3", "seed": 5, "num_inference_steps": 4, "guidance_scale": 3, **APG,
        "scheduler": "UniPCMultistepScheduler", "guider_options": {"eta": 0.5, "stop": None, "start": 0},
    }  # fmt: skip
    answer = client.post(URL, json=body).json()
    options = {"start": 0.0, "eta": 0.5}
    asked = ImageRequest("digits", 3, 1, 4, 3.0, 5, body["scheduler"], body["guider"], tuple(options.items()))
    assert backend.asked == [(asked, 30.0)]
    assert {name: answer[name] for name in ("scheduler", "guider", "guider_options")} == {
        "scheduler": body["scheduler"], "guider": body["guider"], "guider_options": options,
    }  # fmt: skip
    plain = client.post(URL, json={"prompt": "3"}).json()
    assert [plain[name] for name in ("scheduler", "guider", "guider_options")] == ["DDIMScheduler", None, {}]


def test_a_seed_is_drawn_where_none_is_given_and_repeats_the_images(client):
    first, second = (client.post(URL, json={"prompt": "3"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 2**53
    again = client.post(URL, json={"class_label": first["class_label"], "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_large_seeds_arrive_exactly(client, backend, seed):
    assert client.post(URL, json={"prompt": "3", "seed": seed}).json()["seed"] == seed
    assert backend.asked[0][0].seed == seed


@pytest.mark.parametrize(
    "body",
    [
        {"class_label": 3}, {"class_label": "three"}, {"class_label": "3"}, {"class_label": 3, "prompt": ""},
        {"class_label": 3, "prompt": "a nice three"}, {"prompt": " 3 "},
    ],
)  # fmt: skip
def test_a_class_is_meant_by_label_name_or_prompt(client, backend, body):
    assert client.post(URL, json=body).status_code == HTTPStatus.OK
    assert backend.asked[0][0].label == 3


@pytest.mark.parametrize("size", ["auto", "8x8", "16x16", "1024x1024"])
def test_sizes_repeat_pixels(client, size):
    answer = client.post(URL, json={"prompt": "3", "seed": 1, "size": size}).json()
    side = SIDE if size == "auto" else int(size.partition("x")[0])
    (image,) = decode(answer)
    assert answer["size"] == f"{side}x{side}"
    assert (image == np.kron(pixels(3, 1, 1.0, 1, 0)[..., 0], np.ones((side // SIDE,) * 2, np.uint8))).all()


def test_an_image_that_is_wider_than_high_keeps_its_shape(backend, monkeypatch):
    backend.infos = (replace(DIGITS, details={**DIGITS.details, "width": 12}),)

    async def generate(request, deadline_s):
        answer = await FakeBackend.generate(backend, request, deadline_s)
        return replace(answer, images=np.repeat(answer.images, 3, axis=2)[:, :, ::2])

    monkeypatch.setattr(backend, "generate", generate)
    with TestClient(create_app(backend, service())) as client:
        assert client.post(URL, json={"prompt": "3"}).json()["size"] == "12x8"
        answer = client.post(URL, json={"prompt": "3", "size": "24x16"}).json()
        assert (answer["size"], decode(answer)[0].shape) == ("24x16", (16, 24))
        for size in ("16x24", "24x24", "12x16"):
            assert error(client.post(URL, json={"prompt": "3", "size": size}))["param"] == "size"


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_files_are_of_the_format_that_is_asked_for(client, form):
    body = {"prompt": "3", "output_format": form, "output_compression": 100}
    answer = client.post(URL, json=body).json()
    file = base64.b64decode(answer["data"][0]["b64_json"])
    assert (Image.open(io.BytesIO(file)).format, answer["output_format"]) == (form.upper(), form)


APG = {"guider": "AdaptiveProjectedGuidance"}
REFUSALS = [
    ({"prompt": None}, "prompt", "prompt is missing or empty: name one of zero (0)"),
    ({"prompt": "  "}, "prompt", "prompt is missing or empty: name one of zero (0)"),
    ({"prompt": "a cat"}, "prompt", 'prompt="a cat" names no class: name one of zero (0), one (1)'),
    ({"prompt": "one or two"}, "prompt", "names 2 classes, one (1), two (2): name exactly one"),
    ({"prompt": "3", "class_label": 4}, "prompt", "leave one of the two out"),
    ({"prompt": "x" * 32_001}, "prompt", "prompt="),
    ({"prompt": ["3"]}, "prompt", "prompt=a list of 1 is not allowed"),
    ({"class_label": 10}, "class_label", "class_label=10 is no class: give one of zero (0)"),
    ({"class_label": "cat"}, "class_label", 'class_label="cat" names no class'),
    ({"class_label": True}, "class_label", "class_label=true"),
    ({"class_label": -1}, "class_label", "class_label=-1"),
    ({"n": 0}, "n", "n=0"),
    ({"n": 11}, "n", "n=11 is above 10: ask for less"),
    ({"n": 10**400}, "n", "is above 10"),
    ({"n": "3"}, "n", 'n="3"'),
    ({"n": True}, "n", "n=true"),
    ({"n": 2.5}, "n", "n=2.5"),
    ({"n": 2.0}, "n", "n=2.0"),
    ({"size": "big"}, "size", 'size="big"'),
    ({"size": "12x12"}, "size", "no whole multiple of 8x8, the size of model digits: ask for auto, 8x8"),
    ({"size": "8x16"}, "size", "no whole multiple of 8x8"),
    ({"size": "4x4"}, "size", "no whole multiple of 8x8"),
    ({"size": "1032x1032"}, "size", 'size="1032x1032" is beyond 1024 pixels a side: ask for less'),
    ({"size": "8x8\n"}, "size", "size="),
    ({"seed": -1}, "seed", "seed=-1"),
    ({"seed": 2**63}, "seed", "9223372036854775807"),
    ({"seed": "7"}, "seed", 'seed="7"'),
    ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps=0"),
    ({"num_inference_steps": 5}, "num_inference_steps", "=5 is above 4, the most that model digits takes"),
    ({"guidance_scale": 20.5}, "guidance_scale", "guidance_scale=20.5"),
    ({"guidance_scale": -1}, "guidance_scale", "guidance_scale=-1"),
    ({"guidance_scale": "1"}, "guidance_scale", 'guidance_scale="1"'),
    ({"scheduler": "DDPMScheduler"}, "scheduler", 'scheduler="DDPMScheduler"'),
    ({"scheduler": "DEISMultistepScheduler"}, "scheduler",
     "scheduler=DEISMultistepScheduler is not offered by model digits: ask for DDIMScheduler, UniPC"),
    ({"scheduler": 3}, "scheduler", "scheduler=3"),
    ({"guider": "SkipLayerGuidance"}, "guider", 'guider="SkipLayerGuidance"'),
    ({"guider": "RatioAwareGuidance"}, "guider",
     "guider=RatioAwareGuidance is not offered by model digits: ask for ClassifierFreeGuidance, Ada"),
    ({"guider_options": {"eta": 0.5}}, "guider_options", "given without a guider: name one"),
    ({**APG, "guider_options": {"layers": ["mid"]}}, "guider_options.layers", "is not a field"),
    ({**APG, "guider_options": {"eta": "0.5"}}, "guider_options.eta", 'guider_options.eta="0.5"'),
    ({**APG, "guider_options": {"eta": 1.5}}, "guider_options.eta", "guider_options.eta=1.5"),
    ({**APG, "guider_options": {"start": 1.0}}, "guider_options.start", "guider_options.start=1"),
    ({**APG, "guider_options": {"start": 0.5, "stop": 0.2}}, "guider_options.stop", "is below start=0.5"),
    ({**APG, "guider_options": {"zero_init_steps": 1}}, "guider_options.zero_init_steps",
     "no option of AdaptiveProjectedGuidance: it has start, stop"),
    ({**APG, "guider_options": [1]}, "guider_options", "guider_options=a list of 1"),
    ({"response_format": "url"}, "response_format", "nothing is kept here: ask for b64_json"),
    ({"output_format": "gif"}, "output_format", 'output_format="gif"'),
    ({"output_compression": 50}, "output_compression", "=50 has no meaning for png: leave it out, or"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "output_compression=101"),
    ({"stream": True}, "stream", "stream=true is not allowed: streams are not offered"),
    ({"stream": 0}, "stream", "stream=0"),
    ({"partial_images": 1}, "partial_images", "partial_images=1"),
    ({"background": "transparent"}, "background", "all images are opaque"),
    ({"quality": "best"}, "quality", 'quality="best"'),
    ({"negative_prompt": "blue"}, "negative_prompt", "negative_prompt is not a field"),
    ({"svg": {}}, "svg", "svg is not a field"),
    ({"model": "blocks"}, "model", 'model="blocks" makes no images: GET /v1/models lists'),
    ({"model": ""}, "model", "model="),
    ({"model": 3}, "model", "model=3"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "fragment"), REFUSALS)
def test_what_cannot_be_granted_is_refused_by_name(client, backend, change, param, fragment):
    base = {} if "class_label" in change else {"prompt": "a three"}
    told = error(client.post(URL, json={**base, **change}))
    assert (told["param"], told["code"], told["type"]) == (param, "invalid_value", "invalid_request_error")
    assert fragment in told["message"]
    assert len(told["message"]) < 500
    assert backend.asked == []


HARMLESS = {
    "user": ["me", None], "safety_identifier": ["me"], "quality": ["auto", "hd", "high", None],
    "style": ["vivid"], "moderation": ["low", "auto"], "background": ["auto", "opaque"],
    "stream": [False, None], "partial_images": [0], "response_format": ["b64_json", None],
    "complexity": ["high"],
}  # fmt: skip


@pytest.mark.parametrize("field", HARMLESS)
def test_fields_of_openai_that_mean_nothing_here_change_nothing(client, backend, field):
    body = {"prompt": "3", "seed": 7}
    plain = client.post(URL, json=body).json()
    for value in HARMLESS[field]:
        assert client.post(URL, json={**body, field: value}).json()["data"] == plain["data"]
    assert len({asked for asked, _ in backend.asked}) == 1


def test_an_unknown_model_is_not_found(client):
    for model in ("dall-e-3", "../../etc/passwd", "digits\x00"):
        told = error(client.post(URL, json={"prompt": "3", "model": model}), 404)
        assert (told["code"], told["param"]) == ("model_not_found", "model")


def test_a_service_without_a_default_asks_for_a_model(backend):
    with TestClient(create_app(backend, service(images={}))) as client:
        assert "name one" in error(client.post(URL, json={"prompt": "3"}))["message"]
        assert client.post(URL, json={"prompt": "3", "model": "digits"}).status_code == HTTPStatus.OK


def test_limits_are_those_of_the_configuration(backend):
    with TestClient(create_app(backend, service(limits={"max_images": 2, "max_image_side": 4}))) as client:
        assert error(client.post(URL, json={"prompt": "3", "n": 3}))["param"] == "n"
        assert client.post(URL, json={"prompt": "3", "n": 2, "size": "8x8"}).status_code == HTTPStatus.OK
        assert error(client.post(URL, json={"prompt": "3", "size": "16x16"}))["param"] == "size"


def test_the_answer_says_what_it_took(backend, client):
    backend.retries = 2
    response = client.post(URL, json={"prompt": "3", "n": 4, "num_inference_steps": 3})
    answer = response.json()
    assert response.headers["x-model-version"] == "digits-v1"
    assert float(response.headers["x-queue-ms"]) == answer["timings"]["queue_ms"] == 1.0
    assert float(response.headers["x-compute-ms"]) == answer["timings"]["compute_ms"] == 2.0
    assert float(response.headers["x-batch-size"]) == answer["timings"]["batch_size"] == 4.0
    assert response.headers["x-retries"] == "2"
    assert answer["timings"]["total_ms"] > 0
    assert (answer["usage"]["images"], answer["usage"]["evaluations"]) == (4, 3)
    counted = client.get("/metrics").text
    assert f'counterpoint_requests_total{{endpoint="{URL}",model="digits",status="200"}} 1.0' in counted
    assert 'counterpoint_steps_per_request_sum{kind="images",model="digits"} 3.0' in counted
    assert 'counterpoint_retries_total{kind="images",model="digits"} 2.0' in counted


def test_a_deadline_is_passed_on(client, backend):
    body = {"prompt": "3"}
    assert client.post(URL, json=body, headers={"x-deadline-ms": "250"}).status_code == HTTPStatus.OK
    assert backend.asked[0][1] == 0.25
    assert error(client.post(URL, json=body, headers={"x-deadline-ms": "soon"}))["param"] == "x-deadline-ms"
    backend.delay = 60.0
    told = error(client.post(URL, json=body, headers={"x-deadline-ms": "1"}), 504)
    assert (told["code"], told["type"]) == ("deadline_exceeded", "server_error")


def test_a_full_service_says_when_to_come_back_and_lets_others_in_later():
    async def scene():
        backend = FakeBackend(gate=asyncio.Event())
        app = create_app(backend, service(limits={"max_queue": 1}))
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as client:
            first = asyncio.create_task(client.post(URL, json={"prompt": "3"}))
            while not backend.started:
                await asyncio.sleep(0)
            told = await client.post(URL, json={"prompt": "3"})
            assert error(told, 429)["code"] == "queue_full"
            assert int(told.headers["retry-after"]) >= 1
            backend.gate.set()
            assert (await first).status_code == HTTPStatus.OK
            backend.error = ApiError("unavailable", "no replica answers", retry_after=1.0)
            assert error(await client.post(URL, json={"prompt": "3"}), 503)["code"] == "unavailable"
            backend.error = None
            assert (await client.post(URL, json={"prompt": "3"})).status_code == HTTPStatus.OK

    asyncio.run(scene())


# Models


def test_models_are_listed_and_shown(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["digits", "blocks"]
    digits = client.get("/v1/models/digits").json()
    assert digits == listed["data"][0]
    assert digits == {
        "id": "digits", "object": "model", "created": DIGITS.created, "owned_by": "counterpoint",
        "kind": "images", "version": "digits-v1", "checkpoint": "student", "refused": None,
        "details": dict(DIGITS.details),
    }  # fmt: skip


def test_a_refused_promotion_is_shown(backend):
    backend.infos = (replace(DIGITS, refused="student@9 is damaged"),)
    with TestClient(create_app(backend, service())) as client:
        assert client.get("/v1/models/digits").json()["refused"] == "student@9 is damaged"


def test_a_model_whose_name_is_a_path_is_shown(backend):
    backend.infos = (replace(DIGITS, name="runs/student@7"),)
    with TestClient(create_app(backend, service())) as client:
        for path in ("/v1/models/runs/student@7", "/v1/models/runs%2Fstudent%407"):
            assert client.get(path).json()["id"] == "runs/student@7"


@pytest.mark.parametrize("name", ["dall-e-3", "..%2f..%2fetc%2fpasswd", "%00", "%ff", "a/b/c", ""])
def test_a_model_that_is_not_there_is_not_found(client, name):
    assert error(client.get(f"/v1/models/{name}"), 404)["code"] in ("model_not_found", "not_found")


# The document


def test_every_field_is_described_with_an_example(client):
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in (
        "ImagesBody",
        "GuiderOptions",
        "ImagesAnswer",
        "Picture",
        "Usage",
        "TokenDetails",
        "Timings",
        "ModelCard",
    ):
        for field, schema in schemas[name]["properties"].items():
            nested = "$ref" in schema or "items" in schema
            assert schema.get("description"), f"{name}.{field}"
            assert "examples" in schema or nested, f"{name}.{field}"


def test_every_error_is_documented(client):
    paths = client.get("/openapi.json").json()["paths"]
    for method, path in (("post", URL), ("get", "/v1/models"), ("get", "/v1/models/{model}")):
        answers = paths[path][method]["responses"]
        assert {"200", "400", "401", "404", "429", "500", "503", "504"} <= set(answers)
        for status, answer in answers.items():
            reference = answer["content"]["application/json"]["schema"]["$ref"]
            assert status == "200" or reference.endswith("/ErrorBody")
    assert "x-batch-size" in paths[URL]["post"]["responses"]["200"]["headers"]
    assert [header["name"] for header in paths[URL]["post"]["parameters"]] == ["x-deadline-ms"]
