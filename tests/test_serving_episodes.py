"""Episodes by HTTP: lines as they come, errors before and after the first, and hanging up."""

import asyncio
import json

import pytest
from serving_parts import BLOCKS, DIGITS, FakeBackend, service
from starlette.testclient import TestClient

from actors.serving.app import create_app
from actors.serving.errors import ApiError
from counterpoint.selection.config import SelectionConfig

PATH = "/v1/episodes"


class Broken(FakeBackend):
    """Fails in the middle of an episode."""

    failure: Exception = ApiError("unavailable", "the simulator failed: try again", retry_after=1.0)

    async def play(self, model, selection, seed, deadline_s):
        yield {"event": "start", "seed": seed}
        raise self.failure


class Endless(FakeBackend):
    """Plays until it is stopped, and says so."""

    def __init__(self):
        super().__init__()
        self.playing, self.ended = asyncio.Event(), asyncio.Event()

    async def play(self, model, selection, seed, deadline_s):
        try:
            yield {"event": "start"}
            self.playing.set()
            await asyncio.Event().wait()
        finally:
            self.ended.set()


def client(backend, **changes):
    return TestClient(create_app(backend, service(**changes)), raise_server_exceptions=False)


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def test_an_episode_comes_as_one_json_object_a_line():
    backend = FakeBackend()
    body = {"model": "blocks", "selection": "mg-select", "num_candidates": 3, "mask": "state", "seed": 5}
    answer = client(backend).post(PATH, json=body, headers={"x-deadline-ms": "1500"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    assert "content-length" not in answer.headers
    start, *decisions, end = lines(answer)
    assert (start["event"], start["seed"], end["event"]) == ("start", 5, "end")
    assert {event["event"] for event in decisions} == {"decision"}
    ((model, selection, seed), deadline_s) = backend.asked[0]
    assert (model, seed, deadline_s) == ("blocks", 5, 1.5)
    expected = SelectionConfig(rule="masked_condition", candidates=3, mask="state")
    assert SelectionConfig.model_validate(selection) == expected


def test_what_is_left_out_is_the_first_policy_greedy_and_a_drawn_seed():
    backend = FakeBackend()
    seeds = {lines(client(backend).post(PATH, json={}))[0]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    model, selection, seed = backend.asked[0][0]
    assert (model, selection["rule"], seed in seeds) == ("blocks", "greedy", True)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "digits"}, 400, "model"),
        ({"selection": "oracle"}, 400, "selection"),
        ({"selection": "mg-select", "num_candidates": 99}, 400, "num_candidates"),
        ({"selection": "random", "mask": "text"}, 400, None),
        ({"seed": -1}, 400, "seed"),
        ({"seed": "7"}, 400, "seed"),
        ({"steps": 3}, 400, "steps"),
    ],
)
def test_what_cannot_be_played_is_an_ordinary_error(body, status, param):
    backend = FakeBackend()
    answer = client(backend).post(PATH, json=body)
    assert answer.status_code == status
    told = answer.json()["error"]
    assert param is None or told["param"].split(".")[0] == param
    assert "\n" not in told["message"]
    assert backend.asked == []


def test_what_fails_before_the_first_event_is_an_ordinary_error():
    error = ApiError("queue_full", "the simulator is busy: try again later", retry_after=7.0)
    answer = client(FakeBackend(error=error)).post(PATH, json={})
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (429, error.body(), "7")


def test_a_service_without_policies_says_so():
    backend = FakeBackend(infos=(DIGITS,))
    answer = client(backend, actions={}, simulator=None).post(PATH, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_what_fails_later_is_the_last_line():
    start, error = lines(client(Broken()).post(PATH, json={"seed": 1}))
    assert start == {"event": "start", "seed": 1}
    assert error == {"event": "error"} | Broken.failure.body()


def test_an_unforeseen_fault_is_a_line_that_tells_no_more_than_that(caplog):
    backend = Broken()
    backend.failure = KeyError("/srv/secret")
    error = lines(client(backend).post(PATH, json={}))[-1]["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in json.dumps(error)
    assert "/srv/secret" in caplog.text


def test_a_client_that_hangs_up_ends_the_episode():
    async def hang_up():
        backend, sent = Endless(), []
        body = json.dumps({"model": BLOCKS.name}).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"content-type", b"application/json"), (b"host", b"here")],
            "server": ("here", 80), "client": ("there", 1),
        }  # fmt: skip
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if incoming:
                return incoming.pop()
            await backend.playing.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        async with asyncio.timeout(10):
            await create_app(backend, service())(scope, receive, send)
        assert backend.ended.is_set()
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]

    asyncio.run(hang_up())


def test_the_document_describes_the_route():
    operation = client(FakeBackend()).get("/openapi.json").json()["paths"][PATH]["post"]
    assert "application/x-ndjson" in operation["responses"]["200"]["content"]
    assert {"400", "404", "429", "503"} <= set(operation["responses"])
