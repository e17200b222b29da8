"""What stands before Serve's own HTTP proxy, which answers 500 to headers that it cannot decode.

A proxy calls what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH of its environment names: `jobs.serve` sets it
for clusters that it starts, `ray start` needs it in its own environment.
"""

import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.serving.error_responses import error_response
from actors.serving.errors import ApiError
from actors.serving.priority import step_back

CALLBACK = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "actors.serving.proxy_headers.middlewares")
"""The environment variable, and its value."""


class DecodableHeaders:
    """Refuses requests with headers that are not UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        wrong = next((pair for pair in scope.get("headers", ()) if not all(map(_decodes, pair))), None)
        if wrong is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            name = wrong[0].decode("ascii", "replace")[:40]
            error = ApiError("invalid_value", f"header {name!r} is not UTF-8: send ASCII", name)
            await error_response(error, {"x-request-id": uuid.uuid4().hex})(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return what every proxy of Serve shall pass its requests through; it is called in the proxy."""
    step_back()
    return [Middleware(DecodableHeaders)]


def _decodes(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True
