"""The timeline of a step: what adds up, clocks that differ by a known amount, and its picture."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from tiny_jobs import distiller, local_panel, panel_recipe, remote_panel, start_hosts

from actors.timeline import (
    Recorder,
    TimedPanel,
    Timeline,
    clock_bounds,
    intersection,
    merged,
    middle,
    read_timeline,
    timed,
)
from cluster.storage import RunStore
from jobs.report import write_report
from jobs.report_timeline import seconds_by_part, timeline_charts


def record(rank, spans, messages):
    keys = ("actor", "part", "what", "step", "begin", "end")
    return {
        "rank": rank,
        "spans": [dict(zip(keys, span, strict=True)) for span in spans],
        "messages": messages,
    }


def two_ranks(skew_host=0.0, skew_rank=0.0):
    """Both ranks wait from 1 to 3 for a group that judges from 1.5 to 2.5, each by their own clocks."""
    ranks = []
    for rank, skew in enumerate((0.0, skew_rank)):
        spans = [
            (f"trainer-{rank}", part, what, 7, 100 + begin + skew, 100 + end + skew)
            for part, what, begin, end in (
                ("compute", "student forward", 0, 1), ("waiting", "waiting for critics", 1, 3),
                ("compute", "backward, averaging, optimizer", 3, 4),
            )
        ]  # fmt: skip
        message = ("critics-0", 101 + skew, 103 + skew, 101.5 + skew_host, 102.5 + skew_host)
        ranks.append(record(rank, spans, [message]))
    return ranks


@pytest.mark.parametrize(("host", "rank"), [(0.0, 0.0), (40.0, 0.0), (-3.0, 90.0), (0.3, -0.2)])
def test_clocks_are_reconciled_within_the_stated_error(host, rank):
    timeline = merged(two_ranks(host, rank))
    assert {span.actor for span in timeline.spans} == {"critics-0", "trainer-0", "trainer-1"}
    truth = {"critics-0": [(1.5, 2.5)], "trainer-0": [(0, 1), (1, 3), (3, 4)]}
    truth["trainer-1"] = truth["trainer-0"]
    shift = min(0.0, min(s.begin for s in timeline.spans if s.actor == "trainer-1"))
    for name, spans in truth.items():
        found = [s for s in timeline.spans if s.actor == name]
        assert len(found) == len(spans)
        for span, (begin, end) in zip(found, spans, strict=True):
            assert span.end - span.begin == pytest.approx(end - begin, abs=1e-6)
            assert abs(span.begin - shift - begin) <= timeline.clock_error.get(name, 0.0) + 0.5 + 1e-6


def test_bounds_hold_the_true_difference_and_none_is_preferred():
    message = ("g", 10.0, 12.0, 30.5, 31.5)
    low, high = clock_bounds([message])["g"]
    assert (low, high) == (19.5, 20.5)
    assert middle(low, high) == 20.0
    assert middle(-0.1, 3.0) == 0.0
    assert intersection([(0.0, 2.0), (1.0, 3.0)]) == (1.0, 2.0)
    assert intersection([(0.0, 1.0), (2.0, 2.5)]) == (2.0, 2.5)
    assert clock_bounds([message, ("g", 20.0, 20.8, 40.2, 40.6)])["g"] == pytest.approx((19.8, 20.2))


def test_a_record_of_an_earlier_life_with_more_ranks_is_left_out():
    ranks = two_ranks()
    for span in ranks[1]["spans"]:
        span["step"] = 2
    assert {span.actor for span in merged(ranks).spans} == {"trainer-0", "critics-0"}


def test_spans_of_a_real_step_with_hosts_fill_it_without_gaps(ray_cluster, tiny_teacher, tmp_path):
    recipe = panel_recipe(tiny_teacher)
    hosts = start_hosts(recipe, [(0, 1), (2, 3)], tmp_path / "hosts")
    trainer = distiller(recipe, remote_panel(recipe, hosts), steps=4)
    recorder, store = Recorder(0, kept=2), RunStore(tmp_path / "run")
    timed(trainer, recorder)
    assert isinstance(trainer.panel, TimedPanel)
    walls = []
    for step in range(3):
        begun = time.time()
        recorder.begin(step)
        trainer.step(step)
        recorder.end()
        walls.append(time.time() - begun)
    recorder.save(store)
    timeline = read_timeline(store)
    own = [s for s in timeline.spans if s.actor == "trainer-0"]
    assert {s.step for s in own} == {1, 2}
    assert {s.what for s in own} == {
        "student forward", "packing", "waiting for critics", "unpacking", "backward, averaging, optimizer",
        "between question and answer",
    }  # fmt: skip
    for step in (1, 2):
        spans = [s for s in own if s.step == step]
        assert sum(s.end - s.begin for s in spans) == pytest.approx(walls[step], rel=0.05, abs=2e-3)
        for one, next_ in itertools.pairwise(spans):
            assert next_.begin == pytest.approx(one.end)
        waiting = next(s for s in spans if s.part == "waiting")
        begin = min(s.begin for s in spans)
        judged = [
            s for s in timeline.spans if s.actor.startswith("critics") and begin < s.begin < waiting.end
        ]
        assert len(judged) == 4
        assert all(s.end <= waiting.end + 1e-3 for s in judged)


def test_a_panel_in_this_process_is_computing_and_the_step_stays_the_same(tiny_teacher):
    recipe = panel_recipe(tiny_teacher)
    plain = distiller(recipe, local_panel(recipe), steps=3)
    watched = distiller(recipe, local_panel(recipe), steps=3)
    recorder = Recorder(0)
    timed(watched, recorder)
    for step in range(2):
        plain.step(step)
        recorder.begin(step)
        watched.step(step)
        recorder.end()
    for one, other in zip(plain.unet.parameters(), watched.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    spans = merged([recorder.record()]).spans
    assert {s.what for s in spans} == {"student forward", "critics", "backward, averaging, optimizer"}
    assert {s.part for s in spans} == {"compute"}


def test_nothing_is_written_where_no_panel_was_asked(tmp_path):
    store, recorder = RunStore(tmp_path), Recorder(0)
    timed(object(), recorder)
    recorder.begin(0)
    recorder.end()
    recorder.save(store)
    assert store.list() == []
    assert read_timeline(store) is None
    assert timeline_charts(None) == []


def test_the_report_shows_the_step_and_tells_it_in_words(tmp_path):
    store = RunStore(tmp_path)
    store.write_text("results.json", json.dumps({"rows": []}))
    plain = write_report(store)
    assert "Timeline of a training step" not in Path(plain).read_text()
    for rank, one in enumerate(two_ranks()):
        store.write_text("timeline.json" if rank == 0 else f"timeline-{rank}.json", json.dumps(one))
    page = Path(write_report(store)).read_text()
    assert "Timeline of a training step" in page
    for lane in ("trainer-0", "trainer-1", "critics-0", "compute", "wire", "waiting"):
        assert lane in page
    assert "trainer-0 computes for 2000 ms" in page
    assert "waits for 2000 ms" in page


def test_seconds_by_part_add_up_to_the_whole():
    timeline = merged(two_ranks())
    for parts in seconds_by_part(timeline.spans).values():
        assert sum(parts.values()) == pytest.approx(4.0)
    assert isinstance(timeline, Timeline)
