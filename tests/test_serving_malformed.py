"""No request, however malformed, ends in a fault: bytes, headers and methods that no document describes."""

import asyncio
import json
from collections import Counter

import numpy as np
from asgi_calls import call
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from serving_parts import FakeBackend, png, service

from actors.serving.app import create_app

APP = create_app(FakeBackend(), service(limits={"max_body_bytes": 20_000}))
PATHS = (
    "/v1/images/generations", "/v1/actions", "/v1/episodes", "/v1/models", "/v1/models/digits", "/v1/nothing",
    "/", "/page/index.html", "/page/..", "/healthz", "/readyz", "/metrics", "/openapi.json",
)  # fmt: skip
FIELDS = (
    "prompt", "model", "n", "size", "seed", "response_format", "num_inference_steps", "guidance_scale",
    "scheduler", "guider", "guider_options", "eta", "start", "stop",
    "class_label", "user", "quality", "stream", "partial_images", "output_compression",
    "observation", "images",
    "state", "instruction", "top", "selection", "num_candidates", "temperature", "mask", "decision", "rule",
    "deadline", "x\x00", "",
)  # fmt: skip
GOOD = (
    "UniPCMultistepScheduler",
    "AdaptiveProjectedGuidance",
    "digits",
    "blocks",
    "three",
    "8x8",
    "16x16",
    "auto",
    "b64_json",
    "greedy",
    "mg-select",
    "text",
)
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**63, 2**64, -1, 10**400, 1e308, -0.0, 0, 1, 4, 10])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(GOOD))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
SCENE = {
    "images": {"top": png(np.zeros((16, 16, 3), np.uint8))},
    "state": [0.5, 0.25],
    "instruction": "go to the red corner",
}
GOOD_BODIES = {
    "/v1/images/generations": {"model": "digits", "prompt": "three", "n": 2, "size": "16x16", "seed": 7},
    "/v1/actions": {"model": "blocks", "observation": SCENE, "selection": "mg-select", "seed": 7},
    "/v1/episodes": {"model": "blocks", "selection": "entropy", "num_candidates": 2, "seed": 7},
}
changes = st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2)
ODD = (
    b"", b"{", b'{"n":', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"n": 1e999}', b'{"seed": -0.0}',
    b"[" * 9999,
    b'{"a":' * 3000, b'{"n": ' + b"7" * 5000 + b"}", b"null", b"NaN", b"\x00", b"\xef\xbb\xbf{}",
    b" " * 20_001,
    b'{"prompt": "three", "prompt": 3}', b'{"prompt": "three"}{}', b'{"guidance_scale": 1e308}',
)  # fmt: skip


@st.composite
def almost_good(draw):
    """Return a path and a body that would be good, but for a field or two of it, or for some bytes."""
    path = draw(st.sampled_from(list(GOOD_BODIES)))
    good = GOOD_BODIES[path]
    if draw(st.booleans()):
        return path, json.dumps(good | draw(changes)).encode()
    if draw(st.booleans()) and "observation" in good:
        return path, json.dumps(good | {"observation": SCENE | draw(changes)}).encode()
    body = json.dumps(good).encode()
    at, until = sorted(draw(st.tuples(*[st.integers(0, len(body))] * 2)))
    return path, body[:at] + draw(st.binary(max_size=6)) + body[draw(st.sampled_from([at, until])) :]


@st.composite
def anything(draw):
    """Return any path and any body."""
    path = draw(st.sampled_from(PATHS) | st.text(max_size=30).map(lambda text: "/v1/models/" + text))
    written = values.map(lambda value: json.dumps(value).encode())
    return path, draw(written | st.sampled_from(ODD) | st.binary(max_size=50))


plain = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF), max_size=20)
HEADERS = (
    "content-type", "content-length", "content-encoding", "x-deadline-ms", "x-request-id", "origin",
    "authorization", "accept", "host", "if-none-match", "transfer-encoding",
)  # fmt: skip
counts = st.tuples(st.sampled_from(["x-deadline-ms", "content-length"]), numbers.map(str))
headers = st.lists(st.tuples(st.sampled_from(HEADERS), plain) | counts, max_size=2)
methods = st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "", "WEIRD\xff"])
requests = st.one_of(
    *[st.tuples(st.just("POST"), almost_good(), st.just([]))] * 2,
    st.tuples(st.just("POST"), almost_good() | anything(), headers),
    st.tuples(methods | st.just("POST"), anything(), headers),
)


def test_no_malformed_request_ends_in_a_fault():
    seen = Counter()

    @seed(20260731)
    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests, st.integers(1, 8), st.booleans())
    def ask(request, pieces, typed):
        method, (path, body), more = request
        size = len(body) // pieces + 1
        chunks = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        kind = [("content-type", "application/json")] if typed or not more else []
        answer = asyncio.run(call(APP, method, path, [*kind, *more], chunks))
        assert 200 <= answer.status < 500, answer.body
        assert answer.headers["x-request-id"]
        about = answer.error["message"].split()[0] if answer.status >= 400 else "fine"
        seen[path if path in GOOD_BODIES else "elsewhere", answer.status, about] += 1

    ask()
    # The test is worth something only where requests get as far as the routes. How many do is the generator's
    # choice, which the constants of all loaded modules have a part in.
    for path, body in GOOD_BODIES.items():
        json_body = [("content-type", "application/json")]
        assert asyncio.run(call(APP, "POST", path, json_body, [json.dumps(body).encode()])).status == 200
        assert sum(count for (where, status, _), count in seen.items() if (where, status) == (path, 400)) > 5
    assert len(seen) > 25
