"""The application: one form for all errors, one document, a gate with keys, and nothing that leaks."""

import asyncio
import hashlib
import json
import logging
import re

import pytest
from app_parts import app_of, counted
from asgi_calls import call, get
from serving_parts import FakeBackend, service

from actors.serving.app import create_app
from actors.serving.errors import ApiError
from actors.serving.keys import Keyring
from actors.serving.meters import Meters
from actors.serving.middleware import Gate, Record

TOKEN = "the token of ann"
ANN = {"name": "ann", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
OPEN_PATHS = ["/healthz", "/readyz", "/openapi.json", "/"]


@pytest.fixture(scope="module")
def app():
    return app_of()


def test_routes_and_methods_that_are_not_there_are_told_apart(app):
    answer = get(app, "/v1/nothing")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert '"/v1/nothing"' in answer.error["message"]
    for path in ("/nothing", "/v1/test/", "/v1/\x00", "/" + "x" * 100_000, "/docs", "/redoc", "//v1/test"):
        assert get(app, path).error["code"] == "not_found"
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        answer = asyncio.run(call(app, method, "/v1/test"))
        assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        assert "use POST" in answer.error["message"]
    assert asyncio.run(call(app, "POST", "/healthz")).headers["allow"] == "GET"


def test_a_fault_is_told_by_its_request_id_only_and_its_trace_is_in_the_log(app, caplog):
    answer = get(app, "/v1/test/fail", {"x-request-id": "fault-7"})
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        500,
        "internal_error",
        "server_error",
    )
    assert answer.headers["x-request-id"] == "fault-7"
    assert "fault-7" in answer.error["message"]
    assert b"secret" not in answer.body
    assert b"RuntimeError" not in answer.body
    record = next(record for record in caplog.records if "fault-7" in record.getMessage())
    assert "/secret/place is broken" in str(record.exc_info[1])


def test_a_fault_in_the_middle_of_a_stream_breaks_it_and_is_counted(caplog):
    app = app_of()
    with pytest.raises(RuntimeError):
        get(app, "/v1/test/stream")
    assert "request" in caplog.text
    assert counted(app, endpoint="/v1/test/stream", status=500) == 1


@pytest.mark.parametrize(("seconds", "header"), [(0.01, "1"), (1, "1"), (1.2, "2"), (37, "37")])
def test_retry_after_is_in_whole_seconds_rounded_up(app, seconds, header):
    answer = get(app, "/v1/test/refuse", query_string=f"retry_after={seconds}".encode())
    assert (answer.status, answer.headers["retry-after"]) == (429, header)
    answer = get(app, "/v1/test/refuse", query_string=b"retry_after=soon")
    assert (answer.status, answer.error["param"]) == (400, "retry_after")


def test_a_client_that_hangs_up_cancels_the_work_and_is_counted():
    backend = FakeBackend(delay=60.0)
    app = app_of(backend)

    async def hang_up():
        headers = {"content-type": "application/json"}
        body = json.dumps({"model": "digits", "prompt": "three"}).encode()
        asking = asyncio.create_task(call(app, "POST", "/v1/images/generations", headers, [body]))
        while not backend.started:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(hang_up())
    assert backend.cancelled == 1
    assert counted(app, endpoint="/v1/images/generations", model="digits", status=499) == 1
    assert b'counterpoint_queue_length{kind="images"} 0.0' in get(app, "/metrics").body


def test_every_answer_carries_an_id_and_headers_that_keep_browsers_careful(app):
    seen = set()
    for path in (
        "/healthz",
        "/v1/models",
        "/v1/nothing",
        "/v1/test/fail",
        "/openapi.json",
        "/metrics",
        "/",
        "/x",
    ):
        headers = get(app, path).headers
        seen.add(headers["x-request-id"])
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith(
            "default-src 'self'; img-src 'self' data: blob:;"
        )
        assert "access-control-allow-origin" not in headers
        if path.startswith("/v1"):
            assert headers["cache-control"] == "no-store"
    assert len(seen) == 8


@pytest.mark.parametrize("own", ["a b", "", "x" * 65, "a\r\nset-cookie: x", "é", "a/b", "<script>"])
def test_an_id_of_the_client_s_own_is_taken_if_it_is_plain(app, own):
    assert get(app, "/healthz", {"x-request-id": "Own-1.2_3"}).headers["x-request-id"] == "Own-1.2_3"
    given = get(app, "/healthz", {"x-request-id": own}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)


def test_behind_ray_serve_the_id_is_left_to_its_proxy_which_would_add_a_second_one(caplog):
    app = create_app(FakeBackend(), service(), behind_serve=True)
    with caplog.at_level(logging.INFO):
        answer = get(app, "/v1/models", {"x-request-id": "of-the-proxy"})
    assert "x-request-id" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert caplog.text.rstrip().endswith("id=of-the-proxy")


def test_with_keys_all_of_the_api_asks_for_one_and_the_rest_does_not():
    app = app_of(keys=[ANN])
    for path in ("/v1/models", "/v1/nothing", "/v1/test/fail", "/v1", "/metrics"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Bearer \xff"}):
            answer = get(app, path, headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    answer = asyncio.run(call(app, "POST", "/v1/test", chunks=[b"x"] * 100))
    assert (answer.status, answer.calls_of_receive) == (401, 0)
    for path in OPEN_PATHS:
        assert get(app, path).status == 200
    assert counted(app, TOKEN, endpoint="/v1/models", status=401) == 3
    assert counted(app, TOKEN, endpoint="unmatched", status=401) > 3
    for scheme in ("Bearer", "Api-Key"):
        assert get(app, "/v1/models", {"authorization": f"{scheme} {TOKEN}"}).status == 200
        twice = [("authorization", f"{scheme} {TOKEN}")] * 2
        assert get(app, "/v1/models", twice).status == 401


def test_a_key_that_is_used_up_is_told_when_to_come_back():
    app = app_of(keys=[ANN | {"requests_per_minute": 20}])
    key = {"authorization": f"Bearer {TOKEN}"}
    assert [get(app, "/v1/models", key).status for _ in range(3)] == [200, 200, 429]
    answer = get(app, "/v1/models", key)
    assert (answer.error["code"], answer.headers["retry-after"]) == ("rate_limit_exceeded", "3")


def test_the_log_has_who_asked_for_what_and_never_a_token(caplog):
    app = app_of(keys=[ANN])
    with caplog.at_level(logging.DEBUG):
        get(app, "/v1/models/digits", {"authorization": f"Bearer {TOKEN}", "x-request-id": "id-1"})
        get(app, "/v1/models", {"authorization": "Bearer guessed"}, query_string=b"key=guessed")
        get(app, "/v1/\nforged line", {"authorization": f"Bearer {TOKEN}"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("actors.serving")]
    assert "GET /v1/models/{" in lines[0]
    assert "200" in lines[0]
    assert lines[0].endswith("key='ann' model='digits' id=id-1")
    assert not any("\n" in line for line in lines)
    assert TOKEN not in caplog.text
    assert "guessed" not in caplog.text


def test_metrics_have_few_labels_whatever_clients_ask_for():
    app = app_of()
    before = len(get(app, "/metrics").body.splitlines())
    get(app, "/metrics")
    for number in range(50):
        get(app, f"/v1/nothing-{number}")
        get(app, f"/v1/models/made-up-{number}")
        asyncio.run(call(app, f"METHOD{number}", "/v1/test"))
    assert counted(app, endpoint="unmatched", status=404) == 50
    assert counted(app, endpoint="/v1/models/{", status=404) == 0
    text = get(app, "/metrics").body
    assert b"made-up" not in text
    assert len(text.splitlines()) < before + 100


def test_liveness_does_not_ask_the_models_and_readiness_does():
    backend = FakeBackend(ready_error=ApiError("unavailable", "no replica of images"), delay=60)
    app = app_of(backend)
    answer = get(app, "/healthz")
    assert (answer.status, answer.body) == (200, b"OK\n")
    assert answer.headers["content-type"].startswith("text/plain")
    assert backend.started == 0
    backend.delay = 0.0
    answer = get(app, "/readyz")
    assert (answer.status, answer.error["message"]) == (503, "no replica of images")
    backend.ready_error = None
    models = {
        "digits": {"version": "digits-v1", "refused": None},
        "blocks": {"version": "blocks-v1", "refused": None},
    }
    assert json.loads(get(app, "/readyz").body) == {"status": "ready", "models": models}


def test_readiness_is_given_up_soon_and_health_answers_meanwhile(monkeypatch):
    monkeypatch.setattr("actors.serving.health_routes.READY_S", 0.05)
    backend = FakeBackend(gate=asyncio.Event())
    app = app_of(backend)

    async def both():
        ready = asyncio.create_task(call(app, "GET", "/readyz"))
        while not backend.started:
            await asyncio.sleep(0)
        assert (await call(app, "GET", "/healthz")).body == b"OK\n"
        assert not ready.done()
        return await ready

    answer = asyncio.run(both())
    assert (answer.status, answer.error["code"]) == (503, "unavailable")
    assert backend.cancelled == 1


def test_many_who_ask_for_readiness_make_one_question():
    backend = FakeBackend()
    app = app_of(backend)

    async def ask():
        backend.gate = asyncio.Event()
        asking = [asyncio.create_task(call(app, "GET", "/readyz")) for _ in range(20)]
        while not backend.started:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        asking[0].cancel()  # who asked first hangs up: the others still get their answer
        backend.gate.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert {answer.status for answer in answers[1:]} == {200}
        assert backend.started == 1
        await call(app, "GET", "/readyz")
        assert backend.started == 2

    asyncio.run(ask())


def test_metrics_are_in_prometheus_s_text_format(app):
    from prometheus_client.parser import text_string_to_metric_families

    answer = get(app, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(answer.body.decode())}
    assert {"counterpoint_requests", "counterpoint_request_seconds", "counterpoint_sessions"} <= names


def test_the_document_tells_of_every_route_its_errors_and_the_key(app):
    document = json.loads(get(app, "/openapi.json").body)
    assert (document["info"]["title"], document["info"]["version"]) == ("Counterpoint", "1.0.0")
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    body = {"$ref": "#/components/schemas/ErrorBody"}
    for path in ("/v1/images/generations", "/v1/actions", "/v1/episodes"):
        operation = document["paths"][path]["post"]
        assert operation["security"] == [{"key": []}, {}]
        for status in ("400", "401", "404", "413", "429", "500", "503", "504"):
            assert operation["responses"][status]["content"]["application/json"]["schema"] == body
    assert (
        document["paths"]["/readyz"]["get"]["responses"]["503"]["content"]["application/json"]["schema"]
        == body
    )
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert b"HTTPValidationError" not in get(app, "/openapi.json").body
    assert not any(
        "422" in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        (None, True), (b"http://localhost:8000", True), (b"https://LOCALHOST:8000", True), (b"null", False),
        (b"http://evil.example", False), (b"http://localhost:9", False), (b"\xff", False), (b"", False),
        (b"http://localhost:8000.evil.example", False), (b"http://localhost:8000@evil.example", False),
        (b"http://[", False),
    ],
)  # fmt: skip
def test_sockets_of_pages_of_other_origins_are_turned_away(origin, passes):
    config, sent, inside = service(), [], []

    async def app(scope, receive, send):
        inside.append(scope["path"])

    async def send(message):
        sent.append(message["type"])

    headers = [(b"host", b"localhost:8000")] + ([(b"origin", origin)] if origin is not None else [])
    gate = Record(Gate(app, Keyring(()), config.limits), Meters())
    asyncio.run(gate({"type": "websocket", "path": "/", "headers": headers}, None, send))
    assert (inside, sent) == ((["/"], []) if passes else ([], ["websocket.close"]))
