"""Waiting ends: with values, with the remote error itself, or with a message that says what was missing."""

import pickle
import time

import pytest
import ray

from cluster import waiting
from cluster.waiting import NotReady, WaitTimeout


@ray.remote(num_cpus=0)
def nap(seconds: float, value: int = 0) -> int:
    time.sleep(seconds)
    return value


@ray.remote(num_cpus=0)
def wrong(message: str) -> None:
    raise KeyError(message)


@ray.remote(num_cpus=0)
def through(ref_in_list: list) -> int:
    return waiting.get(ref_in_list[0], 10, "the inner call")


@ray.remote(num_cpus=0)
class Slow:
    def __init__(self, seconds: float) -> None:
        time.sleep(seconds)

    def pid(self) -> int:
        return 1


@ray.remote(num_cpus=0)
class Broken:
    def __init__(self) -> None:
        raise ZeroDivisionError("constructor divides")

    def pid(self) -> int:
        return 1


def test_get_keeps_the_shape_of_what_was_asked(ray_cluster):
    assert waiting.get(nap.remote(0, 7), 20, "one") == 7
    assert waiting.get([nap.remote(0.05, 1), nap.remote(0, 2)], 20, "list") == [1, 2]
    assert waiting.get({"a": nap.remote(0, 3), "b": nap.remote(0, 4)}, 20, "mapping") == {"a": 3, "b": 4}
    assert waiting.get([], 1, "nothing") == []


def test_get_names_what_is_missing_when_time_is_up(ray_cluster):
    waiting.get([nap.remote(0), nap.remote(0)], 20, "warm workers")
    refs = {"critic/0": ray.put(1), "critic/1": nap.remote(30), "critic/2": nap.remote(30)}
    start = time.monotonic()
    with pytest.raises(WaitTimeout) as caught:
        waiting.get(refs, 0.3, "verdicts of step 12")
    assert time.monotonic() - start < 3
    assert str(caught.value) == (
        "verdicts of step 12: 1 of 3 finished within 0.3 s (missing: critic/1, critic/2)"
    )
    assert isinstance(caught.value, TimeoutError)
    for ref in list(refs.values())[1:]:
        ray.cancel(ref, force=True)


def test_get_counts_a_reference_that_is_asked_for_twice(ray_cluster):
    slow = nap.remote(30)
    with pytest.raises(WaitTimeout, match="twice: 1 of 3 finished"):
        waiting.get([slow, slow, ray.put(1)], 0.2, "twice")
    ray.cancel(slow, force=True)


def test_get_raises_the_remote_error_itself_with_the_remote_traceback_as_cause(ray_cluster):
    with pytest.raises(KeyError) as caught:
        waiting.get(wrong.remote("missing-band"), 20, "a failing call")
    assert type(caught.value) is KeyError
    assert "missing-band" in str(caught.value.__cause__)
    assert "in wrong" in str(caught.value.__cause__)


def test_get_unwraps_an_error_that_came_through_two_processes(ray_cluster):
    with pytest.raises(KeyError) as caught:
        waiting.get(through.remote([wrong.remote("deep")]), 20, "two hops")
    assert type(caught.value) is KeyError


def test_get_does_not_wait_for_the_rest_once_one_has_failed(ray_cluster):
    slow = nap.remote(30)
    start = time.monotonic()
    with pytest.raises(KeyError):
        waiting.get([slow, wrong.remote("early")], 20, "one fails, one hangs")
    assert time.monotonic() - start < 10
    ray.cancel(slow, force=True)


@pytest.mark.parametrize("timeout", [None, float("inf"), -1, float("nan"), "5"])
def test_get_refuses_a_wait_without_end(ray_cluster, timeout):
    with pytest.raises(ValueError, match="timeout="):
        waiting.get(ray.put(1), timeout, "anything")


def test_ready_returns_when_all_constructors_have_and_names_those_that_have_not(ray_cluster):
    quick, slow = Slow.remote(0), Slow.remote(30)
    waiting.ready({"critic/0": quick}, 20, "start of the panel")
    with pytest.raises(WaitTimeout, match=r"start of the panel: 1 of 2 .*missing: critic/1"):
        waiting.ready({"critic/0": quick, "critic/1": slow}, 0.5, "start of the panel")
    ray.kill(slow)


def test_ready_reports_the_constructor_that_failed_without_waiting_for_the_others(ray_cluster):
    slow, broken = Slow.remote(30), Broken.remote()
    start = time.monotonic()
    with pytest.raises(NotReady, match=r"critic/1 failed to start.*constructor divides") as caught:
        waiting.ready({"critic/0": slow, "critic/1": broken}, 25, "start of the panel")
    assert time.monotonic() - start < 15
    assert (caught.value.name, type(caught.value.cause)) == ("critic/1", ZeroDivisionError)
    ray.kill(slow)


def test_done_and_first_of_split_without_losing_a_reference(ray_cluster):
    quick, slow = nap.remote(0), nap.remote(30)
    finished, pending = waiting.first_of([slow, quick], 20, "the quick one")
    assert (finished, pending) == ([quick], [slow])
    assert waiting.done([slow, quick]) == ([quick], [slow])
    assert waiting.done([]) == ([], [])
    with pytest.raises(WaitTimeout, match="both: 1 of 2"):
        waiting.first_of([slow, quick], 0.1, "both", count=2)
    with pytest.raises(ValueError, match="count=3 of 2"):
        waiting.first_of([slow, quick], 0.1, "three", count=3)
    ray.cancel(slow, force=True)


def test_timeouts_survive_pickling():
    error = WaitTimeout("evaluation", 2.5, 1, 3, ["a", "b"])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
