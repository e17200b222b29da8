"""The placement table, from what ranks report and what Ray's actor table says."""

import time

from actors.conductor import Conductor
from cluster.roster import Row, actor_rows, row_of, split_label, table, with_deaths


def record(name, state="ALIVE", pid=7, start=1000, restarts=0, cause="", end=0):
    return {
        "Name": name, "State": state, "Pid": pid, "StartTime": start, "EndTime": end, "Timestamp": start,
        "NumRestarts": restarts, "DeathCause": cause, "Address": {"NodeID": "n1"},
    }  # fmt: skip


def test_rows_of_a_run_are_its_named_actors_with_the_last_of_each_place():
    records = [
        record("run-1/critics-0", "DEAD", 5, 1000, cause="RAY_KILL", end=2000),
        record("run-1/critics-0~2", "ALIVE", 9, 3000, restarts=2),
        record("run-1/critics-1", "RESTARTING", 11),
        record("run-1/evaluators-0", "DEAD", 12, cause="reason: WORKER_DIED", end=4000),
        record("run-1/samplers-0", "DEAD", 13, cause="reason: RAY_KILL", end=4000),
        record("run-1/samplers-1", "PENDING_CREATION", 0, 0),
        record("run-10/critics-0"), record(""),
    ]  # fmt: skip
    rows = actor_rows(records, "run-1", {"n1": "host/n1"}, {"critics-0": "gpu 0"})
    assert [(row.label, row.pid, row.state, row.restarts, row.device) for row in rows] == [
        ("critics-0", 9, "running", 2, "gpu 0"),
        ("critics-1", 11, "restarting", 0, "cpu"),
        ("evaluators-0", 12, "failed", 0, "cpu"),
        ("samplers-0", 13, "done", 0, "cpu"),
        ("samplers-1", 0, "starting", 0, "cpu"),
    ]
    assert rows[2].since == 4.0


def test_a_rank_that_was_killed_could_not_say_so():
    rows = [Row("trainer", 0, pid=5, state="running"), Row("trainer", 1, pid=6, state="done")]
    told = with_deaths(rows, [record("", "DEAD", 5, end=9000), record("", "DEAD", 6, end=9000)])
    assert [(row.state, row.since) for row in told] == [("failed", 9.0), ("done", 0.0)]


def test_a_row_survives_json_and_versions():
    row = Row("trainer", 3, "host/ab", "cuda:1", 42, 120, "running", 5.0, 1)
    assert row_of(row.plain() | {"of a later version": 1}) == row


def test_labels_are_split():
    assert [split_label(one) for one in ("critics-0", "critics-12~3", "driver", "a-b")] == [
        ("critics", 0), ("critics", 12), ("driver", 0), ("a-b", 0),
    ]  # fmt: skip


def test_the_table_is_aligned():
    rows = [Row("trainer", 0, "host/abcdef", "cuda:0", 42, 120, "running", 100.0), Row("critics", 10)]
    lines = table(rows, now=400.0).splitlines()
    assert lines[0].split() == [
        "role",
        "rank",
        "node",
        "device",
        "pid",
        "version",
        "state",
        "for",
        "restarts",
    ]
    assert lines[1].split() == [
        "trainer",
        "0",
        "host/abcdef",
        "cuda:0",
        "42",
        "120",
        "running",
        "5",
        "m",
        "0",
    ]
    assert lines[0].index("state") == lines[1].index("running") == lines[2].index("starting")


def test_the_conductor_keeps_rows_and_tells_the_time_left():
    conductor = Conductor()
    assert conductor.table() == {"rows": [], "figures": {}, "seconds_left": None}
    conductor.enrol([Row("trainer", 0).plain(), Row("trainer", 1).plain()])
    conductor.enrol([Row("trainer", 1, state="done").plain()])
    conductor.report({"step": 4, "total": 10})
    assert conductor.table()["seconds_left"] is None
    time.sleep(0.01)
    conductor.report({"step": 6, "total": 10})
    told = conductor.table()
    assert [row["state"] for row in told["rows"]] == ["starting", "done"]
    assert told["seconds_left"] > 0
    conductor.report({"step": 1, "total": 10})
    assert conductor.table()["seconds_left"] is None
