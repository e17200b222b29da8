"""Requests that no service may take, made from the document in which it says what it takes.

`hammer` sends them to whatever answers behind a client: an application in this process (starlette's
TestClient) or a service that is really served (`httpx2.Client(base_url=...)`). Whether a body is malformed is
decided by `jsonschema` with the service's own schema, so that a service which takes more than it says is
found out too.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

CODES = {
    "invalid_value", "invalid_api_key", "model_not_found", "not_found", "method_not_allowed",
    "body_too_large", "rate_limit_exceeded", "queue_full",
}  # fmt: skip
ROOT = str(Path(__file__).resolve().parent.parent)
LEAKS = ("Traceback", "site-packages", 'File "', ".py", ROOT, "/tmp/", "pydantic", "Exception", "\n")
"""What no error may tell a client."""
LONGEST_MESSAGE = 2000
TRAVERSALS = (
    "..", ".", "../../etc/passwd", "/etc/passwd", "student/../../secret", "..\\..\\secret",
    "student@../secret", "%2e%2e%2fsecret", "file:///etc/passwd", "s3://bucket/secret", "~root", "digits\x00",
    "digits\n", "*", "$HOME", "student@", "@7", " digits", "DIGITS", "digits\u202e", "a" * 512,
    "x/" * 200 + "x", "\U0001f600",
)  # fmt: skip
PATHS = (
    "/v1", "/v1/", "/v1/images", "/v1/images/generation", "/v1/images/generations/", "/v1/images/edits",
    "/v1/chat/completions", "/v2/models", "/v1/models/", "/v1/models/..",
    "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/%ff%fe",
    "/v1/models/%0d%0ax-evil:1", "/v1//models", "/V1/MODELS", "/etc/passwd", "/page/..%2f..%2fconfig.py",
    "/page/%2e%2e/app.py", "/page/.env", "/page/", "/docs", "/redoc", "/.git/config", "/%c0%ae%c0%ae/secret",
    "/" + "a" * 2000, "/v1/models/" + "b" * 2000, "/index.php", "/*", "/v1/actions/stream",
)  # fmt: skip
CONTENT_TYPES = (
    None, "", "text/plain", "text/html", "application/xml", "application/x-www-form-urlencoded",
    "application/jsonx", "multipart/form-data; boundary=x", "multipart/form-data", "application/octet-stream",
    ";;;", "json",
)  # fmt: skip
DEADLINES = (
    "",
    "-1",
    "0",
    "1.5",
    "1e3",
    "abc",
    "NaN",
    "inf",
    "0x10",
    "1 2",
    "9" * 400,
    "+5",
    "\u00b2",
    "1,000",
)
NOISE = (
    ("x-request-id", "\u00e9\u00ff" * 50), ("x-request-id", "a" * 5000), ("accept", "text/html"),
    ("accept", ""), ("authorization", "Bearer"), ("authorization", "Basic Og=="), ("authorization", "\u00ff"),
    ("cookie", "a=b; c"), ("x-forwarded-for", "../../etc/passwd"), ("range", "bytes=9-0"),
    ("if-none-match", '"'), ("expect", "?"), ("accept-encoding", "br;q=NaN"),
    ("x-stainless-retry-count", "-1"), ("origin", "http://other.example"),
)  # fmt: skip
"""Odd headers that excuse nothing: requests stay malformed with them, and answers in form."""


@dataclass(frozen=True)
class Spelled:
    """A JSON text that is written as it stands; for validation it is `value`."""

    text: str
    value: Any = None
    broken: bool = True
    """Whether no field is at fault but the JSON itself, or a reader's limits."""


ODDITIES = (
    Spelled("NaN"), Spelled("Infinity"), Spelled("-Infinity"), Spelled("nan"), Spelled("9" * 5000),
    Spelled("[" * 100_000 + "]" * 100_000), Spelled('{"a":' * 20_000 + "1" + "}" * 20_000), Spelled("01"),
    Spelled("'x'"), Spelled('"\t\n"'), Spelled('"\\x41"'), Spelled("undefined"), Spelled(""),
    Spelled("1e999", float("inf"), False), Spelled("-1e999", float("-inf"), False),
    Spelled('"\\ud800"'), Spelled("9" * 4000, 10**400, False), Spelled("-0.5e-400", 0.0, False),
)  # fmt: skip
PLAIN_VALUES = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30,
    "", " ", "3", "true", "null", "NaN", "auto ", "0x0", "8x", "x8", "8X8", "-8x8", "8x8x8", "1e9x1", "url",
    "transparent", "\x00", "a\x00b", "\u202e", "x" * 40_000, "\U0001f600" * 100, [], {}, [[]], [None],
    {"": {}}, [1, 2], {"a": 1}, [[[[[[[[1]]]]]]]], ["x"] * 1000,
)  # fmt: skip


def _any_of(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Return one of `values`; `sampled_from` would write all of them out, and some are large."""
    return st.integers(0, len(values) - 1).map(lambda index: values[index])


def _json() -> st.SearchStrategy[Any]:
    leaves = (
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9) | st.text(max_size=20)
    )

    def inside(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)

    return st.recursive(leaves, inside, max_leaves=8)


PLAIN = _any_of(PLAIN_VALUES)
ANYTHING = PLAIN | _any_of(ODDITIES) | _json()
CHANGES = _any_of(["value", "value", "value", "edge", "text", "missing", "extra"])
UNKNOWN = _any_of(["foo", "negative_prompt", "__proto__", "Seed", "", " n", "n\u0000", "images[0]"])
INDICES = st.integers(0, 2**16)


@dataclass(frozen=True)
class Malformed:
    """A request, and what is wrong with it."""

    fault: str
    """The kind of fault."""
    method: str
    path: str
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    field: str | None = None
    """The outermost field at fault, which the answer has to name; none where it is not a field."""

    def __str__(self) -> str:
        return f"{self.fault}: {self.method} {self.path[:80]} {self.headers} {self.content[:300]!r}"


class Operation:
    """A route that takes JSON, as the service describes it.

    Raises ValueError if an example in the document does not fit the schema beside it.
    """

    def __init__(self, method: str, path: str, schema: dict[str, Any], components: dict[str, Any]) -> None:
        self.method, self.path, self.schema, self.components = method, path, schema, components
        self.validator = Draft202012Validator({**schema, "components": components})
        for body in (self.example(), self.example(self.properties)):
            faults = [fault.message for fault in self.validator.iter_errors(body)]
            if faults:
                raise ValueError(f"{self.path}: the document's own examples do not fit it: {faults[0][:200]}")

    @property
    def properties(self) -> dict[str, Any]:
        """Schemas of the body's fields by name."""
        return self.schema["properties"]

    def example(self, optional: Any = ()) -> dict[str, Any]:
        """Return a valid body: the document's example or the required fields, and some `optional` ones."""
        shown = self.schema.get("examples") or [self.schema.get("example", {})]
        body = dict(shown[0])
        for name in [*self.schema.get("required", ()), *sorted(optional)]:
            if name not in body:
                body[name] = self._shown(self.properties[name])
        return body

    def valid(self, body: Any) -> bool:
        """Say whether the document allows `body`."""
        return self.validator.is_valid(body)

    def _shown(self, schema: dict[str, Any]) -> Any:
        while "examples" not in schema and "$ref" in schema:
            schema = self.components["schemas"][schema["$ref"].rpartition("/")[2]]
        if "examples" in schema:
            return schema["examples"][0]
        if schema.get("type") == "object" and "properties" in schema:
            return {name: self._shown(schema["properties"][name]) for name in schema.get("required", ())}
        for branch in schema.get("anyOf", ()):
            if branch.get("type") != "null":
                return self._shown(branch)
        raise ValueError(f"{self.path}: the document shows no example of {schema.get('title', schema)}")


def operations(document: dict[str, Any]) -> list[Operation]:
    """Return the routes of an OpenAPI document that take JSON."""
    components = document["components"]
    found = []
    for path, item in document["paths"].items():
        for method, described in item.items():
            content = described.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                schema = content["schema"]
                while "$ref" in schema:
                    schema = components["schemas"][schema["$ref"].rpartition("/")[2]]
                found.append(Operation(method.upper(), path, schema, components))
    return found


def malformed(document: dict[str, Any]) -> st.SearchStrategy[Malformed]:
    """Return a strategy of requests that the service behind `document` has to refuse."""
    routes = operations(document)
    strategies = [wrong_methods(document), _any_of(PATHS).map(unknown_path)]
    for route in routes:
        # Faults of fields are the most various, and get the most requests.
        strategies += [wrong_fields(route) for _ in range(4)] + [wrong_bodies(route), wrong_headers(route)]
        if "model" in route.properties:
            strategies.append(wrong_models(route))
    noise = st.lists(_any_of(NOISE), max_size=2, unique_by=lambda header: header[0])
    return st.builds(_with_noise, st.one_of(strategies), noise)


@st.composite
def _wrong_fields(draw: st.DrawFn, route: Operation, optional: st.SearchStrategy[set[str]]) -> Malformed:
    body = route.example(draw(optional))
    places = list(_places(body))
    change = draw(CHANGES)
    place = places[draw(INDICES) % len(places)]
    if change == "extra":
        holders = [(), *(place for place in places if isinstance(_at(body, place), dict))]
        place = (*holders[draw(INDICES) % len(holders)], draw(UNKNOWN))
        hypothesis.assume(place[-1] not in _at(body, place[:-1]))
    if change == "edge":
        edges = _edges(route.properties.get(str(place[0]), {}))
        value: Any = edges[draw(INDICES) % len(edges)]
    elif change == "text":
        value = json.dumps(_at(body, place))
    else:
        value = draw(ANYTHING if change == "value" else PLAIN)
    stand_in = value.value if isinstance(value, Spelled) else value
    broken = isinstance(value, Spelled) and value.broken
    delete = change == "missing"
    hypothesis.assume(broken or not route.valid(_changed(body, place, stand_in, delete)))
    content = _written(_changed(body, place, value, delete))
    name = None if broken else str(place[0])
    return Malformed(f"field: {change}", route.method, route.path, content, field=name)


def wrong_fields(route: Operation) -> st.SearchStrategy[Malformed]:
    """One field that is missing, too many, or of a value that the schema does not allow."""
    return _wrong_fields(route, st.sets(st.sampled_from(sorted(route.properties)), max_size=4))


@st.composite
def wrong_bodies(draw: st.DrawFn, route: Operation) -> Malformed:
    """A body that is no JSON object, whatever its fields."""
    content = json.dumps(route.example()).encode()
    fault = draw(st.sampled_from(["cut", "bytes", "garbage", "other", "type", "random"]))
    headers = Malformed.headers
    if fault == "cut":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif fault == "bytes":
        place = draw(st.integers(0, len(content)))
        content = (
            content[:place] + draw(st.sampled_from([b"\xff", b"\xc0\xae", b"\xed\xa0\x80"])) + content[place:]
        )
    elif fault == "garbage":
        content += draw(st.sampled_from([b"x", b"}", b"{}", b",", b"\x00", b"NaN"]))
    elif fault == "other":
        other = draw(st.sampled_from(["[]", "null", "true", "3", '"x"', "NaN", "[{}]", "[" * 100_000, '"']))
        content = other.encode()
    elif fault == "type":
        kind = draw(_any_of(CONTENT_TYPES))
        headers = () if kind is None else (("content-type", kind),)
    else:
        content = b"\x01" + draw(st.binary(max_size=200))
    return Malformed(f"body: {fault}", route.method, route.path, content, headers)


def wrong_headers(route: Operation) -> st.SearchStrategy[Malformed]:
    """A valid body with a deadline that is none."""
    content, name = json.dumps(route.example()).encode(), "x-deadline-ms"
    return _any_of(DEADLINES).map(
        lambda value: Malformed(
            "header", route.method, route.path, content, (*Malformed.headers, (name, value)), name
        )
    )


def wrong_models(route: Operation) -> st.SearchStrategy[Malformed]:
    """A model that is not there, or that would lead out of the service's root."""
    return _any_of(TRAVERSALS).map(
        lambda name: Malformed(
            "model", route.method, route.path, _written({**route.example(), "model": name}), field="model"
        )
    )


def wrong_methods(document: dict[str, Any]) -> st.SearchStrategy[Malformed]:
    """A method that the path does not have; HEAD is left out, as its answers have no body."""
    paths = {path: {method.upper() for method in item} for path, item in document["paths"].items()}
    pairs = [
        (method, path.partition("{")[0] + ("digits" if "{" in path else ""))
        for path, known in paths.items()
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
        if method not in known
    ]
    return _any_of(pairs).map(lambda pair: Malformed("method", *pair))


def unknown_path(path: str) -> Malformed:
    """A path that leads nowhere."""
    return Malformed("path", "GET", path, headers=())


def complaint(asked: Malformed, response: Any) -> str | None:
    """Return what is wrong with the answer to a malformed request, or None."""
    if not 400 <= response.status_code < 500:
        return f"status {response.status_code}"
    try:
        told = response.json()
    except ValueError:
        return f"no JSON: {response.content[:200]!r}"
    if set(told) != {"error"} or set(told["error"]) != {"message", "type", "param", "code"}:
        return f"not in form: {told}"
    message, kind, param, code = (told["error"][key] for key in ("message", "type", "param", "code"))
    if not isinstance(message, str) or not message or len(message) > LONGEST_MESSAGE:
        return f"message {message!r}"
    leaks = [
        leak for leak in LEAKS if leak in message and leak.encode() not in asked.content + asked.path.encode()
    ]
    if leaks:
        return f"message leaks {leaks}: {message!r}"
    if code not in CODES or kind not in ("invalid_request_error", "rate_limit_error"):
        return f"code {code!r} of type {kind!r}"
    if not (param is None or isinstance(param, str)):
        return f"param {param!r}"
    # Noise in a header may be a fault of its own, which Serve's proxy finds first.
    noisy = param in {name for name, value in asked.headers if not value.isascii()}
    named = param == asked.field or f"{param}".startswith(f"{asked.field}.")
    if asked.field is not None and not (named or noisy):
        return f"param {param!r}, the fault is in {asked.field!r}: {message!r}"
    return None if response.headers.get("x-request-id") else "no x-request-id"


def hammer(
    client: Any, count: int = 1000, seed: int = 0, headers: dict[str, str] | None = None
) -> Counter[str]:
    """Send `count` malformed requests and return how many there were by route and kind of fault.

    `client` is an httpx2.Client or what behaves as one; `headers`, such as a key, go with every request.
    Raises AssertionError with the request and the answer at the first answer that is not as it should be.
    """
    document = client.get("/openapi.json").json()
    sent: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @hypothesis.given(malformed(document))
    def is_refused(asked: Malformed) -> None:
        own = {name.lower() for name in headers or ()}
        all_headers = [
            (name.encode(), value.encode("latin-1"))
            for name, value in asked.headers
            if name.lower() not in own
        ] + [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        response = client.request(
            asked.method, asked.path, content=asked.content, headers=all_headers, follow_redirects=False
        )
        sent[f"{asked.path} {asked.fault}" if asked.fault != "path" else "path"] += 1
        wrong = complaint(asked, response)
        assert wrong is None, f"{wrong}\n{asked}"

    is_refused()
    return sent


def _with_noise(asked: Malformed, noise: list[tuple[str, str]]) -> Malformed:
    return Malformed(
        asked.fault, asked.method, asked.path, asked.content, (*asked.headers, *noise), asked.field
    )


def _edges(schema: dict[str, Any]) -> list[Any]:
    """Return values just beyond what a field's schema allows."""
    values: list[Any] = ["", -1]
    for branch in [schema, *schema.get("anyOf", ())]:
        values += [branch["minimum"] - 1] if "minimum" in branch else []
        values += [branch["maximum"] + 1, branch["maximum"] + 0.5] if "maximum" in branch else []
        values += ["x" * (branch["maxLength"] + 1)] if "maxLength" in branch else []
        values += [str(one) + "x" for one in branch.get("enum", ())]
    return values


def _places(body: Any, place: tuple[Any, ...] = ()) -> Any:
    """Yield where values lie in `body`, outermost first; of a list, only its first entry."""
    inner = (
        body.items()
        if isinstance(body, dict)
        else list(enumerate(body))[:1]
        if isinstance(body, list)
        else ()
    )
    for key, value in inner:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _at(body: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        body = body[key]
    return body


def _changed(body: Any, place: tuple[Any, ...], value: Any, delete: bool) -> Any:
    """Return a copy of `body` with another value at `place`, or without it."""
    if not place:
        return value
    copy = body.copy()
    if delete and len(place) == 1:
        del copy[place[0]]
    else:
        inner = body[place[0]] if len(place) > 1 else None
        copy[place[0]] = _changed(inner, place[1:], value, delete)
    return copy


def _written(body: Any) -> bytes:
    """Return JSON in which every Spelled stands as it is."""
    spelled: list[str] = []

    def mark(value: Any) -> str:
        spelled.append(value.text)
        return f"@spelled {len(spelled) - 1}@"

    text = json.dumps(body, default=mark)
    for index, raw in enumerate(spelled):
        text = text.replace(f'"@spelled {index}@"', raw)
    return text.encode()
