"""Every run has an id that everything of it carries, and whoever wrote it down can be told to be alive."""

import json
import os
import re
from pathlib import Path

import pytest
import ray
from tiny_jobs import train_config

from actors.conductor import start_conductor
from cluster import identity
from cluster.leftovers import held_groups
from cluster.observe import Unreachable, actor_table, node_names, observing
from cluster.placement import Pool, plan
from cluster.reserve import reserve
from cluster.roster import actor_rows
from cluster.storage import RunStore
from cluster.waiting import get, ready
from jobs.runs import open_run, write_results

ROOT = Path(identity.__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_run(monkeypatch):
    """Runs of other tests, begun in this process, are none of these."""
    monkeypatch.setattr(identity, "_process", identity._Process())


@ray.remote
class Seat:
    def pid(self):
        return os.getpid()


def test_ids_are_short_readable_and_different():
    ids = {identity.run_id("vla/Policy v2 (the last)") for _ in range(50)}
    assert len(ids) > 45
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{,23}-\d{4}-\d{4}-[0-9a-f]{4}", one) for one in ids)
    assert identity.run_id("///").startswith("run-")


def test_a_run_writes_down_who_works_on_it_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    uri = str(tmp_path / "run")
    store = open_run(uri, train_config(tmp_path / "run"), resume=False, in_process=True)
    first = identity.known_facts(store)
    assert (first["pid"], first["before"]) == (os.getpid(), [])
    assert identity.driver_alive(first) is True
    write_results(store, {})
    assert identity.known_facts(store)["outcome"] == "done"
    open_run(uri, train_config(tmp_path / "run"), resume=True, in_process=True)
    again = identity.known_facts(store)
    assert again["before"] == [first["id"]]
    assert again["id"] != first["id"]
    assert "outcome" not in again
    assert "a-secret" not in store.read_text("run.json")


def test_another_process_of_the_same_number_is_not_the_driver(tmp_path):
    facts = identity.begin(RunStore(str(tmp_path))).facts
    assert identity.driver_alive(facts) is True
    assert identity.driver_alive(facts | {"process_started": facts["process_started"] - 60}) is False
    assert identity.driver_alive(facts | {"pid": 2**22 + 1}) is False
    assert identity.driver_alive(facts | {"host": "elsewhere"}) is None


def test_a_store_that_refuses_does_not_end_a_run(tmp_path, monkeypatch):
    run = identity.begin(RunStore(str(tmp_path)))
    monkeypatch.setattr(run.store, "write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
    identity.ended("done")
    identity.attached()


def test_what_a_run_starts_carries_its_id(ray_cluster, tmp_path):
    run = identity.begin(RunStore(str(tmp_path)))
    assert run.facts["address"] == ray_cluster.address
    with observing(run.facts):
        pass
    # Another cluster, at the same address, has other jobs of the same numbers.
    with pytest.raises(Unreachable, match="another cluster"), observing(run.facts | {"session": "/tmp/x"}):
        pass
    conductor = start_conductor()
    with reserve(plan([Pool("critics", 1, 0.1)])) as places:
        seat = Seat.options(max_restarts=-1, **places.options("critics", 0)).remote()
        ready({"seat": seat, "conductor": conductor}, timeout=240.0, what="seats")
        rows = actor_rows(actor_table(), run.id, node_names(), {"critics-0": "gpu 1"})
        assert [(row.label, row.state, row.device) for row in rows] == [
            ("conductor-0", "running", "cpu"), ("critics-0", "running", "gpu 1"),
        ]  # fmt: skip
        assert rows[1].pid == get(seat.pid.remote(), timeout=240.0, what="pid")
        assert all(name.startswith(f"{run.id}/") for name in (group["name"] for group in held_groups(run.id)))
        assert len(held_groups(run.id)) == 1
        # While one is there, another of the same place must not fail for its name.
        assert places.options("critics", 0)["name"] == f"{run.id}/critics-0~2"
    assert held_groups(run.id) == []
    ray.kill(conductor)


def test_nothing_is_detached():
    found = [
        path for package in ("actors", "cluster", "jobs") for path in (ROOT / package).rglob("*.py")
        if re.search(r"""lifetime["']?\s*[=:]\s*["']detached""", path.read_text(encoding="utf-8"))
    ]  # fmt: skip
    assert found == []


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"has no run\.json"):
        identity.known_facts(RunStore(str(tmp_path)))
    (tmp_path / "run.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"has no run\.json"):
        identity.known_facts(RunStore(str(tmp_path)))
