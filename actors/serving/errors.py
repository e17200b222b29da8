"""What a client is told when something goes wrong: one JSON form, that of OpenAI's API."""

from typing import Any, Literal

Code = Literal[
    "invalid_value", "invalid_api_key", "model_not_found", "not_found", "method_not_allowed",
    "body_too_large", "no_action", "rate_limit_exceeded", "queue_full", "deadline_exceeded", "unavailable",
    "internal_error",
]  # fmt: skip
STATUS: dict[Code, int] = {
    "invalid_value": 400, "invalid_api_key": 401, "model_not_found": 404, "not_found": 404,
    "method_not_allowed": 405, "body_too_large": 413, "no_action": 422, "rate_limit_exceeded": 429,
    "queue_full": 429, "deadline_exceeded": 504, "unavailable": 503, "internal_error": 500,
}  # fmt: skip


class ApiError(Exception):
    """An answer that is no success; the message names field, value and remedy, and no path or trace.

    Attributes:
        code: which kind; `status` follows from it.
        param: the field of the request that is at fault, if one is.
        retry_after: seconds after which another try may fare better.
    """

    def __init__(
        self, code: Code, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.retry_after = code, message, param, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.message, self.param, self.retry_after)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.code]

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
