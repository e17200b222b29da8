"""The page at the service's root: static files of the package, the same for everybody."""

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response

from actors.serving.door import Door
from actors.serving.errors import ApiError

FOLDER = "page"
INDEX = "index.html"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "images.js": "text/javascript; charset=utf-8",
    "policies.js": "text/javascript; charset=utf-8",
    "drawing.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Every file that is served, and as what; no other can be named."""


def page_router(door: Door) -> APIRouter:
    """Return the routes GET / and GET /page/{file}; `door` is asked nothing, the files hold no secrets.

    Browsers keep the files and ask with their ETag whether they are still those, so that a page never mixes
    the files of two releases for longer than it takes to load.
    """
    files = {name: _read(name) for name in TYPES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in files.items()}
    router = APIRouter()

    def answer(request: Request, name: str) -> Response:
        headers = {"etag": tags[name], "cache-control": "no-cache"}
        if _holds(request.headers.get("if-none-match", ""), tags[name]):
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=TYPES[name], headers=headers)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        """Return the page."""
        return answer(request, INDEX)

    @router.api_route("/page/{file}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(request: Request, file: str) -> Response:
        """Return a file of the page."""
        if file not in files:
            raise ApiError("not_found", f"there is no file {file[:64]!r} in the page: start at /")
        return answer(request, file)

    return router


def _read(name: str) -> bytes:
    return resources.files("actors.serving").joinpath(FOLDER, name).read_bytes()


def _holds(if_none_match: str, tag: str) -> bool:
    """Return whether an If-None-Match header (RFC 9110, 13.1.2) names `tag`, by weak comparison."""
    named = [item.strip().removeprefix("W/") for item in if_none_match.split(",")]
    return tag in named or named == ["*"]
