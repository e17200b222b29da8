"""Dynamic batching: requests of many threads become few batches, computed one at a time."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class BatchStatistics:
    """What a batcher has done so far."""

    batches: int = 0
    """Batches computed, failed ones included."""
    requests: int = 0
    observations: int = 0
    """Items of all requests."""
    seconds: float = 0.0
    """Spent computing."""

    @property
    def mean_batch_size(self) -> float:
        """Observations per batch; 0 before the first."""
        return self.observations / self.batches if self.batches else 0.0

    def __add__(self, other: "BatchStatistics") -> "BatchStatistics":
        """Return the sum of two batchers' work."""
        mine, theirs = asdict(self), asdict(other)
        return BatchStatistics(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Batched(Generic[Answer]):
    """The answers to a request's items, and what it took to compute them."""

    answers: list[Answer]
    queued_s: float = 0.0
    """From the request's arrival until a batch with it was begun."""
    compute_s: float = 0.0
    """From there until its answers were known, neighbours included."""
    batch_size: int = 0
    """Items of the batch that gave the answers, neighbours' included."""


@dataclass(eq=False)
class _Request(Generic[Item, Answer]):
    key: Hashable
    items: Sequence[Item]
    arrived: float
    begun: float = 0.0
    answers: "Future[Batched[Answer]]" = field(default_factory=Future)


class Batcher(Generic[Item, Answer]):
    """Collects requests until a batch is full or its first request has waited long enough, then computes.

    Batches are computed in one thread of the batcher's own, so `compute` need not be safe for threads.

    Args:
        compute: from a key and items to one answer per item.
        max_batch: items at which a batch is full. A larger request is computed whole, by itself.
        max_wait: seconds for which a request may wait for others to join.
        check: raises for items that `compute` would refuse; called in the caller's thread.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Item]], Sequence[Answer]],
        max_batch: int,
        max_wait: float,
        check: Callable[[Sequence[Item]], None] | None = None,
    ) -> None:
        if max_batch < 1 or max_wait < 0:
            raise ValueError(f"max_batch={max_batch}, max_wait={max_wait}: pass at least 1 and at least 0")
        self.compute, self.max_batch, self.max_wait, self.check = compute, max_batch, max_wait, check
        self._queue: list[_Request[Item, Answer]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._statistics = BatchStatistics()
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    def submit(
        self, items: Sequence[Item], key: Hashable = None, timeout: float | None = None
    ) -> list[Answer]:
        """Return the answers to `items`, computed together with others' items of an equal key.

        Raises what `check` or `compute` raise for these items; TimeoutError after `timeout` seconds, upon
        which they are no longer waited for, and RuntimeError if the batcher is closed.
        """
        asked = self.enqueue(items, key)
        try:
            return asked.result(timeout).answers
        except TimeoutError:
            asked.cancel()
            raise

    def enqueue(self, items: Sequence[Item], key: Hashable = None) -> "Future[Batched[Answer]]":
        """Return at once what will hold the answers to `items`, or the error that they end in.

        A request that is cancelled before its batch is begun is dropped. Raises what `check` raises, and
        RuntimeError if the batcher is closed.
        """
        if self.check is not None:
            self.check(items)
        request: _Request[Item, Answer] = _Request(key, items, time.monotonic())
        if not items:
            request.answers.set_result(Batched([]))
            return request.answers
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.append(request)
            self._changed.notify_all()
        return request.answers

    @property
    def thread_id(self) -> int:
        """The native id of the thread that computes."""
        native = self._thread.native_id
        assert native is not None  # it was started
        return native

    @property
    def alive(self) -> bool:
        """Whether its thread is still there to compute."""
        return self._thread.is_alive()

    def statistics(self) -> BatchStatistics:
        """Return what has been done so far."""
        with self._changed:
            return self._statistics

    def close(self) -> None:
        """Compute what is queued and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._answer(batch)

    def _next(self) -> list[_Request[Item, Answer]] | None:
        """Wait for a batch and take it from the queue; None once closed and done.

        It is empty where its requests were cancelled at the last moment.
        """
        with self._changed:
            while not self._ready():
                if not self._queue and self._closed:
                    return None
                self._changed.wait(self._left())
            batch = self._queue[:1]
            size = sum(len(request.items) for request in batch)
            for request in self._queue[1:]:
                if request.key == batch[0].key and size + len(request.items) <= self.max_batch:
                    batch.append(request)
                    size += len(request.items)
            self._queue = [request for request in self._queue if request not in batch]
            # From here on a request can no longer be cancelled.
            return [request for request in batch if request.answers.set_running_or_notify_cancel()]

    def _ready(self) -> bool:
        """Drop what was cancelled, and say whether the first request need not wait any longer."""
        self._queue = [request for request in self._queue if not request.answers.cancelled()]
        if not self._queue:
            return False
        first = self._queue[0]
        waiting = sum(len(request.items) for request in self._queue if request.key == first.key)
        return self._closed or waiting >= self.max_batch or self._left() == 0.0

    def _left(self) -> float | None:
        """Seconds for which the first request may still wait for others; None without one."""
        if not self._queue:
            return None
        return max(0.0, self._queue[0].arrived + self.max_wait - time.monotonic())

    def _answer(self, batch: list[_Request[Item, Answer]]) -> None:
        """Compute a batch; one that fails is computed again by request, to find whose fault it was."""
        begun = time.monotonic()
        for request in batch:
            request.begun = request.begun or begun
        try:
            answers = self._computed(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answers.set_exception(error)
                return
            for request in batch:
                self._answer([request])
            return
        size, done = len(answers), time.monotonic()
        for request in batch:
            mine, answers = answers[: len(request.items)], answers[len(request.items) :]
            queued, computed = request.begun - request.arrived, done - request.begun
            request.answers.set_result(Batched(mine, queued, computed, size))

    def _computed(self, batch: list[_Request[Item, Answer]]) -> list[Answer]:
        items = [item for request in batch for item in request.items]
        begun = time.perf_counter()
        try:
            answers = list(self.compute(batch[0].key, items))
        finally:
            done = BatchStatistics(1, len(batch), len(items), time.perf_counter() - begun)
            with self._changed:
                self._statistics += done
        if len(answers) != len(items):
            raise RuntimeError(f"{len(items)} items have got {len(answers)} answers")
        return answers
