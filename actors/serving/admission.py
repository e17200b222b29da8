"""How many requests may be inside at once."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

from actors.serving.errors import ApiError
from actors.serving.messages import Kind
from actors.serving.meters import Meters

RECENT = 64
"""Departures whose pace is remembered."""
SHORTEST, LONGEST = 1, 60
"""Seconds that a client is told to wait, at least and at most."""


class Admission:
    """Lets in at most so many requests at once, over all kinds; for one event loop, not for several threads.

    Args:
        limit: requests inside at once, those that wait for a replica included.
        meters: are told how many there are.
        clock: seconds from any beginning.
    """

    def __init__(self, limit: int, meters: Meters, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._meters, self._clock = limit, meters, clock
        self._inside: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        self._gaps: deque[float] = deque(maxlen=RECENT)
        self._since = 0.0

    @contextmanager
    def enter(self, kind: Kind) -> Iterator[None]:
        """Be inside for the length of the block; raises queue_full, with seconds to wait, at the limit."""
        inside = self.inside
        if inside >= self._limit:
            wait = self.drain_s()
            raise ApiError(
                "queue_full",
                f"{inside} requests are under way, as many as this service takes: try again in {wait} s",
                retry_after=wait,
            )
        if not inside:
            self._since = self._clock()
        self._change(kind, 1)
        try:
            yield
        finally:
            now = self._clock()
            self._gaps.append(now - self._since)
            self._since = now
            self._change(kind, -1)

    @property
    def inside(self) -> int:
        """Requests inside now."""
        return sum(self._inside.values())

    def drain_s(self) -> int:
        """Return whole seconds until those inside now will have left, from 1 to 60.

        Their number times the mean time between recent departures, idle time left out (Little's law). The
        time since the last departure counts too, so that a service that has come to a halt asks for more.
        """
        busy = sum(self._gaps) + (self._clock() - self._since if self.inside else 0.0)
        estimate = self.inside * busy / max(len(self._gaps), 1)
        return min(max(math.ceil(estimate), SHORTEST), LONGEST)

    def _change(self, kind: Kind, change: int) -> None:
        self._inside[kind] += change
        self._meters.queue(kind, self._inside[kind])
