"""Decisions by HTTP: what is asked is what the policy is asked, and what is wrong is told in one line."""

import asyncio
import io
import zlib
from base64 import b64encode
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from serving_parts import BLOCKS, FakeBackend, png, service, toy_choice
from starlette.testclient import TestClient
from toy_environment import SIZE, SPACE
from toy_policy import observations

from actors.serving.actions_api import ActionsAnswer
from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.selecting import check_defaults
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream

SEEN = observations(1)[0]
IMAGE = SEEN.images["top"]
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def encoded(data: bytes) -> str:
    return b64encode(data).decode()


def raw(image: np.ndarray, **changes: object) -> dict:
    return {"shape": list(image.shape), "dtype": str(image.dtype), "data": encoded(image.tobytes())} | changes


def body(**changes: object) -> dict:
    """A request that is in order, some of whose fields are others; those that are None are left out."""
    seen = {"images": {"top": png(IMAGE)}, "state": SEEN.state.tolist(), "instruction": SEEN.instruction}
    observation = seen | changes.pop("observation", {})
    fields = {"observation": observation, "seed": 7, "decision": 2} | changes
    return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def client(backend: FakeBackend | None = None, **config: object):
    backend = backend or FakeBackend()
    with TestClient(create_app(backend, service(**config)), raise_server_exceptions=False) as found:
        found.backend = backend
        yield found


@pytest.fixture(scope="module")
def shared():
    with client() as found:
        yield found


def post(client: TestClient, sent: dict, **options: object) -> dict:
    answer = client.post("/v1/actions", json=sent, **options)
    assert answer.status_code == 200, answer.text
    ActionsAnswer.model_validate(answer.json(), strict=True)
    return answer.json()


def test_the_policy_sees_what_was_sent_and_its_chunk_comes_back(shared) -> None:
    answer = post(shared, body())
    asked, _ = shared.backend.asked[-1]
    assert asked.model == "blocks"
    assert np.array_equal(asked.observation.images["top"], IMAGE)
    assert asked.observation.state.dtype == np.float32
    assert np.array_equal(asked.observation.state, SEEN.state)
    assert asked.observation.instruction == SEEN.instruction
    assert asked.stream == Stream(7, 2)
    expected = toy_choice(Stream(7, 2), asked.selection)
    assert np.array_equal(np.float32(answer["actions"]), expected.actions)
    assert (answer["model"], answer["version"], answer["selection"]) == ("blocks", "blocks-v1", "greedy")
    assert (answer["seed"], answer["decision"], answer["chosen"]) == (7, 2, 0)
    assert answer["action_space"] == SPACE.model_dump(mode="json")
    assert answer["candidates"] is None
    assert answer["timings"]["queue_ms"] == 1.0
    assert answer["timings"]["compute_ms"] == 2.0


@pytest.mark.parametrize(
    "image",
    [png(IMAGE), "data:image/png;base64," + png(IMAGE), "DATA:image/PNG;base64," + png(IMAGE), raw(IMAGE)],
)
def test_images_come_as_png_as_data_url_or_as_bytes(shared, image: object) -> None:
    post(shared, body(observation={"images": {"top": image}}))
    assert np.array_equal(shared.backend.asked[-1][0].observation.images["top"], IMAGE)


def test_large_images_are_decoded_in_a_thread_just_the_same() -> None:
    side = 256
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    space = BLOCKS.details["observation_space"] | {"cameras": {"top": [side, side]}}
    info = BLOCKS.__class__(**{**vars(BLOCKS), "details": {**BLOCKS.details, "observation_space": space}})
    with client(FakeBackend(infos=(info,), error=ApiError("unavailable", "enough"))) as found:
        answer = found.post("/v1/actions", json=body(observation={"images": {"top": png(noise)}}))
    # The fake backend knows its own camera's size only, and refuses what has passed the gateway.
    assert answer.json()["error"]["message"].startswith("observation.images['top'] is uint8 [256, 256, 3]")


def test_the_same_request_has_the_same_answer_and_a_drawn_seed_is_told(shared) -> None:
    first, again = (post(shared, body(selection="random")) for _ in range(2))
    assert first["actions"] == again["actions"]
    drawn = post(shared, body(selection="random", seed=None))
    other = post(shared, body(selection="random", seed=None))
    assert drawn["seed"] != other["seed"]
    assert drawn["seed"] < 2**53
    assert post(shared, body(selection="random", seed=drawn["seed"]))["actions"] == drawn["actions"]
    assert post(shared, body(selection="random", decision=3))["actions"] != first["actions"]


SELECTIONS = [
    ({}, SelectionConfig(rule="greedy", candidates=1)),
    ({"selection": "greedy", "num_candidates": 1}, SelectionConfig(rule="greedy", candidates=1)),
    ({"selection": "mg-select"}, SelectionConfig(rule="masked_condition", mask="text")),
    (
        {"selection": "mg-select", "mask": "both", "num_candidates": 8, "temperature": 1},
        SelectionConfig(rule="masked_condition", mask="both", candidates=8, temperature=1.0),
    ),
    ({"selection": "random", "num_candidates": 1}, SelectionConfig(rule="random", candidates=1)),
    ({"selection": "likelihood"}, SelectionConfig(rule="likelihood")),
    ({"selection": "entropy"}, SelectionConfig(rule="entropy")),
    ({"selection": "self-certainty"}, SelectionConfig(rule="self_certainty")),
    (
        {
            "selection": {
                "rule": "masked_condition",
                "mask": "state",
                "first_tokens": None,
                "aggregate": "mean",
            }
        },
        SelectionConfig(rule="masked_condition", mask="state", first_tokens=None, aggregate="mean"),
    ),
    ({"selection": {"rule": "entropy"}, "num_candidates": 2}, SelectionConfig(rule="entropy", candidates=2)),
    ({"selection": {"rule": "entropy", "candidates": None}}, SelectionConfig(rule="entropy")),
]


@pytest.mark.parametrize(("fields", "expected"), SELECTIONS)
def test_a_selection_is_a_name_or_its_settings(shared, fields: dict, expected: SelectionConfig) -> None:
    post(shared, body(**fields))
    assert shared.backend.asked[-1][0].selection == expected


def test_what_a_request_leaves_out_is_as_the_service_says() -> None:
    defaults = {"rule": "masked_condition", "mask": "state", "candidates": 6, "temperature": 0.9}
    with client(
        actions={"models": [{"name": "blocks", "checkpoint": "policy@7"}], "selection": defaults}
    ) as found:
        for fields, expected in [
            ({}, SelectionConfig(**defaults)),
            (
                {"mask": "text", "num_candidates": 2},
                SelectionConfig(**defaults | {"mask": "text", "candidates": 2}),
            ),
            ({"selection": "entropy"}, SelectionConfig(rule="entropy", candidates=6, temperature=0.9)),
            ({"selection": "greedy"}, SelectionConfig(rule="greedy", candidates=1)),
        ]:
            post(found, body(**fields))
            assert found.backend.asked[-1][0].selection == expected


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"rule": "oracle"}, "rule=oracle cannot be served"),
        ({"candidate": 4}, "candidate: Extra inputs"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"mask": "none"}, "mask=none: rule=masked_condition needs"),
        ({"rule": []}, "rule="),
    ],
)
def test_unfit_defaults_end_the_start(defaults: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        check_defaults(defaults)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=words):
        create_app(
            FakeBackend(),
            service(actions={"models": [{"name": "b", "checkpoint": "c"}], "selection": defaults}),
        )


def test_candidates_are_listed_if_asked_for_and_nothing_in_them_is_nan() -> None:
    with client(FakeBackend(undecodable=1)) as found:
        answer = post(found, body(selection="mg-select", num_candidates=3, return_candidates=True))
    decision = toy_choice(
        Stream(7, 2), SelectionConfig(rule="masked_condition", mask="text", candidates=3), 1
    )
    first, *others = answer["candidates"]
    assert (first["actions"], first["confidence"], first["tokens"]) == (None, None, [0, 1])
    for candidate, actions, confidence in zip(
        others, decision.candidates[1:], decision.confidences[1:], strict=True
    ):
        assert np.array_equal(np.float32(candidate["actions"]), actions)
        assert candidate["confidence"] == confidence
    assert (answer["chosen"], answer["rejected"]) == (decision.chosen, 1)
    with client(FakeBackend(undecodable=9)) as found:
        answer = post(found, body(selection="random", num_candidates=2, return_candidates=True))
    assert answer["chosen"] == -1
    assert [candidate["actions"] for candidate in answer["candidates"]] == [None, None]


def picture(
    mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE), form: str = "png", **options: object
) -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return encoded(file.getvalue())


def bomb(side: int) -> str:
    """A PNG of a few bytes whose header promises `side` x `side` pixels."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return encoded(bytes(data))


def chatty() -> str:
    """A PNG whose text unpacks to far more than it weighs."""
    text = PngImagePlugin.PngInfo()
    for key in range(80):
        text.add_text(str(key), "x" * 2**20, zip=True)
    return picture(pnginfo=text)


IMAGES = [
    (
        picture(size=(8, 8)),
        "is uint8 [8, 8, 3], the policy expects uint8 [16, 16, 3]: resize it as in training",
    ),
    (raw(IMAGE[:8]), "is uint8 [8, 16, 3], the policy expects uint8 [16, 16, 3]"),
    (bomb(9_000), "is uint8 [9000, 9000, 3], the policy expects"),
    (bomb(60_000), "no PNG that can be read"),
    (bomb(SIZE), "no PNG that can be read"),
    (chatty(), "no PNG that can be read"),
    (picture("RGBA"), "is a PNG of mode RGBA: convert it to RGB"),
    (picture("L"), "is a PNG of mode L"),
    (picture("P"), "is a PNG of mode P"),
    (picture(form="jpeg"), "no PNG that can be read"),
    (picture(form="gif"), "no PNG that can be read"),
    (png(NOISE)[:400], "no PNG that can be read"),
    (encoded(b"\x89PNG\r\n\x1a\n"), "no PNG that can be read"),
    ("", "no PNG that can be read"),
    ("not base64!", "is not base64"),
    (png(IMAGE)[:-3] + "\n==", "is not base64"),
    ("Ä" * 8, "is not base64"),
    ("data:image/jpeg;base64,AAAA", "data URL of another kind"),
    ("data:", "data URL of another kind"),
    (raw(IMAGE, data="AAAA"), ".data has 3 bytes, uint8 [16, 16, 3] takes 768"),
    (raw(IMAGE, data="?"), ".data is not base64"),
]


@pytest.mark.parametrize(("image", "words"), IMAGES, ids=range(len(IMAGES)))
def test_a_bad_image_is_refused_in_one_line(shared, image: object, words: str) -> None:
    before = shared.backend.started
    answer = shared.post("/v1/actions", json=body(observation={"images": {"top": image}}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "observation")
    assert "observation.images['top']" in error["message"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert shared.backend.started == before


BAD = [
    ({"observation": {"images": {"top": png(IMAGE), "side": "x"}}}, "observation", "which the policy lacks"),
    ({"observation": {"images": {}}}, "observation.images", ""),
    ({"observation": {"images": {"top": 5}}}, "observation.images.top.png", ""),
    (
        {"observation": {"images": {"top": raw(IMAGE, dtype="float32")}}},
        "observation.images.top.raw.dtype",
        "",
    ),
    (
        {"observation": {"images": {"top": raw(IMAGE, shape=[16, 16])}}},
        "observation.images.top.raw.shape",
        "",
    ),
    (
        {"observation": {"images": {"top": raw(IMAGE, shape=[-1, 16, 3])}}},
        "observation.images.top.raw.shape.0",
        "",
    ),
    ({"observation": {"images": {"top": raw(IMAGE, more=1)}}}, "observation.images.top.raw.more", ""),
    ({"observation": {"state": [0.5]}}, "observation", "has shape [1], the policy expects [2] (x, y)"),
    ({"observation": {"state": []}}, "observation", "has shape [0]"),
    ({"observation": {"state": [1e300, 0.0]}}, "observation", "is not finite in x"),
    ({"observation": {"state": [0.0] * 2000}}, "observation.state", ""),
    ({"observation": {"state": ["1", "2"]}}, "observation.state.0", ""),
    ({"observation": {"state": [True, 2]}}, "observation.state.0", ""),
    ({"observation": {"instruction": " "}}, "observation", "instruction is empty"),
    ({"observation": {"instruction": "x" * 3000}}, "observation.instruction", ""),
    ({"observation": {"more": 1}}, "observation.more", "leave it out"),
    ({"selection": "oracle"}, "selection.name", "oracle"),
    ({"selection": {"rule": "oracle"}}, "selection.settings.rule", ""),
    ({"selection": {"rules": "greedy"}}, "selection.settings.rules", "leave it out"),
    ({"selection": 4}, "selection.name", ""),
    ({"selection": {"candidates": 2}, "num_candidates": 2}, "num_candidates", "give one of them"),
    ({"selection": "greedy", "num_candidates": 4}, "num_candidates", "has no meaning for selection=greedy"),
    ({"num_candidates": 4}, "num_candidates", "has no meaning for selection=greedy"),
    ({"selection": "greedy", "temperature": 1.0}, "temperature", "has no meaning for selection=greedy"),
    ({"mask": "text"}, "mask", "has no meaning for selection=greedy"),
    ({"selection": "entropy", "mask": "text"}, "selection", "mask=text has no meaning for rule=entropy"),
    ({"selection": "mg-select", "mask": "none"}, "mask", ""),
    ({"selection": "mg-select", "num_candidates": 17}, "num_candidates", "give at most 16"),
    ({"selection": {"rule": "random", "candidates": 17}}, "num_candidates", "give at most 16"),
    ({"selection": "mg-select", "num_candidates": 0}, "num_candidates", ""),
    ({"selection": "mg-select", "num_candidates": "4"}, "num_candidates", ""),
    ({"selection": "mg-select", "num_candidates": True}, "num_candidates", ""),
    ({"selection": "random", "temperature": 0}, "temperature", ""),
    ({"selection": "random", "temperature": 1e-300}, "temperature", ""),
    ({"seed": -1}, "seed", ""),
    ({"seed": 2**63}, "seed", ""),
    ({"seed": 1.5}, "seed", ""),
    ({"decision": -1}, "decision", ""),
    ({"return_candidates": 1}, "return_candidates", ""),
    ({"model": "digits"}, "model", "is no policy"),
    ({"more": 1}, "more", "leave it out"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_field_is_refused_by_its_name(shared, fields: dict, param: str, words: str) -> None:
    before = shared.backend.started
    answer = shared.post("/v1/actions", json=body(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", param), error
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    assert shared.backend.started == before


def test_a_condition_that_the_policy_lacks_cannot_be_masked() -> None:
    info = BLOCKS.__class__(**{**vars(BLOCKS), "details": {**BLOCKS.details, "conditions": ["text"]}})
    with client(FakeBackend(infos=(info,))) as found:
        post(found, body(selection="mg-select"))
        answer = found.post("/v1/actions", json=body(selection="mg-select", mask="both"))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "mask")
    assert error["message"] == (
        "mask=both hides state, which this policy is never told (it has text): use text"
    )


def test_the_model_may_be_named_and_must_be_there(shared) -> None:
    assert post(shared, body(model="blocks"))["model"] == "blocks"
    answer = shared.post("/v1/actions", json=body(model="nobody"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    with client(FakeBackend(infos=()), actions={}, simulator=None) as found:
        answer = found.post("/v1/actions", json=body())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_the_deadline_is_the_clients_and_passing_it_is_told() -> None:
    with client(FakeBackend(gate=asyncio.Event())) as found:
        answer = found.post("/v1/actions", json=body(), headers={"x-deadline-ms": "20"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert found.backend.asked[-1][1] == 0.02
        answer = found.post("/v1/actions", json=body(), headers={"x-deadline-ms": "soon"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-deadline-ms")


def test_work_is_told_in_headers_and_counted(shared) -> None:
    answer = shared.post("/v1/actions", json=body())
    assert answer.headers["x-model-version"] == "blocks-v1"
    assert answer.headers["x-batch-size"] == "1"
    assert answer.headers["x-request-id"]
    metrics = shared.get("/metrics").text
    assert 'counterpoint_batch_size_count{kind="actions",model="blocks"}' in metrics
    assert 'counterpoint_requests_total{endpoint="/v1/actions",model="blocks",status="200"}' in metrics
    assert 'counterpoint_queue_length{kind="actions"} 0.0' in metrics


def test_a_full_service_says_when_to_come_back() -> None:
    backend = FakeBackend(gate=asyncio.Event())
    app = create_app(backend, service(limits={"max_queue": 1}))

    async def ask() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as found:
            first = asyncio.create_task(found.post("/v1/actions", json=body()))
            while not backend.started:
                await asyncio.sleep(0)
            second = await found.post("/v1/actions", json=body())
            assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
            assert int(second.headers["retry-after"]) >= 1
            backend.gate.set()
            assert (await first).status_code == 200

    asyncio.run(ask())


def test_a_failing_backend_is_told_as_it_says() -> None:
    with client(FakeBackend(error=ApiError("unavailable", "no replica", retry_after=2.0))) as found:
        answer = found.post("/v1/actions", json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def test_the_document_has_the_request_and_the_answer(shared) -> None:
    document = shared.get("/openapi.json").json()
    route = document["paths"]["/v1/actions"]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ActionsBody")
    assert route["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/ActionsAnswer"
    )
    for name in ("ActionsBody", "ObservationBody", "SelectionBody", "ActionsAnswer", "RawImage"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"
