"""The application with routes of the tests' own, and a look at what it has counted."""

from asgi_calls import get
from pydantic import BaseModel, Field, model_validator
from serving_parts import FakeBackend, service
from starlette.responses import StreamingResponse

from actors.serving.app import create_app
from actors.serving.errors import ApiError


class Inner(BaseModel):
    state: list[float] = []
    label: int = 0


class Body(BaseModel, extra="forbid"):
    """A body of every kind of field."""

    n: int = Field(1, ge=1, le=10, strict=True)
    inner: Inner = Inner()
    name: str = ""

    @model_validator(mode="after")
    def _check(self):
        if self.name == "odd":
            raise ValueError("name='odd' is odd: give an even one")
        return self


def app_of(backend=None, **changes):
    """Return the application with routes of the test's own below /v1/test."""
    app = create_app(backend or FakeBackend(), service(**changes))

    @app.post("/v1/test")
    async def echo(body: Body) -> Body:
        return body

    @app.get("/v1/test/fail")
    async def fail():
        raise RuntimeError("/secret/place is broken")

    @app.get("/v1/test/stream")
    async def stream():
        async def parts():
            yield b"begun"
            raise RuntimeError("/secret/place is broken")

        return StreamingResponse(parts())

    @app.get("/v1/test/refuse")
    async def refuse(retry_after: float):
        raise ApiError("queue_full", "come back", retry_after=retry_after)

    return app


def counted(app, token="", **labels):
    """Return how many requests have been counted under `labels`."""
    text = get(app, "/metrics", {"authorization": f"Bearer {token}"}).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("counterpoint_requests_total{")]
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    return sum(float(line.split()[-1]) for line in lines if all(text in line for text in wanted))
