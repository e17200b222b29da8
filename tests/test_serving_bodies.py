"""Bodies: whole, of a bounded size, strict JSON, and refused in one line that says what to do."""

import asyncio
import json

import pytest
from app_parts import app_of, counted
from asgi_calls import call, get, post, scope_of


@pytest.fixture(scope="module")
def app():
    return app_of()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"n": 11}, "n", "n=11 is not allowed: input should be less than or equal to 10"),
        ({"n": "3"}, "n", 'n="3" is not allowed: input should be a valid integer'),
        ({"n": 10**1000}, "n", "n=an integer of 3322 bits is not allowed"),
        ({"inner": {"state": [0, "x"]}}, "inner.state.1", 'inner.state.1="x" is not allowed'),
        ({"inner": []}, "inner", "inner=a list of 0 is not allowed"),
        ({"inner": {"label": None}}, "inner.label", "inner.label=null is not allowed"),
        ({"color": 1}, "color", "color is not a field that this request has: leave it out"),
        ({"name": "odd"}, None, "name='odd' is odd: give an even one"),
        ([1], None, "the body is a list: send a JSON object"),
        ("text", None, "the body is a string: send a JSON object"),
        (b"null", None, "the body is null: send a JSON object"),
        (b"", None, "the body is empty: send a JSON object"),
        (b" ", None, "the body is not JSON ("),
        (b'{"n": }', None, "the body is not JSON (expected value at line 1 column 7): send a JSON object"),
        (b'{"n": NaN}', None, "the body is not JSON ("),
        (b'{"n": Infinity}', None, "the body is not JSON ("),
        (b'{"n": ' + b"9" * 5000 + b"}", None, "the body is not JSON (number out of range"),
        (b'{"name": "\\ud800"}', None, "the body is not JSON ("),
        (b'{"name": "\xed\xa0\x80"}', None, "the body is not JSON ("),
        (b'{"name": "\xff"}', None, "the body is not JSON ("),
        ('{"n": 1}'.encode("utf-16"), None, "the body is not JSON ("),
        (b"[" * 100_000, None, "the body is not JSON (recursion limit exceeded"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, None, "the body is not JSON (recursion limit exceeded"),
        ({f"k{n}": 1 for n in range(10_001)}, None, "the body's objects have more than 10000 members"),
        ({"x" * 100_000: 1}, "x" * 80, "x" * 80 + " is not a field"),
        ({"a\nb": 1}, "a\nb", r"a\nb is not a field"),
        ({"n": "y" * 100_000}, "n", 'n="yyy'),
        ({"n": {"deep": 1}}, "n", "n=an object is not allowed"),
    ],
)
def test_a_bad_body_is_refused_in_one_line_that_names_field_value_and_remedy(app, body, param, message):
    answer = post(app, "/v1/test", body)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_value"
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert answer.error["message"].startswith(message)


def test_a_good_body_passes_whatever_pieces_it_comes_in(app):
    body = {"n": 3, "inner": {"state": [0.1, -2e-300], "label": 10**30}, "name": "é😀\u0000" + ":" * 20_000}
    content = json.dumps(body, ensure_ascii=False).encode()
    for size in (1, 1000, len(content)):
        chunks = [content[at : at + size] for at in range(0, len(content), size)]
        headers = {"content-type": "application/json; charset=utf-8"}
        answer = asyncio.run(call(app, "POST", "/v1/test", headers, chunks))
        assert answer.status == 200
        assert json.loads(answer.body) == body


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"content-type": ""}, {"content-type": "text/plain"}, {"content-type": "application/json+x"},
        {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "multipart/form-data"},
        {"content-type": b"\xff\xfe"}, {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)  # fmt: skip
def test_only_plain_json_is_taken_so_that_no_form_of_another_page_gets_through(app, headers):
    answer = asyncio.run(call(app, "POST", "/v1/test", headers, [b"{}"]))
    assert (answer.status, answer.error["code"]) == (400, "invalid_value")
    assert answer.error["message"].startswith("content-")


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "", "²", " 5 5", "9" * 30, b"\xff", "+2"])
def test_a_content_length_that_is_no_count_is_refused(app, length):
    headers = {"content-type": "application/json", "content-length": length}
    answer = asyncio.run(call(app, "POST", "/v1/test", headers, [b"{}"]))
    assert (answer.status, answer.error["code"]) == (400, "invalid_value")


def test_two_content_lengths_must_agree(app):
    def answer(*lengths):
        headers = [("content-type", "application/json"), *(("content-length", text) for text in lengths)]
        return asyncio.run(call(app, "POST", "/v1/test", headers, [b"{}"])).status

    assert [answer("2", "2"), answer("2", "3")] == [200, 400]


def test_a_body_over_the_limit_is_refused_as_soon_as_it_is_known():
    app = app_of(limits={"max_body_bytes": 5000})
    announced = {"content-type": "application/json", "content-length": "5001"}
    answer = asyncio.run(call(app, "POST", "/v1/test", announced, [b"{}"]))
    assert (answer.status, answer.error["code"], answer.calls_of_receive) == (413, "body_too_large", 0)
    assert "5000 bytes" in answer.error["message"]
    for headers in ({}, {"content-length": "2"}):  # who lies about the length gets no further
        chunks = [b" " * 1000] * 1_000
        answer = asyncio.run(call(app, "POST", "/v1/test", headers, chunks))
        assert (answer.status, answer.error["code"], answer.calls_of_receive) == (413, "body_too_large", 6)
    assert post(app, "/v1/test", b"{}" + b" " * 4998).status == 200
    assert post(app, "/nowhere", b" " * 5001).status == 413
    assert get(app, "/v1/test", {"content-length": "5001"}).status == 413


def test_a_body_that_does_not_come_is_not_waited_for_for_ever():
    app = app_of(limits={"deadline_s": 0.02})

    async def receive():
        await asyncio.sleep(0.005)
        return {"type": "http.request", "body": b" ", "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope_of("POST", "/v1/test"), receive, send))
    assert sent[0]["status"] == 504
    assert b"did not arrive" in sent[1]["body"]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_not_answered():
    app = app_of()
    answer = asyncio.run(call(app, "POST", "/v1/test", chunks=[b"{"], end="cut"))
    assert answer.status == 0
    assert counted(app, status=499) == 1
