"""Videos and traces, read back from the store."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollout_parts import GREEDY, SPACE, TEXT, decision, episode, frames

from cluster.storage import RunStore
from jobs.rollout_cells import Cell
from jobs.rollout_trace import confidence_bars, draw_candidates, read_traces, save_trace
from jobs.rollout_videos import BORDER, GREEN, HOLD, RED, VideosConfig, film, save_video, wanted

CELL = Cell("base", 0, "greedy", "/r", GREEDY)


@pytest.mark.parametrize(("success", "colour"), [(True, GREEN), (False, RED)])
def test_a_video_shows_every_frame_and_ends_in_its_outcomes_colour(
    tmp_path: Path, success: bool, colour: tuple[int, int, int]
) -> None:
    store = RunStore(tmp_path)
    shots = frames(9)
    save_video(VideosConfig(scale=4), store, CELL, episode(3, success, frames=shots))
    name = f"videos/base-0/greedy-{'success' if success else 'failure'}-3.gif"
    gif = Image.open(io.BytesIO(store.read_bytes(name)))
    assert gif.size == (64, 64)
    assert gif.n_frames == len(shots) + 1  # the encoder joins equal frames, and the last is shown longer
    for t, shot in enumerate(shots):
        gif.seek(t)
        shown = np.asarray(gif.convert("RGB"))
        assert np.abs(shown.astype(int) - shot.repeat(4, 0).repeat(4, 1)).max() <= 8
    gif.seek(len(shots))
    last = np.asarray(gif.convert("RGB"))
    assert tuple(last[0, 0]) == tuple(last[-1, BORDER - 1]) == colour
    assert gif.info["duration"] > 2 * 1000 / 12


def test_the_border_leaves_the_episodes_frames_alone() -> None:
    made = film(episode(3, True, frames=frames(5)), scale=1)
    assert len(made) == 5 + HOLD
    np.testing.assert_array_equal(made[:5], frames(5))
    np.testing.assert_array_equal(
        made[-1, BORDER:-BORDER, BORDER:-BORDER], frames(5)[-1, BORDER:-BORDER, BORDER:-BORDER]
    )


def test_as_many_videos_are_kept_as_asked_for(tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), VideosConfig(successes=2, failures=0, scale=1)
    kept = []
    for seed in range(4):
        shot = episode(seed, True, frames=frames(2))
        if wanted(config, store, CELL, shot):
            save_video(config, store, CELL, shot)
            kept.append(seed)
    assert kept == [0, 1]
    assert not wanted(config, store, CELL, episode(9, False, frames=frames(2)))
    assert not wanted(config, store, replace(CELL, rule="text"), episode(9, True))
    assert wanted(config, store, replace(CELL, rule="greedy-2"), episode(9, True, frames=frames(2)))


def test_a_trace_reads_back_with_the_image_of_each_decision(tmp_path: Path) -> None:
    store, shots = RunStore(tmp_path), frames(9)
    trace = (decision(0), decision(1, lost=(2,)), decision(2, lost=(0, 1, 2, 3), chosen=-1))
    save_trace(
        store, replace(CELL, rule="text", selection=TEXT), episode(3, True, trace=trace, frames=shots), SPACE
    )
    (found,) = read_traces(store)
    assert (found["policy"], found["training_seed"], found["rule"], found["seed"]) == ("base", 0, "text", 3)
    for made, read in zip(trace, found["decisions"], strict=True):
        assert read["chosen"] == made.chosen
        np.testing.assert_allclose(np.array(read["candidates"], float), made.candidates, atol=1e-6)
        confidences = [-np.inf if value is None else value for value in read["confidences"]]
        np.testing.assert_allclose(confidences, made.confidences, atol=1e-6)
    strip = np.asarray(Image.open(io.BytesIO(store.read_bytes("traces/base-0/text-3.png"))))
    np.testing.assert_array_equal(strip, np.concatenate([shots[0], shots[4], shots[8]], axis=1))
    assert len(set(found["images"])) == 3


def test_bars_and_lines_tell_which_candidate_was_kept(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    save_trace(store, CELL, episode(3, True, trace=(decision(1, lost=(2,)),)), SPACE)
    (told,) = read_traces(store)[0]["decisions"]
    bars = confidence_bars(told)
    best = int(np.argmax(decision(1, lost=(2,)).confidences))
    assert [bar["chosen"] for bar in bars] == [i == best for i in range(4)]
    assert [bar["decoded"] for bar in bars] == [True, True, False, True]
    assert (max(bar["width"] for bar in bars), bars[2]["width"]) == (100, 0)
    drawn = draw_candidates(told, SPACE)
    assert drawn.count("<polyline") == 3 * SPACE.dimensions
    assert drawn.count('class="kept"') == SPACE.dimensions
    fallback = draw_candidates(told | {"chosen": -1}, SPACE)
    assert fallback.count('class="kept" style="stroke: var(--ink)"') == SPACE.dimensions
