"""Continuous batching: one thread moves all requests' images on, a step at a time, in shared evaluations."""

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from actors.serving.config import BatchingConfig
from actors.serving.image_model import ImageModel
from actors.serving.messages import ImageRequest
from actors.serving.orders import EngineAnswer, Order, check
from counterpoint.inflight import Chain, advance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatistics:
    """What an engine has done so far, and what it has to do."""

    evaluations: int = 0
    """Failed ones included."""
    rows: int = 0
    """Rows of those that succeeded."""
    padded_rows: int = 0
    """Copies of rows that filled those up."""
    requests: int = 0
    """Requests taken in so far."""
    seconds: float = 0.0
    """Spent in evaluations."""
    waiting: int = 0
    """Requests none of whose images is under way."""
    running: int = 0
    """Requests with images under way."""


class Engine:
    """Makes the images of many callers' requests in evaluations that they share, in a thread of its own.

    Between two evaluations images that are finished leave and waiting ones join, the oldest request's first,
    as long as there is room; none overtakes. Only images of one model share an evaluation; models take turns.
    A request's images are those of `jobs.sample` with its seed; with exact sizes their bits depend on nobody.

    Args:
        batching: rows of an evaluation, and how long a request that finds the engine idle waits for others.
    """

    def __init__(self, batching: BatchingConfig) -> None:
        self.batching = batching
        self._orders: list[Order] = []
        """Unfinished requests, oldest first."""
        self._changed = threading.Condition()
        self._closed = False
        self._done = EngineStatistics()
        self._turns: weakref.WeakKeyDictionary[ImageModel, int] = weakref.WeakKeyDictionary()
        """When each model had its last turn."""
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """The native id of the engine's thread."""
        native = self._thread.native_id
        assert native is not None  # it was started
        return native

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is there to answer."""
        return self._thread.is_alive()

    def submit(
        self, model: ImageModel, request: ImageRequest, deadline_s: float | None = None
    ) -> "Future[EngineAnswer]":
        """Queue a request for `model`, whichever model it names, and return what will hold its answer.

        Cancelling the future gives its room to others before the next evaluation. It fails with TimeoutError
        `deadline_s` seconds from now, RuntimeError if the engine is closed first, and what the model raises.
        Raises ValueError for a request that does not fit the model, and RuntimeError once closed.
        """
        check(model, request)
        now = time.monotonic()
        order = Order(model, request, now, None if deadline_s is None else now + deadline_s)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._orders.append(order)
            self._done = replace(self._done, requests=self._done.requests + 1)
            self._changed.notify_all()
        return order.future

    def statistics(self) -> EngineStatistics:
        """Return what has been done so far and is to do."""
        with self._changed:
            running = sum(bool(order.flying or order.landed) for order in self._orders)
            return replace(self._done, running=running, waiting=len(self._orders) - running)

    def close(self) -> None:
        """End the thread after the evaluation that it is in; unfinished requests fail with RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        # A thread's first maths may take all the machine's threads, and so other bits, until it is told.
        torch.set_num_threads(self._threads)
        while self._begin():
            self._turn()
        with self._changed:
            orders, self._orders = self._orders, []
        for order in orders:
            order.fail(RuntimeError("the engine was closed before the images were finished"))

    def _begin(self) -> bool:
        """Wait for work, and if there was none, for company; False once closed."""
        with self._changed:
            while not self._orders and not self._closed:
                self._changed.wait()
            while not self._closed and not any(order.flying for order in self._orders):
                first = self._orders[0]
                left = first.arrived + self.batching.max_wait - time.monotonic()
                mates = [order for order in self._orders if order.model is first.model]
                waiting = sum(order.rows * order.request.count for order in mates)
                if left <= 0 or waiting >= self._room(first.model):
                    break
                self._changed.wait(left)
            return not self._closed

    def _turn(self) -> None:
        """Give the model whose last turn is longest ago an evaluation."""
        orders = self._live()
        if not orders:
            return
        model = min((order.model for order in orders), key=lambda model: self._turns.get(model, -1))
        self._turns[model] = max(self._turns.values(), default=-1) + 1
        orders = [order for order in orders if order.model is model]
        try:
            self._board(orders)
            self._step([order for order in orders if order.flying])
        except Exception as error:  # whatever happens, the thread goes on to serve others
            logger.exception("a turn of %s failed", model.version)
            for order in orders:
                order.fail(error)
        self._live()

    def _live(self) -> list[Order]:
        """Drop requests that are finished, cancelled or late, and return the others."""
        now = time.monotonic()
        with self._changed:
            orders = list(self._orders)
        for order in orders:
            if order.deadline is not None and now > order.deadline and not order.future.done():
                order.fail(TimeoutError("the images were not finished before the request's deadline"))
        with self._changed:
            self._orders = [order for order in self._orders if not order.future.done()]
            return list(self._orders)

    def _room(self, model: ImageModel) -> int:
        return min(self.batching.max_batch, max(model.sizes))

    def _board(self, orders: Sequence[Order]) -> None:
        """Begin images while there is room, oldest request first; one always, be it of more rows."""
        room = self._room(orders[0].model)
        taken = sum(order.rows * len(order.flying) for order in orders)
        for order in orders:
            for index in order.unborn:
                if taken and taken + order.rows > room:
                    return
                try:
                    order.board(index)
                except Exception as error:
                    order.fail(error)
                    break
                taken += order.rows

    def _step(self, orders: Sequence[Order]) -> None:
        """Move the images of `orders` on; if that fails, each order's alone, to find whose fault it was."""
        if not orders:
            return
        chains = [chain for order in orders for chain in order.flying.values()]
        begun = time.monotonic()
        for order in orders:
            order.begun = order.begun if order.batches else begun
        try:
            evaluated = self._evaluated(orders[0].model, chains)
        except Exception as error:
            if len(orders) == 1:
                logger.exception("an evaluation of %s failed", orders[0].model.version)
                orders[0].fail(error)
                return
            for order in orders:
                self._step([order])
            return
        now = time.monotonic()
        for order in orders:
            order.batches.append(evaluated)
            try:
                order.settle(now)
            except Exception as error:
                order.fail(error)

    def _evaluated(self, model: ImageModel, chains: Sequence[Chain]) -> int:
        """Move `chains` on by a step and return their rows."""
        rows, padded = sum(chain.rows for chain in chains), 0
        begun = time.perf_counter()
        try:
            padded = advance(model.unet, chains, model.sizes)
            device = chains[0].state.device
            if device.type == "cuda":  # errors and times are this evaluation's, not a later one's
                torch.cuda.synchronize(device)
        finally:
            with self._changed:
                done = self._done
                self._done = replace(
                    done,
                    evaluations=done.evaluations + 1,
                    rows=done.rows + (rows if padded else 0),
                    padded_rows=done.padded_rows + (padded - rows if padded else 0),
                    seconds=done.seconds + time.perf_counter() - begun,
                )
        return rows
