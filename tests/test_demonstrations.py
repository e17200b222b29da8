"""Demonstrations in Parquet: what is written is read, in order, and damage is named in one line."""

from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterpoint.data.demonstrations import Demonstrations, Frame, read_demonstrations, to_table

LENGTHS = {3: 2, 8: 4}


def frame(episode: int, step: int, kind: str = "demonstration", size: int = 8) -> Frame:
    stream = np.random.default_rng([episode, step])
    return Frame(
        episode,
        step,
        {name: stream.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("front", "wrist")},
        stream.normal(size=5).astype(np.float32),
        f"pick up the {('red', 'blue')[episode % 2]} block",
        stream.normal(size=3).astype(np.float32),
        stream.uniform(0, size, (2, 4, 2)).astype(np.float32),
        episode % 3,
        kind,
    )


FRAMES = [frame(episode, step) for episode, length in LENGTHS.items() for step in range(length)]
SCENES = [frame(1, 0, "scene"), frame(3, 0, "scene")]


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder in fsspec's in-memory file system."""
    url = f"memory://{uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def write(folder: str, name: str, table: pa.Table) -> None:
    with fsspec.open(f"{folder}/{name}.parquet", "wb", auto_mkdir=True) as file:
        pq.write_table(table, file, write_page_checksum=True)


def read(folder: str) -> Demonstrations:
    write(folder, "b", to_table(FRAMES[::-1]))
    write(folder, "a", to_table(SCENES))
    return read_demonstrations(folder)


def test_frames_come_back_exactly_and_in_the_order_of_kind_episode_and_step(folder: str) -> None:
    data = read(folder)
    assert data.cameras == ("front", "wrist")
    for row, wanted in enumerate(FRAMES + SCENES):
        assert (data.episodes[row], data.steps[row], data.kinds[row]) == (
            wanted.episode,
            wanted.step,
            wanted.kind,
        )
        assert (data.instructions[row], data.targets[row]) == (wanted.instruction, wanted.target)
        for camera, image in enumerate(wanted.images.values()):
            np.testing.assert_array_equal(data.images[row, camera], image)
        np.testing.assert_array_equal(data.states[row], wanted.state)
        np.testing.assert_array_equal(data.actions[row], wanted.action)
        np.testing.assert_array_equal(data.keypoints[row], wanted.keypoints)


@pytest.mark.parametrize("horizon", [1, 3, 6])
def test_chunks_stay_in_their_episode_and_repeat_its_last_action(folder: str, horizon: int) -> None:
    data = read(folder).of_kind("demonstration")
    chunks = data.chunks(horizon)
    assert chunks.shape == (6, horizon, 3)
    by_moment = {(f.episode, f.step): f.action for f in FRAMES}
    for row, wanted in enumerate(FRAMES):
        for ahead in range(horizon):
            step = min(wanted.step + ahead, LENGTHS[wanted.episode] - 1)
            np.testing.assert_array_equal(chunks[row, ahead], by_moment[wanted.episode, step])


def test_the_first_episodes_are_demonstrations_only(folder: str) -> None:
    data = read(folder)
    assert data.first_episodes(1).episodes.tolist() == [3, 3]
    assert set(data.first_episodes(2).kinds) == {"demonstration"}
    with pytest.raises(ValueError, match=r"demonstrations=3, but the data have 2 episodes"):
        data.first_episodes(3)


def test_the_fingerprint_is_that_of_actions_and_states_however_they_are_cut_into_shards(folder: str) -> None:
    before = read(folder).fingerprint()
    for index, one in enumerate(FRAMES + SCENES):
        write(f"{folder}/again", str(index), to_table([one]))
    assert read_demonstrations(f"{folder}/again").fingerprint() == before
    data = read_demonstrations(f"{folder}/again")
    assert replace(data, actions=data.actions + 1e-6).fingerprint() != before
    assert replace(data, states=data.states.reshape(2, -1)).fingerprint() != before


def test_an_episode_with_a_missing_step_is_refused(folder: str) -> None:
    write(folder, "a", to_table([FRAMES[2], FRAMES[4]]))
    with pytest.raises(ValueError, match=r"episode 8 has no step 1 but later ones"):
        read_demonstrations(folder).chunks(2)


def test_data_without_keypoints_are_read(folder: str) -> None:
    write(folder, "a", to_table([replace(one, keypoints=np.zeros((0, 2)), target=-1) for one in FRAMES]))
    assert read_demonstrations(folder).keypoints.shape == (6, 2, 0, 2)


def odd(**changes: object) -> pa.Table:
    return to_table([replace(FRAMES[0], episode=99, **changes)])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (to_table(FRAMES).drop_columns(["state"]), r"b\.parquet: has no column state, only episode"),
        (to_table(FRAMES).drop_columns(["image.wrist"]), r"b\.parquet: has no column image\.wrist"),
        (to_table([frame(5, 0, size=6)]), r"b\.parquet row 0: image of front is \[6, 6\], .* \[8, 8\]"),
        (odd(state=np.zeros(2)), r"b\.parquet row 0: state has 2 numbers, .* has 5"),
        (odd(action=np.zeros(2)), r"b\.parquet row 0: action has 2 numbers, .* has 3"),
        (to_table(SCENES), r"b\.parquet row 0: episode 1 step 0 is also at .*a\.parquet row 0"),
        (
            to_table(FRAMES).set_column(0, "episode", pa.array(["x"] * 6)),
            r"b\.parquet: column episode is string, not int64",
        ),
        (
            to_table(FRAMES).set_column(0, "episode", pa.array([None] * 6, pa.int64())),
            r"column episode has empty rows",
        ),
    ],
)
def test_bad_shards_are_named_in_one_line(folder: str, table: pa.Table, message: str) -> None:
    write(folder, "a", to_table(SCENES))
    write(folder, "b", table)
    with pytest.raises(ValueError, match=message) as raised:
        read_demonstrations(folder)
    assert "\n" not in str(raised.value)


def test_an_unreadable_shard_an_unreadable_image_and_an_empty_folder_are_named(folder: str) -> None:
    write(folder, "a", to_table(SCENES))
    with pytest.raises(ValueError, match=r"does not exist"):
        read_demonstrations(f"{folder}/none")
    with fsspec.open(f"{folder}/b.parquet", "wb") as file:
        file.write(b"not parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as Parquet"):
        read_demonstrations(folder)
    table = to_table(FRAMES[:1])
    column = table.column_names.index("image.front")
    write(folder, "b", table.set_column(column, "image.front", pa.array([b"\x89PNG broken"])))
    with pytest.raises(ValueError, match=r"b\.parquet row 0 front: not a readable image"):
        read_demonstrations(folder)
    with fsspec.open(f"{folder}/other/x.txt", "wb", auto_mkdir=True) as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"found no \.parquet file"):
        read_demonstrations(f"{folder}/other")
