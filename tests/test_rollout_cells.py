"""Cells: what is played is kept, whole or in part, and never mixed with what was played otherwise."""

from pathlib import Path

import pytest
from rollout_parts import GREEDY, TEXT, episode

from cluster.storage import RunStore
from jobs.rollout_cells import Cell, CellLog, Session, slug

CELL = Cell("base", 3, "MG-Select text", "/runs/base-3", TEXT)
MADE_WITH = {"seed": 0, "policy": "ab12"}
UNFINISHED = "cells/base-3/mg-select-text.unfinished.jsonl"
FINISHED = "cells/base-3/mg-select-text.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def log(store: RunStore, **changes: object) -> CellLog:
    return CellLog(store, CELL, MADE_WITH | changes)


def test_a_finished_cell_reads_back_what_was_added(store: RunStore) -> None:
    first = log(store)
    first.begin()
    first.add([episode(7, True), episode(5, False)])
    first.add([], {6: "hung at step 12"})
    first.end(Session(2.0, 2, 18, 3, 18, 0.5), finished=True)
    again = log(store).result
    assert again.episodes == {5: episode(5, False), 7: episode(7, True)}
    assert again.set_aside == {6: "hung at step 12"}
    assert again.session == Session(2.0, 2, 18, 3, 18, 0.5)
    assert again.missing(range(5, 10)) == [8, 9]
    assert store.list("cells") == [FINISHED]


def test_what_a_killed_session_left_is_used_but_for_half_a_line(store: RunStore) -> None:
    first = log(store)
    first.begin()
    first.add([episode(5, True)])
    first.add([episode(6, True)])
    store.write_bytes(UNFINISHED, store.read_bytes(UNFINISHED)[:-20])
    second = log(store)
    assert list(second.result.episodes) == [5]
    second.begin()
    second.add([episode(6, False)])
    second.end(Session(1.0, 1), finished=True)
    assert log(store).result.episodes == {5: episode(5, True), 6: episode(6, False)}


def test_sessions_add_up(store: RunStore) -> None:
    for seed in (5, 6):
        session = log(store)
        session.begin()
        session.add([episode(seed, True)])
        session.end(Session(1.5, 1, 6, 2, 6, 0.1), finished=False)
    assert log(store).result.session == Session(3.0, 2, 12, 4, 12, 0.2)


def test_a_finished_cell_can_be_extended(store: RunStore) -> None:
    for seed in (5, 6):
        session = log(store)
        session.begin()
        session.add([episode(seed, True)])
        session.end(Session(), finished=True)
    assert list(log(store).result.episodes) == [5, 6]
    assert list(log(store).result.of(range(6, 9)).episodes) == [6]


def test_another_policy_at_the_same_place_is_refused(store: RunStore) -> None:
    first = log(store)
    first.begin()
    first.end(Session(), finished=True)
    with pytest.raises(ValueError, match=r"policy=ab12 and now it is cd34: choose another run"):
        log(store, policy="cd34")


@pytest.mark.parametrize(
    ("name", "file"), [("MG-Select text", "mg-select-text"), ("random of 4!", "random-of-4"), ("../x", "x")]
)
def test_names_become_files_that_stay_where_they_belong(name: str, file: str) -> None:
    assert slug(name) == file
    assert Cell("base", None, name, "/r", GREEDY).path == f"base/{file}"
