"""None of a thousand malformed requests is taken or breaks the service; each is told what is wrong."""

import asyncio
import json

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from malformed import Malformed, complaint, hammer, malformed, operations
from serving_parts import FakeBackend, service

from actors.serving.app import create_app
from actors.serving.keys import new_token

ROUTES = {"/v1/images/generations", "/v1/actions", "/v1/episodes"}
FAULTS = (
    "field: value", "field: edge", "field: extra", "field: text", "body: cut", "body: type", "header",
    "model",
)  # fmt: skip
COUNT = 1200


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


class InProcess:
    """An httpx2.Client, as far as it is needed here, whose requests go to an application without a thread."""

    def __init__(self, app):
        self.loop = asyncio.new_event_loop()
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://here")

    def request(self, method, path, **options):
        return self.loop.run_until_complete(self.client.request(method, path, **options))

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, **options):
        return self.request("POST", path, **options)


@pytest.fixture(scope="module")
def client(backend):
    client = InProcess(create_app(backend, service(limits={"max_body_bytes": 2**20})))
    yield client
    client.loop.close()


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


def test_every_malformed_request_is_refused_in_form(client, backend):
    sent = hammer(client, COUNT, seed=1)
    assert sent.total() >= 500
    missing = [(route, fault) for route in ROUTES for fault in FAULTS if not sent[f"{route} {fault}"]]
    assert missing == []
    for route in ROUTES:
        assert sum(count for key, count in sent.items() if key.startswith(route)) > COUNT / 20
    assert backend.asked == []


def test_the_service_is_well_afterwards(client):
    answer = client.post("/v1/images/generations", json={"prompt": "3", "seed": 1})
    assert answer.status_code == 200
    assert client.get("/healthz").text == "OK\n"


def test_the_document_describes_all_routes_that_take_json(document):
    assert {route.path for route in operations(document)} == ROUTES


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/episodes"])
def test_bodies_are_valid_but_for_their_fault(client, document, path):
    (route,) = [one for one in operations(document) if one.path == path]
    assert client.post(path, json=route.example()).status_code == 200


def test_malformed_requests_with_a_key_are_refused_and_without_one_not_even_read(backend):
    token, digest = new_token()
    client = InProcess(create_app(backend, service(keys=[{"name": "me", "sha256": digest}])))
    assert hammer(client, 100, seed=2, headers={"authorization": f"Bearer {token}"}).total() >= 50
    for content in (b"", b"{", b'{"prompt": "3"}'):
        answer = client.post("/v1/images/generations", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    client.loop.close()


def test_what_is_generated_is_no_request_of_the_schema(document):
    routes = {route.path: route for route in operations(document)}
    seen = set()

    def no_constant(name):
        raise ValueError(name)

    @settings(
        max_examples=300,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(malformed(document))
    def never_valid(asked):
        if not asked.fault.startswith("field"):
            return
        try:
            body = json.loads(asked.content, parse_constant=no_constant)
        except (ValueError, RecursionError):
            assert asked.field is None  # the JSON is at fault
            return
        if asked.field is not None:
            assert not routes[asked.path].valid(body)
            seen.add(asked.field)

    never_valid()
    assert len(seen) > 8


class Answer:
    """An answer that a careless service might give."""

    def __init__(self, status, content):
        self.status_code, self.content, self.headers = status, content, {"x-request-id": "r"}

    def json(self):
        return json.loads(self.content)


def told(message="n=0 is too few", kind="invalid_request_error", param="n", code="invalid_value"):
    """Return an error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


@pytest.mark.parametrize(
    ("status", "content", "fragment"),
    [
        (200, told(), "status 200"),
        (500, told(), "status 500"),
        (307, "", "status 307"),
        (400, "<html>", "no JSON"),
        (400, '{"detail": []}', "not in form"),
        (400, told(message=""), "message ''"),
        (400, told(message='File "/srv/app/app.py", line 3'), "leaks"),
        (400, told(kind="server_error"), "of type"),
        (400, told(code="oops"), "code 'oops'"),
        (400, told(param=None), "the fault is in 'n'"),
        (400, told(param="size"), "the fault is in 'n'"),
        (400, told(param=3), "param 3"),
    ],
)
def test_a_careless_answer_is_noticed(status, content, fragment):
    assert fragment in complaint(Malformed("field", "POST", "/v1", field="n"), Answer(status, content))


def test_a_careful_answer_passes():
    assert complaint(Malformed("field", "POST", "/v1", field="n"), Answer(400, told())) is None
    assert complaint(Malformed("field", "POST", "/v1", field="n"), Answer(400, told(param="n.0"))) is None
