"""Requests of many threads become few batches, each caller gets its own part, and nobody pays for another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.batching import Batcher, BatchStatistics

LONG = 30.0
"""Seconds that no test waits: a batch that is computed sooner was full, or its batcher closed."""


class Doubler:
    """Doubles what it is given, a batch at a time, once `opened`; refuses negative items."""

    def __init__(self, opened=True):
        self.batches, self.threads = [], set()
        self.gate = threading.Event()
        self.busy = threading.Lock()
        if opened:
            self.gate.set()

    def __call__(self, key, items):
        assert self.busy.acquire(blocking=False), "two batches at once"
        try:
            assert self.gate.wait(LONG)
            self.batches.append((key, list(items)))
            self.threads.add(threading.current_thread().name)
            if min(items) < 0:
                raise ValueError(f"item {min(items)} is negative")
            return [2 * item for item in items]
        finally:
            self.busy.release()


def ask_all(batcher, requests, **options):
    """Submit every request from a thread of its own, and return answers or errors in their order."""

    def ask(request):
        try:
            return batcher.submit(request, **options)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


def test_each_caller_gets_its_own_part_of_a_batch():
    compute = Doubler()
    batcher = Batcher(compute, max_batch=21, max_wait=LONG)
    requests = [list(range(10 * n, 10 * n + n)) for n in range(1, 7)]
    assert ask_all(batcher, requests) == [[2 * item for item in request] for request in requests]
    assert [len(items) for _, items in compute.batches] == [21]
    assert compute.threads == {"batcher"}
    statistics = batcher.statistics()
    assert (statistics.batches, statistics.requests, statistics.observations) == (1, 6, 21)
    assert statistics.mean_batch_size == 21
    assert statistics.seconds > 0
    batcher.close()


def test_a_lone_request_waits_no_longer_than_it_may():
    batcher = Batcher(Doubler(), max_batch=8, max_wait=0.01)
    assert batcher.submit([1, 2], timeout=LONG / 2) == [2, 4]
    assert batcher.submit([3], timeout=LONG / 2) == [6]
    assert batcher.statistics().mean_batch_size == 1.5
    batcher.close()


def test_batches_stay_below_their_limit_and_keep_requests_whole():
    compute = Doubler(opened=False)
    batcher = Batcher(compute, max_batch=4, max_wait=0.0)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(batcher.submit, [0])
        while not compute.busy.locked():
            pass
        others = [pool.submit(batcher.submit, [n] * 3) for n in range(1, 4)]
        large = pool.submit(batcher.submit, list(range(9)))
        while len(batcher._queue) < 4:
            pass
        compute.gate.set()
        assert first.result(LONG) == [0]
        assert [one.result(LONG) for one in others] == [[2 * n] * 3 for n in range(1, 4)]
        assert large.result(LONG) == [2 * n for n in range(9)]
    assert sorted(len(items) for _, items in compute.batches) == [1, 3, 3, 3, 9]
    batcher.close()


def test_other_keys_do_not_join_a_batch():
    compute = Doubler()
    batcher = Batcher(compute, max_batch=4, max_wait=LONG)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(batcher.submit, [n], "even" if n % 2 == 0 else "odd") for n in range(8)]
        assert [one.result(LONG) for one in asked] == [[2 * n] for n in range(8)]
    assert sorted((key, sorted(items)) for key, items in compute.batches) == [
        ("even", [0, 2, 4, 6]), ("odd", [1, 3, 5, 7]),
    ]  # fmt: skip
    batcher.close()


def test_what_check_refuses_never_meets_a_batch():
    def check(items):
        if min(items) < 0:
            raise ValueError("refused")

    compute = Doubler()
    batcher = Batcher(compute, max_batch=3, max_wait=LONG, check=check)
    answers = ask_all(batcher, [[1], [-1], [2], [3]])
    assert answers[0::2] == [[2], [4]]
    assert answers[3] == [6]
    assert str(answers[1]) == "refused"
    assert [len(items) for _, items in compute.batches] == [3]
    batcher.close()


def test_an_error_in_one_request_fails_that_request_only():
    batcher = Batcher(Doubler(), max_batch=5, max_wait=LONG)
    answers = ask_all(batcher, [[1], [2], [-7], [3], [4]])
    assert answers[:2] + answers[3:] == [[2], [4], [6], [8]]
    assert isinstance(answers[2], ValueError)
    assert str(answers[2]) == "item -7 is negative"
    batcher.close()


def test_answers_must_be_as_many_as_items():
    batcher = Batcher(lambda key, items: items[1:], max_batch=2, max_wait=0.0)
    with pytest.raises(RuntimeError, match="2 items have got 1 answers"):
        batcher.submit([1, 2])
    batcher.close()


def test_a_caller_gives_up_after_its_timeout_and_the_batcher_goes_on():
    compute = Doubler(opened=False)
    batcher = Batcher(compute, max_batch=1, max_wait=0.0)
    with pytest.raises(TimeoutError):
        batcher.submit([1], timeout=0.05)
    compute.gate.set()
    assert batcher.submit([2], timeout=LONG) == [4]
    batcher.close()


def test_closing_computes_what_is_queued_and_refuses_the_rest():
    compute = Doubler()
    batcher = Batcher(compute, max_batch=10, max_wait=LONG)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(batcher.submit, [5])
        while not batcher._queue:
            pass
        batcher.close()
        assert asked.result(LONG) == [10]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit([1])


def test_no_items_need_no_batch():
    batcher = Batcher(Doubler(), max_batch=1, max_wait=LONG)
    assert batcher.submit([]) == []
    assert batcher.statistics() == BatchStatistics()
    batcher.close()


def test_statistics_add_up():
    total = BatchStatistics(2, 3, 8, 0.5) + BatchStatistics(2, 4, 4, 0.25)
    assert total == BatchStatistics(4, 7, 12, 0.75)
    assert total.mean_batch_size == 3
    assert BatchStatistics().mean_batch_size == 0


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_batch=0"):
        Batcher(Doubler(), 0, 1.0)


def test_what_is_cancelled_while_it_waits_is_never_computed():
    compute = Doubler(opened=False)
    batcher = Batcher(compute, max_batch=2, max_wait=0.0)
    first = batcher.enqueue([0])
    while not compute.busy.locked():
        pass
    kept, dropped, other = (batcher.enqueue([n]) for n in (1, 2, 3))
    assert dropped.cancel()
    assert not first.cancel(), "a batch that is under way is not given up"
    compute.gate.set()
    assert [one.result(LONG).answers for one in (first, kept, other)] == [[0], [2], [6]]
    assert [items for _, items in compute.batches] == [[0], [1, 3]], "another has taken the place"
    batcher.close()


def test_a_lone_request_that_is_cancelled_leaves_the_batcher_at_work():
    compute = Doubler()
    batcher = Batcher(compute, max_batch=2, max_wait=LONG)
    assert batcher.enqueue([1]).cancel()
    assert batcher.submit([2, 3], timeout=LONG) == [4, 6]
    assert [items for _, items in compute.batches] == [[2, 3]]
    batcher.close()


def test_a_caller_that_gave_up_leaves_no_work_behind():
    compute = Doubler(opened=False)
    batcher = Batcher(compute, max_batch=1, max_wait=0.0)
    first = batcher.enqueue([1])
    while not compute.busy.locked():
        pass
    with pytest.raises(TimeoutError):
        batcher.submit([2], timeout=0.01)
    compute.gate.set()
    assert first.result(LONG).answers == [2]
    batcher.close()
    assert [items for _, items in compute.batches] == [[1]]


def test_each_request_learns_what_it_took():
    compute = Doubler()
    batcher = Batcher(compute, max_batch=3, max_wait=LONG)
    both = [batcher.enqueue([1]), batcher.enqueue([2, 3])]
    took = [one.result(LONG) for one in both]
    assert [(one.answers, one.batch_size) for one in took] == [([2], 3), ([4, 6], 3)]
    assert all(one.queued_s >= 0 and one.compute_s >= 0 for one in took)
    assert took[0].queued_s >= took[1].queued_s, "the first has waited for the second"
    batcher.close()


def test_time_spent_on_a_neighbours_error_is_told():
    starts = []

    def compute(key, items):
        starts.append(time.monotonic())
        if len(items) > 1:
            raise ValueError("together")
        return items

    batcher = Batcher(compute, max_batch=2, max_wait=LONG)
    took = [one.result(LONG) for one in (batcher.enqueue([1]), batcher.enqueue([2]))]
    assert [one.batch_size for one in took] == [1, 1], "of the batch that gave the answer"
    assert all(one.compute_s >= own - starts[0] for one, own in zip(took, starts[1:], strict=True))
    batcher.close()
