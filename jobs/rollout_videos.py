"""Episodes as moving pictures: an animated GIF each, and MP4 where imageio can write it."""

import importlib.util
import io
from typing import Any

import imageio.v3 as iio
import numpy as np
from pydantic import Field

from cluster.storage import RunStore
from counterpoint.environments.episode import Episode
from counterpoint.section import Section
from jobs.rollout_cells import Cell

GREEN, RED = (46, 160, 96), (204, 62, 40)
BORDER = 6
HOLD = 12
"""How often the last frame is shown, so that its border can be seen."""


class VideosConfig(Section):
    """Which episodes are filmed; those of a policy's first training seed, of every rule."""

    successes: int = Field(default=1, ge=0)
    """Successful episodes of each rule that are kept."""
    failures: int = Field(default=1, ge=0)
    """Failed episodes of each rule that are kept."""
    among: int = Field(default=16, ge=0)
    """Episodes, from the first seed, among which they are looked for; filming takes memory and time."""
    scale: int = Field(default=3, ge=1)
    """Enlargement of each pixel."""
    frames_per_second: float = Field(default=12.0, gt=0.0)
    """Speed at which they play."""


def video_name(cell: Cell, episode: Episode) -> str:
    """Return the stem of an episode's video in the store."""
    return f"videos/{cell.path}-{'success' if episode.success else 'failure'}-{episode.seed}"


def wanted(config: VideosConfig, store: RunStore, cell: Cell, episode: Episode) -> bool:
    """Say whether the episode has frames and fewer of its kind are stored than asked for."""
    if episode.frames is None:
        return False
    kind = "success" if episode.success else "failure"
    folder, _, stem = f"videos/{cell.path}-{kind}-".rpartition("/")
    stored = sum(name.startswith(stem) and name.endswith(".gif") for name in store.children(folder))
    return stored < (config.successes if episode.success else config.failures)


def save_video(config: VideosConfig, store: RunStore, cell: Cell, episode: Episode) -> None:
    """Write the episode's frames [T,H,W,3] as GIF, and as MP4 if imageio-ffmpeg is installed."""
    frames = film(episode, config.scale)
    name = video_name(cell, episode)
    store.write_bytes(
        f"{name}.gif", encoded(frames, ".gif", duration=1000.0 / config.frames_per_second, loop=0)
    )
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        store.write_bytes(f"{name}.mp4", encoded(frames, ".mp4", fps=config.frames_per_second))


def film(episode: Episode, scale: int) -> np.ndarray:
    """Return the frames enlarged, uint8 [T+HOLD,H*scale,W*scale,3], the last with a green or red border."""
    if episode.frames is None:
        raise ValueError(f"the episode of seed {episode.seed} was not filmed")
    frames = episode.frames.repeat(scale, axis=1).repeat(scale, axis=2)
    last = frames[-1:].copy()
    inside = last[:, BORDER:-BORDER, BORDER:-BORDER].copy()
    last[:] = GREEN if episode.success else RED
    last[:, BORDER:-BORDER, BORDER:-BORDER] = inside
    return np.concatenate([frames, last.repeat(HOLD, axis=0)])


def encoded(frames: np.ndarray, extension: str, **options: Any) -> bytes:
    """Return `frames` [T,H,W,3] as a file of the kind `extension`."""
    buffer = io.BytesIO()
    iio.imwrite(buffer, frames, extension=extension, **options)
    return buffer.getvalue()
