"""Ranks' messages become one call: any order of arrival, repeats, failures, absences and resets."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.assembly import Assembly, Superseded


def joined(parts):
    text = "".join(parts)
    return [f"{text}/{rank}" for rank in range(len(parts))]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_result_is_in_rank_order_whatever_the_arrival(order):
    assembly = Assembly(joined, timeout=10.0)
    with ThreadPoolExecutor(3) as pool:
        futures = {}
        for rank in order:
            futures[rank] = pool.submit(assembly.submit, (0, 0), rank, 3, "abc"[rank])
            time.sleep(0.01)
        assert [futures[rank].result(5) for rank in range(3)] == ["abc/0", "abc/1", "abc/2"]


def test_a_repeated_question_gets_the_same_answer_without_another_computation():
    calls = []

    def compute(parts):
        calls.append(parts)
        return joined(parts)

    assembly = Assembly(compute, timeout=1.0)
    assert assembly.submit((0, 0), 0, 1, "a") == assembly.submit((0, 0), 0, 1, "a") == "a/0"
    assert len(calls) == 1


def test_absent_ranks_are_named_when_time_is_up():
    with pytest.raises(TimeoutError, match=r"step 4: ranks \[1, 2\] sent no samples within 0.05 s"):
        Assembly(joined, timeout=0.05).submit((4, 0), 0, 3, "a")


def test_a_failed_computation_reaches_every_rank_and_can_be_asked_again():
    outcomes = iter([RuntimeError("heads exploded"), None])

    def compute(parts):
        error = next(outcomes)
        if error:
            raise error
        return joined(parts)

    assembly = Assembly(compute, timeout=10.0)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(assembly.submit, (0, 0), rank, 2, "ab"[rank]) for rank in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match="heads exploded"):
                future.result(5)
        futures = [pool.submit(assembly.submit, (0, 0), rank, 2, "ab"[rank]) for rank in range(2)]
        assert [future.result(5) for future in futures] == ["ab/0", "ab/1"]


def test_reset_releases_whoever_waits():
    assembly = Assembly(joined, timeout=30.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(assembly.submit, (0, 0), 0, 2, "a")
        while not assembly._open:
            time.sleep(0.001)
        assembly.reset()
        with pytest.raises(Superseded):
            waiting.result(5)
    # The part that was left behind does not complete a later step.
    later = threading.Timer(0.05, assembly.submit, ((0, 0), 1, 2, "b"))
    later.start()
    assert assembly.submit((0, 0), 0, 2, "A") == "Ab/0"


def test_results_are_kept_until_every_rank_is_known_to_have_them():
    calls = []

    def compute(parts):
        calls.append(parts)
        return joined(parts)

    assembly = Assembly(compute, timeout=1.0)
    for step in range(3):
        assembly.submit((step, 0), 0, 1, str(step))
    assert [assembly.submit((step, 0), 0, 1, "again") for step in range(3)] == ["0/0", "1/0", "2/0"]
    assembly.answered = (1, 0)
    assembly.submit((3, 0), 0, 1, "3")
    assert [assembly.remembers((step, 0)) for step in range(4)] == [False, False, True, True]
    assert len(calls) == 4


def test_a_message_waits_for_the_one_before_it_as_long_as_that_is_on_its_way():
    done = []
    assembly = Assembly(lambda parts: [done.append(0) for _ in parts], timeout=10.0)
    with ThreadPoolExecutor(4) as pool:
        one = pool.submit(assembly.submit, (0, 0), 0, 2, "a")
        while (0, 0) not in assembly._open:
            time.sleep(0.001)
        follower = pool.submit(assembly.follows, (0, 0), lambda: bool(done), 0.01)
        time.sleep(0.1)
        assert not follower.done()
        assembly.submit((0, 0), 1, 2, "b")
        assert one.result(5) is None
        assert follower.result(5)
    assert not assembly.follows((1, 0), lambda: False, 0.01)
