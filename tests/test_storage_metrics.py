"""The metrics log: rows survive flushes, kills and resumes, and a half line is never read."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from cluster.storage import RunStore


def test_rows_come_back_in_order_and_a_second_log_continues_the_file(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with MetricsLog(store, tensorboard=False) as log:
        log.log(1, loss=0.25, kind="warm-up")
        log.log(2, loss=torch.tensor(0.5), counts=np.array([1, 2]), ok=True)
    with MetricsLog(store, tensorboard=False) as log:
        log.log(3, loss=1)
    assert read_metrics(store) == [
        {"step": 1, "loss": 0.25, "kind": "warm-up"},
        {"step": 2, "loss": 0.5, "counts": [1, 2], "ok": True},
        {"step": 3, "loss": 1},
    ]
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 3


def test_a_number_that_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    with MetricsLog(RunStore(tmp_path)) as log:
        log.log(1, loss=float("nan"), gap=torch.tensor(float("inf")), parts={"a": [float("-inf"), 1.0]})
    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "gap": None, "parts": {"a": [None, 1.0]}}


def test_rows_are_flushed_by_number_and_by_time(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    by_number = MetricsLog(store, flush_s=3600, flush_rows=3, tensorboard=False)
    for step in range(5):
        by_number.log(step)
    assert [row["step"] for row in read_metrics(store)] == [0, 1, 2]
    by_time = MetricsLog(store, "other.jsonl", flush_s=0, tensorboard=False)
    by_time.log(7)
    assert read_metrics(store, "other.jsonl") == [{"step": 7}]


def test_a_torn_last_line_is_not_read_and_does_not_spoil_the_next_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(store) == [{"step": 1}]
    with caplog.at_level(logging.WARNING), MetricsLog(store, tensorboard=False) as log:
        log.log(2, loss=1)
    assert "half line" in caplog.text
    assert read_metrics(store) == [{"step": 1}, {"step": 2, "loss": 1}]


@pytest.mark.parametrize("cut", range(0, 24, 3))
def test_every_cut_of_the_file_reads_as_whole_rows(tmp_path: Path, cut: int) -> None:
    whole = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / METRICS_FILE).write_bytes(whole[:cut])
    assert read_metrics(RunStore(tmp_path)) == [{"step": 1}, {"step": 2}][: whole[:cut].count(b"\n")]


def test_a_damaged_line_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n\x00\xfe{"step"\n{"step": 3}\n')
    assert read_metrics(RunStore(tmp_path)) == [{"step": 1}, {"step": 3}]
    assert "line 2" in caplog.text


def test_truncate_drops_what_the_resumed_run_logs_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first = MetricsLog(store)
    for step in range(1, 6):
        first.log(step, loss=step)
    first.flush()
    del first  # killed: never closed
    with MetricsLog(store) as log:
        log.truncate(after_step=3)
        assert [row["step"] for row in log.read()] == [1, 2, 3]
        log.log(4, loss=40)
    assert [row["loss"] for row in read_metrics(store)] == [1, 2, 3, 40]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_reading_where_nothing_was_logged_gives_no_rows(tmp_path: Path) -> None:
    assert read_metrics(RunStore(tmp_path / "never")) == []
    MetricsLog(RunStore(tmp_path / "never")).close()
    assert not (tmp_path / "never" / METRICS_FILE).exists()
