"""Admission, deadlines and timings: a full service says when to come back, and answers say what they took."""

import pytest
from serving_parts import service

from actors.serving.admission import Admission
from actors.serving.config import LimitsConfig
from actors.serving.deadline import deadline_of
from actors.serving.errors import ApiError
from actors.serving.messages import Work
from actors.serving.meters import Meters
from actors.serving.timings import work_headers

STAYING = []
"""Blocks that were entered: one that nobody refers to would be left at once."""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def metric(meters, name, **labels):
    return meters.registry.get_sample_value(f"counterpoint_{name}", labels)


def enter(admission, kind="images"):
    """Go in, and return what goes out."""
    block = admission.enter(kind)
    block.__enter__()
    STAYING.append(block)
    return lambda: block.__exit__(None, None, None)


def refusal(admission, kind="images"):
    with pytest.raises(ApiError) as caught:
        enter(admission, kind)
    return caught.value


def test_the_limit_holds_over_both_kinds_and_a_place_that_is_left_is_free():
    meters = Meters()
    admission = Admission(3, meters, Clock())
    assert metric(meters, "queue_length", kind="actions") == 0
    leave = enter(admission)
    enter(admission, "actions")
    enter(admission, "actions")
    assert metric(meters, "queue_length", kind="images") == 1
    assert metric(meters, "queue_length", kind="actions") == 2
    error = refusal(admission)
    assert (error.code, error.status, error.body()["error"]["type"]) == (
        "queue_full",
        429,
        "rate_limit_error",
    )
    assert metric(meters, "queue_length", kind="images") == 1
    leave()
    assert metric(meters, "queue_length", kind="images") == 0
    enter(admission, "actions")
    refusal(admission, "actions")


def test_a_request_that_fails_or_is_cancelled_leaves_its_place():
    admission = Admission(1, Meters(), Clock())
    for error in (ValueError, GeneratorExit, KeyboardInterrupt, ApiError("unavailable", "no replica")):
        with pytest.raises(error if isinstance(error, type) else ApiError), admission.enter("images"):
            raise error
    assert admission.inside == 0


@pytest.mark.parametrize(("seconds", "limit"), [(0.001, 100), (0.5, 10), (2.0, 12), (3.0, 5), (5.0, 100)])
def test_a_full_service_says_when_those_inside_will_have_left(seconds, limit):
    """One server, `seconds` each: the last of those inside leaves after limit * seconds."""
    clock = Clock()
    admission = Admission(limit, Meters(), clock)
    inside = [enter(admission) for _ in range(limit)]
    for _ in range(200):
        clock.now += seconds
        inside.pop(0)()
        inside.append(enter(admission))
    error = refusal(admission)
    assert isinstance(error.retry_after, int)
    assert error.retry_after == pytest.approx(min(max(limit * seconds, 1), 60), abs=1)
    assert error.message.endswith(f"try again in {error.retry_after} s")


def test_idle_time_does_not_count_as_service():
    clock = Clock()
    admission = Admission(2, Meters(), clock)
    for _ in range(64):
        clock.now += 1000
        leave = enter(admission)
        clock.now += 4
        leave()
    clock.now += 1000
    enter(admission)
    enter(admission)
    assert refusal(admission).retry_after == 8


def test_a_service_at_a_halt_asks_for_ever_more_but_never_for_more_than_a_minute():
    clock = Clock()
    admission = Admission(4, Meters(), clock)
    for _ in range(4):
        enter(admission)
    told = []
    for _ in range(30):
        clock.now += 1
        told.append(refusal(admission).retry_after)
    assert told[0] == 4
    assert told == sorted(told)
    assert told[-1] == 60


def test_a_limit_of_the_configuration_is_the_most_inside():
    config = service(limits={"max_queue": 2})
    admission = Admission(config.limits.max_queue, Meters(), Clock())
    enter(admission)
    enter(admission)
    assert "2 requests are under way" in refusal(admission).message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 30.0), ({"x-deadline-ms": "1"}, 0.001), ({"x-deadline-ms": " 250 "}, 0.25),
        ({"x-deadline-ms": "29999"}, 29.999), ({"x-deadline-ms": "30001"}, 30.0),
        ({"x-deadline-ms": "999999999999"}, 30.0), ({"x-deadline-ms": "007"}, 0.007),
    ],
)  # fmt: skip
def test_a_client_may_ask_for_less_time_but_not_for_more(headers, seconds):
    assert deadline_of(headers, LimitsConfig()) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "1.5", "1e3", "nan", "inf", "soon", "²", "٣", "5ms", "+5", "9" * 5000, "\udc80"]
)
def test_a_malformed_deadline_is_refused_by_name(text):
    with pytest.raises(ApiError) as caught:
        deadline_of({"x-deadline-ms": text}, LimitsConfig())
    error = caught.value
    assert (error.code, error.param) == ("invalid_value", "x-deadline-ms")
    assert error.message.startswith("x-deadline-ms=")
    assert error.message.endswith("such as 500")
    assert len(error.message) < 200


def test_what_an_answer_took_is_in_its_headers():
    work = Work("digits-v2", "replica-3", 0.0123456, 1.5, 4, 6.5, 2)
    assert work_headers(work) == {
        "x-model-version": "digits-v2",
        "x-queue-ms": "12.346",
        "x-compute-ms": "1500.000",
        "x-batch-size": "6.5",
        "x-retries": "2",
        "x-replica": "replica-3",
    }


def test_work_is_counted_by_kind_and_model():
    meters = Meters(["digits"])
    meters.work("images", "digits", Work("v", "r", 0.25, 0.5, 4, 6.5, 2))
    meters.work("images", "digits", Work("v", "r", 0.25, 1.5, 2, 3.5))
    meters.work("actions", "made up by a client", Work("v", "r", 0.0, 0.5, 1, 1.0))
    whose = {"kind": "images", "model": "digits"}
    sums = {"batch_size": 10.0, "queue_seconds": 0.5, "compute_seconds": 2.0, "steps_per_request": 6.0}
    for name, total in sums.items():
        assert metric(meters, f"{name}_sum", **whose) == total
        assert metric(meters, f"{name}_count", **whose) == 2
        assert metric(meters, f"{name}_count", kind="actions", model="") == 1
    assert metric(meters, "retries_total", **whose) == 2
    assert b"made up" not in meters.render()


def test_requests_sessions_and_stale_observations_are_counted():
    meters = Meters(["digits", "blocks"])
    for status, seconds in ((200, 0.5), (200, 0.25), (429, 0.0)):
        meters.request("/v1/actions", "blocks", status, seconds)
    meters.request("/v1/models/{name}", "unheard of", 404, 0.0)
    where = {"endpoint": "/v1/actions", "model": "blocks"}
    assert metric(meters, "requests_total", **where, status="200") == 2
    assert metric(meters, "requests_total", **where, status="429") == 1
    assert metric(meters, "request_seconds_sum", **where) == 0.75
    assert metric(meters, "requests_total", endpoint="/v1/models/{name}", model="", status="404") == 1
    for change in (1, 1, -1):
        meters.session(change)
    meters.dropped("blocks", 3)
    meters.dropped("blocks", 0)
    assert metric(meters, "sessions") == 1
    assert metric(meters, "dropped_observations_total", model="blocks") == 3
    assert metric(Meters(), "sessions") == 0
