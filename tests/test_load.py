"""The load tells what happened: latency from when requests were due, every failure, every wrong picture."""

import asyncio
import base64
import io
import json
import statistics
import time

import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from PIL import Image
from pydantic import ValidationError
from standin_service import Faults, create_app, picture

from jobs import load
from jobs.load import LoadConfig, due_times, questions
from jobs.load_answers import Answers, Asked
from jobs.load_figures import (
    Outcome,
    Record,
    figures,
    latencies,
    read_outcomes,
    read_zero,
    timeline,
    versions,
)

QUICK = {"warmup_s": 0.0, "seconds": 0.2, "rate": 200.0, "arrivals": "even", "seeds": 2, "labels": (0, 1)}


def put(faults: Faults, **options):
    """Put a load on a stand-in in this process; return its outcomes."""

    async def run():
        async with TestServer(create_app(faults)) as server:
            url = str(server.make_url("")).rstrip("/")
            return await load.put_load(LoadConfig.model_validate({"url": url} | QUICK | options))

    return asyncio.run(run()).outcomes


def outcome(number=0, due=0.0, ended=0.1, **options):
    return Outcome(number, due, due, ended, **options)


def test_percentiles_are_those_of_the_latencies_from_the_due_times():
    spent = np.random.default_rng(0).exponential(0.05, 173)
    told = latencies(outcome(i, due=i / 10, ended=i / 10 + s) for i, s in enumerate(spent))
    cuts = statistics.quantiles(1e3 * spent, n=100, method="inclusive")
    for q in (50, 95, 99):
        assert told[f"p{q}_ms"] == pytest.approx(cuts[q - 1], abs=0.01)
    assert told["max_ms"] == pytest.approx(1e3 * spent.max(), abs=0.01)


def test_figures_of_nothing_are_none_and_not_an_error():
    told = figures([], 10.0, 100.0)
    assert told["requests"] == told["completed"] == told["failed"] == told["wrong"] == 0
    assert told["p50_ms"] is told["max_ms"] is told["goodput"] is told["mean_batch"] is None


def test_figures_count_failures_and_wrong_answers_as_no_answers():
    outcomes = [
        outcome(0, 0.0, 0.05, batch_size=4.0),
        outcome(1, 0.1, 0.4, batch_size=8.0, retries=2),
        outcome(2, 0.2, 0.21, failed="503 unavailable", first_failed="503 unavailable"),
        outcome(3, 0.3, 0.31, wrong="other pixels", batch_size=100.0),
        outcome(4, 0.4, 0.45, tries=2, first_failed="connection"),
    ]
    told = figures(outcomes, 1.0, goodput_ms=100.0)
    assert (told["requests"], told["completed"], told["failed"], told["wrong"]) == (5, 3, 1, 1)
    assert told["failures"] == {"503 unavailable": 1}
    assert told["wrongs"] == {"other pixels": 1}
    assert told["first_try_failures"] == {"503 unavailable": 1, "connection": 1}
    assert (told["client_retries"], told["server_retries"]) == (1, 2)
    assert told["rps"] == 3.0
    assert told["goodput"] == 2 / 5
    assert told["mean_batch"] == 6.0
    assert told["max_ms"] == 300.0


def test_the_warm_up_is_left_out_of_latencies_but_not_of_throughput():
    outcomes = [outcome(0, -2.0, -1.0), outcome(1, -1.0, 0.5), outcome(2, 0.5, 1.0), outcome(3, 1.9, 2.5)]
    told = figures(outcomes, 2.0, 1e3)
    assert (told["requests"], told["warmup_requests"]) == (2, 2)
    assert told["rps"] == 1.0  # the second and the third came in time, whenever they were due
    assert told["max_ms"] == 600.0


def test_timeline_and_versions_follow_the_clock():
    outcomes = [
        outcome(0, 0.1, 0.2, version="a"),
        outcome(1, 0.9, 1.4, failed="timeout"),
        outcome(2, 1.2, 1.3, version="b"),
        outcome(3, 1.3, 1.6, version="a", wrong="seed"),
    ]
    first, second = timeline(outcomes)
    assert first == {"second": 0, "due": 2, "failed": 1, "wrong": 0, "p50_ms": 100.0, "max_ms": 100.0}
    assert (second["due"], second["wrong"], second["max_ms"]) == (2, 1, 100.0)
    told = versions(outcomes)
    assert list(told) == ["a", "b"]
    assert told["a"] == {"answers": 2, "first_s": 0.2, "last_s": 1.6}


def test_a_stalled_server_shows_in_every_request_that_was_due_meanwhile():
    stalled: list[float] = []

    def block(number: int) -> None:
        if number == 5:
            time.sleep(0.3)  # stops this process's event loop: the client too, which therefore sends late
            stalled.append(time.monotonic())

    faults = Faults()
    faults.block = block
    outcomes = put(faults, seconds=0.4, rate=100.0)
    assert len(outcomes) == 40
    assert [one.due_s for one in sorted(outcomes, key=lambda one: one.number)] == pytest.approx(
        np.arange(40) / 100, abs=1e-9
    )
    told = figures(outcomes, 0.4, 1e3)
    # Due every 10 ms: at least 25 were due in the 300 ms, so at least half of all waited 50 ms or more.
    assert told["max_ms"] >= 300
    assert sum(one.latency_s >= 0.05 for one in outcomes) >= 25
    assert told["p50_ms"] >= 50
    # A clock started at the sending would have seen one slow request.
    late = [one for one in outcomes if one.sent_s - one.due_s >= 0.05]
    assert len(late) >= 15
    assert all(one.latency_s >= one.sent_s - one.due_s for one in outcomes)
    assert told["late_p99_ms"] >= 200


def test_right_answers_are_right_and_their_headers_are_read():
    outcomes = put(Faults())
    assert all(one.right for one in outcomes)
    told = figures(outcomes, 0.4, 1e3)
    assert told["completed"] == 40
    assert (told["mean_batch"], told["queued_ms"], told["compute_ms"]) == (4.0, 2.5, 7.5)
    assert told["server_retries"] == 40
    assert set(told["versions"]) == {"a"}


def other_pixels(answer):
    answer["data"][0]["b64_json"] = picture("zz", 9, 9, 9, 9)


def a_torn_file(answer):
    data = base64.b64decode(answer["data"][0]["b64_json"])
    answer["data"][0]["b64_json"] = base64.b64encode(data[: len(data) // 2]).decode()


SPOILS = {
    "other pixels": other_pixels,
    "number of images": lambda answer: answer["data"].append(answer["data"][0]),
    "seed": lambda answer: answer.update(seed=10**6),
    "no data": lambda answer: answer.update(data=None),
    "not a picture": a_torn_file,
}


@pytest.mark.parametrize("kind", SPOILS)
def test_a_wrong_answer_is_found(kind):
    faults = Faults()
    faults.spoil = lambda number, answer: SPOILS[kind](answer) if number in (20, 31) else None
    outcomes = put(faults)
    assert [one.wrong for one in outcomes if one.wrong] == [kind, kind]
    assert not any(one.failed for one in outcomes)


def test_an_answer_to_another_question_is_found():
    """What mixed-up batches would do: all pictures are good ones, one of them is another question's."""
    kept = []

    def exchange(number, answer):
        kept.append(answer["data"])
        if number == 21:
            # Questions may come in another order than they were sent: the one before may be the same.
            answer["data"] = [data for data in kept if data != answer["data"]][-1]

    faults = Faults()
    faults.spoil = exchange
    assert [one.wrong for one in put(faults)].count("other pixels") == 1


def test_the_same_pixels_in_another_file_are_not_wrong():
    asked, answers = Asked(3, 1, 1.0, 5), Answers()
    image = picture("a", 3, 1, 5, 0)
    assert answers.fault(asked, "v", {"data": [{"b64_json": image}], "seed": 5}) == ""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(image))).save(buffer, format="PNG", compress_level=0)
    again = base64.b64encode(buffer.getvalue()).decode()
    assert again != image
    assert answers.fault(asked, "v", {"data": [{"b64_json": again}], "seed": 5}) == ""
    other = picture("a", 4, 1, 5, 0)
    assert answers.fault(asked, "w", {"data": [{"b64_json": other}], "seed": 5}) == ""
    assert answers.fault(asked, "v", {"data": [{"b64_json": other}], "seed": 5}) == "other pixels"


def test_pictures_are_compared_with_those_of_earlier_loads(tmp_path):
    known = str(tmp_path / "known.json")
    assert all(one.right for one in put(Faults(), known=known))
    assert len(json.loads((tmp_path / "known.json").read_text())) == 4
    faults = Faults()
    faults.spoil = lambda _, answer: other_pixels(answer)
    assert all(one.wrong == "other pixels" for one in put(faults, known=known))


def test_failures_are_told_by_their_kind():
    faults = Faults()
    error = {"error": {"code": "queue_full", "message": "", "type": "", "param": None}}
    faults.refuse = lambda number: (429, {}, error) if number % 2 else (500, {}, {"detail": "x"})
    told = figures(put(faults), 0.4, 1e3)
    assert told["failures"] == {"500": 20, "429 queue_full": 20}
    assert told["completed"] == 0


def test_a_slow_answer_is_a_timeout_and_a_closed_door_a_broken_connection():
    faults = Faults()
    faults.delay_s = 0.3
    assert {one.failed for one in put(faults, timeout_s=0.05, rate=20.0)} == {"timeout"}
    config = LoadConfig.model_validate({"url": "http://127.0.0.1:9"} | QUICK)
    assert {one.failed for one in asyncio.run(load.put_load(config)).outcomes} == {"connection"}


def test_client_retries_are_counted_apart_from_first_tries():
    seen: dict[int, int] = {}

    def refuse(number):
        seen[number] = number
        return (503, {"retry-after": "0"}, {"error": {"code": "unavailable"}}) if number % 2 == 0 else None

    faults = Faults()
    faults.refuse = refuse
    told = figures(put(faults, retries=8, concurrency=1, rate=None), 0.4, 1e3)
    assert told["failed"] == 0
    assert told["first_try_failures"] == {"503 unavailable": told["requests"]}
    assert told["client_retries"] == told["requests"]


def test_a_closed_load_keeps_as_many_requests_under_way_as_it_has_clients():
    under_way, most = set(), []
    faults = Faults()
    faults.delay_s = 0.01
    faults.block = lambda number: (under_way.add(number), most.append(len(under_way)))
    faults.spoil = lambda number, _: under_way.discard(number)
    put(faults, rate=None, concurrency=5)
    assert max(most) == 5


def test_due_times_are_poisson_or_even_and_follow_the_seed():
    poisson = LoadConfig(rate=200.0, seconds=30.0, warmup_s=1.0)
    times = np.array(due_times(poisson))
    assert due_times(poisson) == times.tolist()
    assert due_times(poisson.model_copy(update={"seed": 1})) != times.tolist()
    assert times[0] == -1.0
    assert times[-1] < 30.0
    gaps = np.diff(times)
    assert len(times) == pytest.approx(31 * 200, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)  # of exponential gaps
    even = np.diff(due_times(poisson.model_copy(update={"arrivals": "even"})))
    assert np.allclose(even, 1 / 200)


def test_every_question_is_asked_before_one_comes_again():
    config = LoadConfig(steps=(1, 4), labels=(0, 3), seeds=3, images=2)
    asked = questions(config)
    assert len(set(asked)) == len(asked) == 12
    assert asked == questions(config)
    assert asked != questions(config.model_copy(update={"seed": 1}))
    assert asked[0].body()["n"] == 2


def test_a_record_is_read_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "load.jsonl"
    assert read_zero(path) is None
    record = Record(path, 12.5)
    assert read_zero(path) == 12.5
    kept = [outcome(0, 0.0, 0.1, version="a", batch_size=2.0), outcome(1, 0.1, 0.3, failed="timeout")]
    for one in kept:
        record.add(one)
    record.close()
    assert read_outcomes(path) == kept


def test_a_bad_address_is_refused():
    with pytest.raises(ValidationError, match="url"):
        LoadConfig(url="localhost:8000")
