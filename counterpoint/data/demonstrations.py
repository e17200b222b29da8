"""Demonstrations as Parquet shards: what the collector writes and what a policy is trained on.

One row is one moment, before its action. Columns: `episode` int64 (the environment's seed), `step` int32,
`image.<camera>` binary (PNG) for each camera, `state` and `action` list<float32>, `instruction` string,
`keypoints` list<float32> (pixel columns and rows, camera by camera, K pairs each; may be empty), `target`
int32 (index of the keypoint that the instruction names, -1 if unknown), and `kind` string: "demonstration",
or "scene" for single images whose action is of no use.
"""

import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from counterpoint.data.config import DataConfig
from counterpoint.data.decode import decode
from counterpoint.data.location import Location, locate

Kind = Literal["demonstration", "scene"]
IMAGE = "image."
SCHEMA = {
    "episode": pa.int64(),
    "step": pa.int32(),
    "state": pa.list_(pa.float32()),
    "instruction": pa.string(),
    "action": pa.list_(pa.float32()),
    "keypoints": pa.list_(pa.float32()),
    "target": pa.int32(),
    "kind": pa.string(),
}


@dataclass(frozen=True)
class Frame:
    """One moment of an episode."""

    episode: int
    """The environment's seed of the episode."""
    step: int
    """Control steps before this moment."""
    images: Mapping[str, np.ndarray]
    """By camera: uint8 [H,W,3]."""
    state: np.ndarray
    """Proprioceptive state [S]."""
    instruction: str
    action: np.ndarray
    """The expert's action at this moment, in the environment's units [D]."""
    keypoints: np.ndarray
    """Pixel (column, row) of each tracked object, [K,2] or [cameras,K,2]; may be empty."""
    target: int = -1
    """Index of the keypoint that the instruction names; -1 if unknown."""
    kind: Kind = "demonstration"


def to_table(frames: Sequence[Frame]) -> pa.Table:
    """Return `frames` as a table of this module's columns; cameras are those of the first frame."""
    columns = {
        name: pa.array([_plain(getattr(frame, name)) for frame in frames], kind)
        for name, kind in SCHEMA.items()
    }
    for camera in frames[0].images if frames else ():
        columns[IMAGE + camera] = pa.array([_png(frame.images[camera]) for frame in frames], pa.binary())
    return pa.table(columns)


@dataclass(frozen=True)
class Demonstrations:
    """Frames in the order of (kind, episode, step), as arrays with one row per frame."""

    cameras: tuple[str, ...]
    images: np.ndarray
    """uint8 [F,cameras,H,W,3]."""
    states: np.ndarray
    """float32 [F,S]."""
    actions: np.ndarray
    """float32 [F,D], in the environment's units."""
    instructions: np.ndarray
    """str [F]."""
    episodes: np.ndarray
    """int64 [F]."""
    steps: np.ndarray
    """int32 [F]."""
    keypoints: np.ndarray
    """Pixel (column, row), float32 [F,cameras,K,2]; K is 0 where nothing is tracked."""
    targets: np.ndarray
    """int32 [F]."""
    kinds: np.ndarray
    """str [F]."""

    def __len__(self) -> int:
        return len(self.episodes)

    def pick(self, rows: np.ndarray) -> "Demonstrations":
        """Return the frames that `rows` (indices or booleans) names."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cameras"}
        return Demonstrations(self.cameras, **{name: array[rows] for name, array in arrays.items()})

    def of_kind(self, kind: Kind) -> "Demonstrations":
        """Return the frames of one kind."""
        return self.pick(self.kinds == kind)

    def first_episodes(self, count: int) -> "Demonstrations":
        """Return the demonstrations of the `count` lowest episode numbers, without scenes.

        Raises ValueError if there are fewer.
        """
        demonstrations = self.of_kind("demonstration")
        numbers = np.unique(demonstrations.episodes)
        if len(numbers) < count:
            raise ValueError(
                f"demonstrations={count}, but the data have {len(numbers)} episodes: collect more or lower it"
            )
        return demonstrations.pick(np.isin(demonstrations.episodes, numbers[:count]))

    def chunks(self, horizon: int) -> np.ndarray:
        """Return each frame's next `horizon` actions, float32 [F,horizon,D]; an episode's last one repeats.

        Raises ValueError if an episode lacks a step in between.
        """
        parts = np.r_[True, (self.kinds[1:] != self.kinds[:-1]) | (self.episodes[1:] != self.episodes[:-1])]
        gaps = np.flatnonzero(~parts[1:] & (np.diff(self.steps) != 1))
        if len(gaps):
            row = gaps[0]
            raise ValueError(
                f"episode {self.episodes[row]} has no step {self.steps[row] + 1} but later ones: "
                "collect the episode again"
            )
        starts = np.flatnonzero(parts[: len(self)])
        lasts = np.repeat(np.r_[starts[1:], len(self)] - 1, np.diff(np.r_[starts, len(self)]))
        rows = np.minimum(np.arange(len(self))[:, None] + np.arange(horizon), lasts[:, None])
        return np.asarray(self.actions[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of actions and states with their shapes, the data's identity."""
        digest = hashlib.sha256()
        for array in (self.actions, self.states):
            digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def read_demonstrations(uri: str) -> Demonstrations:
    """Read all Parquet shards of a file or folder, any URL that fsspec understands.

    Raises ValueError, in one line, naming the shard (and row) that cannot be read, lacks a column, or holds
    images, states or actions of another size than the first.
    """
    location = locate(DataConfig(source="parquet", uri=uri))
    paths = [path for path in location.files() if path.endswith(".parquet")]
    if not paths:
        raise ValueError(f"{location.url()}: found no .parquet file; collect demonstrations into it")
    cameras: tuple[str, ...] = ()
    frames: list[Frame] = []
    names: list[str] = []
    for path in paths:
        table = _read(location, path)
        found = tuple(name.removeprefix(IMAGE) for name in table.column_names if name.startswith(IMAGE))
        cameras = cameras or found
        _check_columns(table, location.url(path), cameras)
        for row, values in enumerate(table.to_pylist()):
            names.append(f"{location.url(path)} row {row}")
            frames.append(_frame(values, cameras, names[-1]))
    if not frames:
        raise ValueError(f"{location.url()}: its shards hold no row; collect demonstrations into it")
    return _stack(frames, names, cameras)


def _plain(value: object) -> object:
    return np.asarray(value, np.float32).ravel().tolist() if isinstance(value, np.ndarray) else value


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # The fastest compression: shards are read far more often than they are shipped.
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _read(location: Location, path: str) -> pa.Table:
    try:
        with location.fs.open(path, "rb") as file:
            return pq.read_table(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{location.url(path)}: cannot be read as Parquet ({reason}); collect the shard again"
        ) from error


def _check_columns(table: pa.Table, name: str, cameras: tuple[str, ...]) -> None:
    wanted = SCHEMA | dict.fromkeys((IMAGE + camera for camera in cameras or ("<camera>",)), pa.binary())
    for column, kind in wanted.items():
        if column not in table.column_names:
            raise ValueError(
                f"{name}: has no column {column}, only {', '.join(table.column_names)}; "
                "write shards with counterpoint.data.demonstrations"
            )
        if table.schema.field(column).type != kind:
            raise ValueError(f"{name}: column {column} is {table.schema.field(column).type}, not {kind}")
        if table.column(column).null_count:
            raise ValueError(f"{name}: column {column} has empty rows; collect the shard again")


def _frame(values: dict[str, object], cameras: tuple[str, ...], name: str) -> Frame:
    images = {}
    for camera in cameras:
        content = values.pop(IMAGE + camera)
        assert isinstance(content, bytes)
        pixels = decode(f"{name} {camera}", content, None).transpose(1, 2, 0)
        images[camera] = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    arrays = {column: np.array(values[column], np.float32) for column in ("state", "action", "keypoints")}
    return Frame(**{k: v for k, v in values.items() if k in SCHEMA} | arrays, images=images)  # type: ignore[arg-type]


def _stack(frames: list[Frame], names: list[str], cameras: tuple[str, ...]) -> Demonstrations:
    order = sorted(range(len(frames)), key=lambda i: (frames[i].kind, frames[i].episode, frames[i].step))
    for before, after in itertools.pairwise(order):
        a, b = frames[before], frames[after]
        if (a.kind, a.episode, a.step) == (b.kind, b.episode, b.step):
            raise ValueError(
                f"{names[after]}: episode {b.episode} step {b.step} is also at {names[before]}; "
                "remove one of the shards"
            )
    _check_sizes(frames, names, cameras)
    chosen = [frames[i] for i in order]
    return Demonstrations(
        cameras,
        np.stack([np.stack([frame.images[camera] for camera in cameras]) for frame in chosen]),
        np.stack([frame.state for frame in chosen]),
        np.stack([frame.action for frame in chosen]),
        np.array([frame.instruction for frame in chosen]),
        np.array([frame.episode for frame in chosen], np.int64),
        np.array([frame.step for frame in chosen], np.int32),
        np.stack([frame.keypoints for frame in chosen]).reshape(len(chosen), len(cameras), -1, 2),
        np.array([frame.target for frame in chosen], np.int32),
        np.array([frame.kind for frame in chosen]),
    )


def _check_sizes(frames: list[Frame], names: list[str], cameras: tuple[str, ...]) -> None:
    first = frames[0]
    size = next(iter(first.images.values())).shape[:2]
    if first.keypoints.size % (2 * len(cameras)):
        raise ValueError(
            f"{names[0]}: {first.keypoints.size} numbers in keypoints are not pairs for {len(cameras)} "
            "cameras; give (column, row) of every object for each camera"
        )
    for name, frame in zip(names, frames, strict=True):
        for camera, image in frame.images.items():
            if image.shape[:2] != size:
                raise ValueError(
                    f"{name}: image of {camera} is {list(image.shape[:2])}, the first is {list(size)} (HxW); "
                    "collect all with one image size"
                )
        for column in ("state", "action", "keypoints"):
            here, there = getattr(frame, column).shape, getattr(first, column).shape
            if here != there:
                raise ValueError(
                    f"{name}: {column} has {here[0]} numbers, that of {names[0]} has {there[0]}; "
                    "collect all in one environment"
                )
