"""The episodes of one policy under one rule: a cell of the comparison, and its file in the run's store.

A cell is stored as JSON lines: what it was made with, then an episode (or a seed that was set aside) a line,
then what each session that played it took. While it is played the file grows under another name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.metrics_log import read_metrics
from cluster.storage import RunStore
from counterpoint.environments.episode import Episode
from counterpoint.environments.running import Scripted
from counterpoint.selection.config import SelectionConfig

CELLS = "cells"
KEPT = tuple(f.name for f in fields(Episode) if f.name not in ("trace", "frames"))
"""What of an episode is stored in its cell."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Names one cell."""

    policy: str
    """Name of the policy's arm; "expert" and "random" are the scripted ones."""
    training_seed: int | None
    """The policy's training seed; None where it has none."""
    rule: str
    """Name of the rule; that of the policy for a scripted one."""
    uri: str | None = None
    """The policy's run; None for a scripted one."""
    selection: SelectionConfig | None = None
    """None for a scripted policy."""
    scripted: Scripted | None = None
    """What acts instead of a policy."""

    @property
    def replica(self) -> str:
        """Name of the policy with its training seed."""
        return self.policy if self.training_seed is None else f"{self.policy}-{self.training_seed}"

    @property
    def path(self) -> str:
        """Folder and stem of what is stored of it."""
        return f"{slug(self.replica)}/{slug(self.rule)}"


@dataclass(frozen=True)
class Session:
    """What one session of playing a cell took; sessions add up."""

    seconds: float = 0.0
    """Wall time."""
    episodes: int = 0
    decisions: int = 0
    """By policies; scripted ones make none."""
    batches: int = 0
    """Batches of the samplers."""
    observations: int = 0
    """Observations in them."""
    sampling_seconds: float = 0.0
    """Seconds that samplers spent on batches, over all samplers."""

    def __add__(self, other: "Session") -> "Session":
        names = [f.name for f in fields(self)]
        return Session(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class CellResult:
    """What is known of a cell."""

    cell: Cell
    episodes: Mapping[int, Episode] = field(default_factory=dict)
    """By the environment's seed, without traces and frames."""
    set_aside: Mapping[int, str] = field(default_factory=dict)
    """Seeds that could not be played, with the reason."""
    session: Session = Session()

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """Return those of `seeds` that are neither played nor set aside."""
        return [seed for seed in seeds if seed not in self.episodes and seed not in self.set_aside]

    def of(self, seeds: Iterable[int]) -> "CellResult":
        """Return the part that belongs to `seeds`, in their order."""
        wanted = list(seeds)
        played = {seed: self.episodes[seed] for seed in wanted if seed in self.episodes}
        aside = {seed: self.set_aside[seed] for seed in wanted if seed in self.set_aside}
        return CellResult(self.cell, played, aside, self.session)


class CellLog:
    """Writes a cell as it is played, after whatever earlier sessions have left of it."""

    def __init__(self, store: RunStore, cell: Cell, made_with: Row) -> None:
        """Open the cell; `made_with` says all that its episodes follow from besides their seeds.

        Raises ValueError if the store holds the cell made with something else.
        """
        self.store, self.cell, self.made_with = store, cell, json.loads(json.dumps(made_with))
        self.name, self.growing = f"{CELLS}/{cell.path}.jsonl", f"{CELLS}/{cell.path}.unfinished.jsonl"
        rows = read_metrics(store, self.growing) or read_metrics(store, self.name)
        self.result = CellResult(cell)
        if rows:
            self._check_same(rows[0]["made_with"])
            self.result = _read(cell, rows)

    def begin(self) -> None:
        """Lay out the growing file, whole lines only: a killed session may have left half of one."""
        self.store.write_text(self.growing, self._text())

    def add(self, episodes: Sequence[Episode], set_aside: Mapping[int, str] | None = None) -> None:
        """Append episodes, and seeds that could not be played."""
        rows = [_row(episode) for episode in episodes]
        rows += [{"seed": seed, "set_aside": reason} for seed, reason in (set_aside or {}).items()]
        if rows:
            self.store.append(self.growing, _lines(rows).encode())
            self.result = _read(self.cell, rows, self.result)

    def end(self, session: Session, finished: bool) -> None:
        """Add what the session took, and give the file its name if the cell is finished."""
        self.result = _read(self.cell, [{"session": vars(session)}], self.result)
        self.store.write_text(self.name if finished else self.growing, self._text())
        if finished:
            self.store.delete(self.growing)

    def _text(self) -> str:
        episodes = [_row(episode) for _, episode in sorted(self.result.episodes.items())]
        aside = [{"seed": seed, "set_aside": why} for seed, why in sorted(self.result.set_aside.items())]
        return _lines(
            [{"made_with": self.made_with}, *episodes, *aside, {"session": vars(self.result.session)}]
        )

    def _check_same(self, stored: Row) -> None:
        for key in sorted(stored.keys() | self.made_with.keys()):
            if stored.get(key) != self.made_with.get(key):
                raise ValueError(
                    f"{self.store.location(self.name)} was played with {key}={stored.get(key)} and now it is "
                    f"{self.made_with.get(key)}: choose another run, another name, or delete the file"
                )


def slug(name: str) -> str:
    """Return `name` as a file name and as part of a key: letters, digits, hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _read(cell: Cell, rows: Iterable[Row], so_far: CellResult | None = None) -> CellResult:
    before = so_far or CellResult(cell)
    episodes, aside, session = dict(before.episodes), dict(before.set_aside), before.session
    for row in rows:
        if "session" in row:
            session = session + Session(**row["session"])
        elif "set_aside" in row:
            aside[row["seed"]] = row["set_aside"]
        elif "seed" in row:
            episodes[row["seed"]] = Episode(**{name: row[name] for name in KEPT})
    return CellResult(cell, episodes, aside, session)


def _row(episode: Episode) -> Row:
    return {name: getattr(episode, name) for name in KEPT}


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
