"""What every request passes on its way in and out: plain ASGI, which holds up no stream and no cancel."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.serving.config import LimitsConfig
from actors.serving.error_responses import error_response
from actors.serving.errors import ApiError
from actors.serving.keys import Keyring
from actors.serving.meters import Meters
from actors.serving.request_body import ClientGoneError, check_json, has_body, read_body, replayed

log = logging.getLogger(__name__)
UNMATCHED = "unmatched"
"""Endpoint of requests for which there is no route."""
HUNG_UP = 499
"""Status, nginx's, of requests whose clients did not wait for the answer."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
PROBES = ("/healthz", "/readyz", "/metrics")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Record:
    """Gives each request an id, counts and logs it, and answers what nobody has caught with a 500.

    The id is the client's `x-request-id` if that is short and plain. Requests are counted by the template of
    their route; `endpoints` are the routes by which those are sorted that got no further than the gate.
    Without `tell_id` answers are sent without the id, for a server that adds it.
    """

    def __init__(
        self, app: ASGIApp, meters: Meters, endpoints: Sequence[Route] = (), tell_id: bool = True
    ) -> None:
        self.app, self.meters, self.endpoints, self.tell_id = app, meters, endpoints, tell_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        own = Headers(scope=scope).get("x-request-id", "")
        state = scope["state"] = dict(scope.get("state") or {})
        state["request_id"] = own if _SANE_ID.fullmatch(own) else uuid.uuid4().hex
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        begun, status, started, complete = time.perf_counter(), HUNG_UP, False, False

        async def sending(message: Message) -> None:
            nonlocal status, started, complete
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = _add_headers(message, scope)
                if self.tell_id:
                    headers["x-request-id"] = state["request_id"]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, sending)
            status = status if complete else HUNG_UP
        except asyncio.CancelledError:
            status = status if complete else HUNG_UP
            raise
        except ClientDisconnect:
            status = HUNG_UP
        except Exception:
            log.exception("request %s failed", state["request_id"])
            if started:
                status = 500
                raise  # only a broken connection can still tell the client
            await error_response(_fault(state["request_id"]))(scope, receive, sending)
        finally:
            self._note(scope, status, time.perf_counter() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", None) or self._template(scope["path"])
        state = scope["state"]
        model = str(state.get("model", ""))
        self.meters.request(endpoint, model, status, seconds)
        log.log(
            logging.DEBUG if endpoint in PROBES else logging.INFO,
            "%s %s %d %.1f ms key=%s model=%s id=%s",
            ascii(scope["method"][:16])[1:-1], endpoint, status, seconds * 1000,
            ascii(state.get("key", "-")), ascii(model[:80]), state["request_id"],
        )  # fmt: skip

    def _template(self, path: str) -> str:
        return next((route.path for route in self.endpoints if route.path_regex.match(path)), UNMATCHED)


class Gate:
    """Lets in those with a key, with whole bodies of a bounded size and sane JSON; all of it under /v1.

    /metrics asks for the key too; the rest is open. WebSockets have their own way to be told of an error, so
    that their routes ask for the key; here they are only kept from web pages of other origins, whose
    connections browsers would let through.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, limits: LimitsConfig) -> None:
        self.app, self.keyring, self.limits = app, keyring, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        headers = Headers(scope=scope) if "headers" in scope else Headers()
        if scope["type"] == "websocket" and not _same_origin(headers):
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                receive = await self._enter(scope, receive, headers)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
            except ClientGoneError:
                return
        await self.app(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, headers: Headers) -> Receive:
        path = scope["path"]
        api = path == "/v1" or path.startswith("/v1/")
        if api or path == "/metrics":
            given = headers.getlist("authorization")
            if len(given) > 1:
                raise ApiError("invalid_api_key", "the header Authorization is given twice: send one")
            scope["state"]["key"] = self.keyring.admit(given[0] if given else None)
        if not has_body(scope["method"], headers):
            return receive
        body = await read_body(receive, headers, self.limits)
        if api:
            check_json(body, headers)
        return replayed(body, receive)


def _fault(request_id: str) -> ApiError:
    return ApiError("internal_error", f"the service has failed; its log has the reason under {request_id}")


def _same_origin(headers: Headers) -> bool:
    """Whether a connection comes from no web page, or from one of this service's own."""
    origin, host = headers.get("origin"), headers.get("host", "")
    return origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())


def _add_headers(message: Message, scope: Scope) -> MutableHeaders:
    headers = MutableHeaders(scope=message)
    headers["x-content-type-options"] = "nosniff"
    headers["content-security-policy"] = POLICY
    headers["referrer-policy"] = "no-referrer"
    if scope["path"].startswith("/v1") or scope["path"] in PROBES:
        headers["cache-control"] = "no-store"
    return headers
