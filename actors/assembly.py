"""The messages of all ranks for one step become one call, whose result is handed back to each."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[int, int]


class Superseded(ConnectionError):  # noqa: N818 - says what became of the call
    """The state was loaded anew while this call waited; its trainer is gone or must ask again."""


class Behind(RuntimeError):  # noqa: N818 - says where the group stands
    """The group has not seen earlier steps (it was restarted): send them again, from `next_key` on."""

    def __init__(self, next_key: Key) -> None:
        self.next_key = next_key
        super().__init__(f"this critic group expects step {next_key[0]}, micro-batch {next_key[1]}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.next_key,)


@dataclass
class _Round:
    """One attempt at a key; whoever waits holds on to it, whatever comes after."""

    parts: dict[int, Any] = field(default_factory=dict)
    results: Sequence[Any] | None = None
    failure: Exception | None = None

    @property
    def settled(self) -> bool:
        return self.results is not None or self.failure is not None


class Assembly:
    """Collects one part per rank under a key (step, micro-batch) and computes once all are there.

    Whoever brings the last part computes; the parts are in rank order, so the order of arrival changes
    nothing. The results after `answered` are kept, and the last: a rank that asks again gets the same answer.
    Thread-safe.
    """

    def __init__(self, compute: Callable[[Sequence[Any]], Sequence[Any]], timeout: float) -> None:
        self._compute = compute
        self._timeout = timeout
        self._condition = threading.Condition()
        self._open: dict[Key, _Round] = {}
        self._results: dict[Key, Sequence[Any]] = {}
        self.answered: Key | None = None
        """The last key whose result every rank is known to have; earlier ones are dropped at the next one."""

    def reset(self) -> None:
        """Forget everything, and release whoever waits with `Superseded`."""
        with self._condition:
            for key, waiting in self._open.items():
                waiting.failure = Superseded(f"step {key[0]}: the panel was set to another state")
            self._open, self._results, self.answered = {}, {}, None
            self._condition.notify_all()

    def remembers(self, key: Key) -> bool:
        """Return whether the result of `key` is at hand."""
        with self._condition:
            return key in self._results

    def follows(self, key: Key, computed: Callable[[], bool], grace: float) -> bool:
        """Return whether `key` is `computed`, after waiting for it as long as it is on its way.

        A part that is not here within `grace` seconds was lost: those of one rank arrive almost in order.
        """
        begun = time.monotonic()
        with self._condition:
            while not computed():
                limit = self._timeout if key in self._open else grace
                left = begun + limit - time.monotonic()
                if left <= 0:
                    return False
                self._condition.wait(min(left, grace))
            return True

    def submit(self, key: Key, rank: int, ranks: int, part: Any) -> Any:
        """Bring rank `rank`'s part of `key` and wait for its share of the result.

        Raises Superseded if `reset` was called meanwhile, TimeoutError if other ranks do not come, and
        whatever the computation raises, to every rank; asking again then makes a new attempt.
        """
        with self._condition:
            if key in self._results:
                return self._results[key][rank]
            mine = self._open.setdefault(key, _Round())
            mine.parts[rank] = part
            if len(mine.parts) == ranks:
                self._finish(key, mine)
            elif not self._condition.wait_for(lambda: mine.settled, self._timeout):
                missing = sorted(set(range(ranks)) - set(mine.parts))
                raise TimeoutError(
                    f"step {key[0]}: ranks {missing} sent no samples within {self._timeout:g} s of the first"
                )
            if mine.failure is not None:
                raise mine.failure
            assert mine.results is not None
            return mine.results[rank]

    def _finish(self, key: Key, complete: _Round) -> None:
        del self._open[key]
        parts = [complete.parts[rank] for rank in sorted(complete.parts)]
        try:
            complete.results = self._compute(parts)
            since = self.answered
            kept = {k: result for k, result in self._results.items() if since is None or k > since}
            self._results = kept | {key: complete.results}
        except Exception as error:
            complete.failure = error
        self._condition.notify_all()
