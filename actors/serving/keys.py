"""Who may come in, and how often."""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Sequence

from actors.serving.config import KeyConfig, ServiceConfig
from actors.serving.errors import ApiError

OPEN = "open"
"""Name of whoever comes to a service without keys."""
SCHEMES = ("bearer", "api-key")
"""Of the header Authorization: OpenAI's clients send the first, openpi's the second."""
REMEDY = "send the header 'Authorization: Bearer KEY'"
BURST = 0.1
"""Share of a minute's requests that may come at once."""


class Keyring:
    """The tokens that are let in, each at its own rate; for one event loop, not for several threads.

    Args:
        keys: the tokens' digests; without any, everyone is let in at any rate.
        clock: seconds from any beginning.
    """

    def __init__(self, keys: Sequence[KeyConfig], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = tuple(keys)
        self._digests = [key.sha256.encode() for key in keys]
        self._buckets = [
            None if key.requests_per_minute is None else _Bucket(key.requests_per_minute, clock)
            for key in keys
        ]

    def admit(self, authorization: str | None) -> str:
        """Return the name of the key in the header Authorization, or "open" if there are no keys.

        Raises invalid_api_key, and rate_limit_exceeded with the seconds to wait.
        """
        if not self._keys:
            return OPEN
        if not authorization:
            raise ApiError("invalid_api_key", f"this service asks for a key, and none was sent: {REMEDY}")
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() not in SCHEMES or not token.strip():
            raise ApiError("invalid_api_key", f"the header Authorization is of another form: {REMEDY}")
        index = self._find(token.strip())
        bucket = self._buckets[index]
        if bucket is not None and (wait := bucket.take()) > 0:
            key = self._keys[index]
            raise ApiError(
                "rate_limit_exceeded",
                f"key {key.name!r} has used up its {key.requests_per_minute} requests a minute: "
                f"try again in {wait:.1f} s",
                retry_after=wait,
            )
        return self._keys[index].name

    def _find(self, token: str) -> int:
        """Return the index of the key; all are compared, so that time tells nothing about them."""
        presented = _digest(token).encode()
        found = -1
        for index, digest in enumerate(self._digests):
            if hmac.compare_digest(presented, digest):
                found = index
        if found < 0:
            raise ApiError("invalid_api_key", f"the key is none of this service's: {REMEDY} with a valid one")
        return found


def new_token() -> tuple[str, str]:
    """Return a new token of 256 random bits, and its SHA-256 in hex, which is all that may be kept of it."""
    token = "cp-" + secrets.token_urlsafe(32)
    return token, _digest(token)


def openness(config: ServiceConfig) -> str:
    """Say in one line who is let in to the service, and from where."""
    place = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
    near = "other machines do not reach it"
    far = "other machines reach it, unencrypted unless something before it speaks TLS"
    reach = near if is_loopback(config.host) else far
    if config.keys:
        names = ", ".join(key.name for key in config.keys)
        return f"closed: {place} asks for one of {len(config.keys)} keys ({names}); {reach}"
    if is_loopback(config.host):
        return f"open: {place} lets in every process of this machine without a key; {reach}"
    return f"OPEN: {place} lets in everyone without a key; {reach}: configure keys, or host=127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`; names other than localhost count as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Bucket:
    """A token bucket: `per_minute` requests a minute, a tenth of them at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._rate, self._most = per_minute / 60.0, max(1.0, per_minute * BURST)
        self._clock, self._left, self._at = clock, self._most, clock()

    def take(self) -> float:
        """Take a request and return 0, or the seconds until there is one to take."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        # The small slack is for rounding: a client that waits as long as it is told shall be let in.
        if self._left < 1.0 - 1e-9:
            return (1.0 - self._left) / self._rate
        self._left -= 1.0
        return 0.0


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
