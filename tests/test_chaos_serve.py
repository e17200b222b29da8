"""Chaos tells what clients noticed of kills and of a swap: outages, failures, and whose pictures they got."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from standin_service import Replicas

from jobs import chaos_serve
from jobs.chaos_figures import headline, outages, rows_of, swap_headline
from jobs.chaos_serve import ServeChaosConfig
from jobs.load_figures import Outcome

STANDIN = str(Path(__file__).parent / "standin_service.py")


def answer(number: int, sent: float, ended: float, replica: str, **options) -> Outcome:
    return Outcome(number, sent, sent, ended, replica=replica, version="v", **options)


def test_recovery_lasts_until_the_successor_has_answered_a_request_sent_after_the_kill():
    outcomes = [
        answer(0, 9.0, 9.1, "a"),
        answer(1, 9.5, 9.6, "b"),
        answer(2, 9.9, 10.3, "b"),  # sent before b was killed: says nothing of who is alive
        answer(3, 10.5, 10.6, "a"),
        answer(4, 11.0, 11.1, "a"),
        answer(5, 13.0, 13.5, "c"),
        answer(6, 14.0, 14.1, "a"),
    ]
    (outage,) = outages(outcomes, [10.0], replicas=2, end_s=20.0)
    assert (outage.begin_s, outage.end_s, outage.recovery_s) == (10.0, 13.5, 3.5)


def test_a_failed_request_shows_nobody_alive():
    outcomes = [answer(0, 10.5, 10.6, "a"), answer(1, 10.7, 10.8, "c", failed="503 unavailable")]
    (outage,) = outages(outcomes, [10.0], replicas=2, end_s=20.0)
    assert outage.recovery_s is None
    assert outage.end_s == 20.0


def test_a_kill_before_full_strength_prolongs_the_outage():
    outcomes = [
        answer(0, 11.0, 11.1, "a"),
        answer(1, 21.0, 21.1, "a"),
        answer(2, 26.0, 26.5, "d"),
        answer(3, 31.0, 31.1, "a"),
    ]
    first, second, third = outages(outcomes, [10.0, 20.0, 30.0], replicas=2, end_s=40.0)
    assert (first.end_s, first.recovery_s) == (20.0, 16.5)
    assert (second.end_s, second.recovery_s) == (26.5, 6.5)
    assert (third.end_s, third.recovery_s) == (40.0, None)


def test_requests_are_told_by_the_outage_that_they_met():
    outcomes = [
        answer(0, 1.0, 1.1, "a"),
        answer(1, 1.9, 2.5, "b"),  # under way at the kill
        answer(2, 2.2, 2.3, "", failed="503 unavailable"),
        answer(3, 2.5, 2.6, "a"),
        answer(4, 2.8, 3.0, "c"),  # full strength
        answer(5, 3.2, 3.3, "a", wrong="other pixels"),
    ]
    found = outages(outcomes, [2.0], replicas=2, end_s=5.0)
    kills = [{"at_s": 2.0, "pid": 1, "alive": 2}]
    kill, outside = rows_of(kills, found, outcomes)
    assert (kill["requests"], kill["failed"], kill["wrong"], kill["recovery_s"]) == (4, 1, 0, 1.0)
    assert (outside["requests"], outside["failed"], outside["wrong"]) == (2, 0, 1)
    assert kill["max_ms"] == 600.0
    assert outside["max_ms"] == 100.0
    keys = ("requests", "failed", "failures", "wrong", "server_retries", "rps", "goodput")
    figures = dict.fromkeys((*keys, "p50_ms", "p95_ms", "p99_ms", "max_ms"), 0)
    told = headline(figures, kills * 2, [*found, *outages([], [4.0], 2, 5.0)], [kill, outside])
    assert (told["kills"], told["unrecovered"]) == (2, 1)
    assert told["recovery_s_median"] == told["recovery_s_max"] == 1.0


def test_a_swap_is_told_by_who_answered_before_and_after_it():
    outcomes = [
        answer(0, 1.0, 1.1, "a"),
        answer(1, 2.5, 2.6, "a"),
        Outcome(2, 2.7, 2.7, 2.8, version="w", replica="b"),
        answer(3, 2.9, 3.5, "a"),  # sent before the promotion was done
        Outcome(4, 3.2, 3.2, 3.3, version="w", replica="b"),
        answer(5, 3.4, 3.6, "a"),
        answer(6, 3.5, 3.7, "", failed="timeout"),
    ]
    figures = {"requests": 7, "failed": 1, "failures": {"timeout": 1}, "wrong": 0, "p99_ms": 600.0}
    figures["versions"] = {"v": {"answers": 4}, "w": {"answers": 2}}
    told = swap_headline(figures, outcomes, "w", begun_s=2.0, ended_s=3.0)
    assert (told["swap_sent_after"], told["swap_stale"], told["swap_failed"]) == (2, 1, 1)
    assert (told["swap_first_new_s"], told["swap_last_old_s"]) == (0.8, 1.6)
    assert told["swap_versions"] == {"v": 4, "w": 2}
    unseen = swap_headline(figures, outcomes, "x", begun_s=2.0, ended_s=9.0)
    assert (unseen["swap_first_new_s"], unseen["swap_sent_after"]) == (None, 0)


def test_only_replicas_of_the_deployment_are_found():
    both = Replicas()
    other = subprocess.Popen(["bash", "-c", "exec -a ray::ServeReplica:counterpoint:Gateway sleep 60"])
    try:
        until = time.monotonic() + 120
        me = psutil.Process().pid
        while len(found := chaos_serve.replicas(me)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert {process.pid for process in found} == {process.pid for process in both.running}
    finally:
        for process in (*both.running, other):
            process.kill()
            process.wait()


def test_the_promotion_is_sent_to_the_dashboard_that_the_service_named(tmp_path):
    log = tmp_path / "service.log"
    log.write_text("INFO things\ndashboard: http://127.0.0.1:8266\nready: http://127.0.0.1:8000\n")
    command = chaos_serve.promote_command(log, "after")
    assert command[1:5] == ["-m", "jobs.serve", "promote", "after"]
    assert command[5:] == ["model=student", "dashboard=http://127.0.0.1:8266"]


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chaos reign over the stand-in, whose pictures no pipeline makes."""

    def promote(log: Path, checkpoint: str) -> list[str]:
        url = chaos_serve.dashboard_of(log)
        code = f"import urllib.request; print(urllib.request.urlopen('{url}/promote').read().decode())"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(
        chaos_serve, "service_command", lambda service, _: [sys.executable, STANDIN, str(service.port)]
    )
    monkeypatch.setattr(chaos_serve, "promote_command", promote)


def test_chaos_kills_swaps_and_tells(standin, tmp_path):
    config = ServeChaosConfig.model_validate(
        {
            "run": str(tmp_path / "chaos"), "kills": 2, "every_s": 1.2, "settle_s": 2.5, "swap_s": 2.5,
            "probe_s": 0.3, "warmup_s": 0.1, "rate": 60.0, "classes": 4, "image_shape": [1, 8],
            "unet": {"block_out_channels": [16, 16], "norm_num_groups": 8},
        }
    )  # fmt: skip
    told = chaos_serve.main(config)
    assert told["kills"] == 2
    assert told["unrecovered"] == 0
    assert 0.5 <= told["recovery_s_median"] <= told["recovery_s_max"]
    assert told["failed"] == told["wrong"] == told["swap_failed"] == told["swap_wrong"] == 0
    assert told["requests"] > 100
    assert list(told["swap_versions"]) == ["a", "b"]
    assert told["swap_sent_after"] > 0
    assert told["swap_stale"] == 0
    assert told["grey_levels_before"] > 50
    table = (tmp_path / "chaos" / "chaos.txt").read_text()
    assert [line.split("  ")[0].strip() for line in table.splitlines()[1:]] == ["kill 1", "kill 2", "outside"]
    assert not chaos_serve.replicas(psutil.Process().pid)
