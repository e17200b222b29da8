"""How long a client is willing to wait."""

from collections.abc import Mapping

from actors.serving.config import LimitsConfig
from actors.serving.errors import ApiError

HEADER = "x-deadline-ms"
MOST_DIGITS = 12


def deadline_of(headers: Mapping[str, str], limits: LimitsConfig) -> float:
    """Return seconds after which a request is given up: the service's, or less if the client says so.

    `headers` are looked up in lower case. Raises invalid_value unless `x-deadline-ms` is a whole number of
    milliseconds, at least 1.
    """
    text = headers.get(HEADER)
    if text is None:
        return limits.deadline_s
    digits = text.strip()
    # str.isdigit alone would take digits of other scripts.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS and int(digits) > 0):
        raise ApiError(
            "invalid_value",
            f"{HEADER}={text[:20]!r} is not a whole number of milliseconds above 0: send one such as 500",
            HEADER,
        )
    return min(int(digits) / 1000.0, limits.deadline_s)
