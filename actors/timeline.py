"""Where the time of a training step goes: spans of every actor that takes part, on one clock.

A trainer records its own spans from outside its algorithm: the loop says when a step begins and ends, a
wrapper around the panel when it is asked and when it has answered. Hosts of critics tell in their answers
when they judged, by their own clock. All clocks are `time.time()`, in seconds. Those of two machines differ;
the messages between them bound the difference (Cristian 1989): a host cannot have begun before it was asked,
nor ended after its answer was there. If no difference at all is within the bounds, none is assumed; otherwise
their middle is taken, which is wrong by half their distance at most.
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from cluster.storage import RunStore

if TYPE_CHECKING:
    # Ray Train's controller imports this module too, and need not load diffusers.
    from counterpoint.critics.messages import Samples
    from counterpoint.critics.panel import Panel, PanelVerdict, Pending

Part = Literal["compute", "wire", "waiting"]
KEPT = 3
"""Newest steps that are kept."""
FILE, FIRST = "timeline.json", "student forward"


@dataclass(frozen=True)
class Span:
    """What one actor did for a while."""

    actor: str
    part: Part
    what: str
    step: int
    begin: float
    """Seconds on the clock of the timeline it is in; see `Timeline`."""
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of a few consecutive steps, in seconds since the first began, by the clock of rank 0."""

    spans: tuple[Span, ...]
    clock_error: Mapping[str, float] = field(default_factory=dict)
    """By how many seconds each actor's clock may be off, infinite for a rank that shares no host with earlier
    ones and is drawn by its own clock; absent where it is the clock of the timeline."""


class Recorder:
    """Takes down the spans of one rank's newest steps; a few dozen readings of the clock per step."""

    def __init__(self, rank: int, kept: int = KEPT) -> None:
        self.actor = trainer_name(rank)
        self.rank = rank
        self._steps: deque[list[Span]] = deque(maxlen=kept)
        self._messages: deque[list[tuple[str, float, float, float, float]]] = deque(maxlen=kept)
        self._step, self._mark = -1, 0.0
        self._next = FIRST

    def begin(self, step: int) -> None:
        """Say that `step` begins."""
        self._steps.append([])
        self._messages.append([])
        self._step, self._mark, self._next = step, time.time(), FIRST

    def end(self) -> None:
        """Say that the step has ended."""
        self._add("compute", self._next, time.time())

    def lap(self, part: Part, what: str, begin: float, after: str) -> None:
        """Take down what ends now and began at `begin`; computing went on until then, and `after` follows."""
        self._add("compute", self._next, begin)
        self._add(part, what, time.time())
        self._next = after

    def split(self, part: Part, what: str, seconds: float) -> None:
        """Say that the last `seconds` of the newest span were something else."""
        spans = self._steps[-1]
        last = spans[-1]
        cut = max(last.begin, last.end - seconds)
        spans[-1] = replace(last, end=cut)
        spans.append(Span(self.actor, part, what, self._step, cut, last.end))

    def judged(self, groups: Mapping[str, tuple[float, float]], asked: float) -> None:
        """Take down when each group judged, by its host's clock; asked at `asked` and answered by now."""
        now = time.time()
        for name, (begin, end) in groups.items():
            self._messages[-1].append((name, asked, now, begin, end))

    @property
    def recording(self) -> bool:
        """Whether a step is under way."""
        return bool(self._steps)

    def record(self) -> dict[str, Any]:
        """Return what was taken down, as JSON knows it."""
        return {
            "rank": self.rank,
            "spans": [asdict(span) for step in self._steps for span in step],
            "messages": [message for step in self._messages for message in step],
        }

    def save(self, store: RunStore) -> None:
        """Write this rank's record into the run's store; nothing where no recorded step asked a panel."""
        if any(span.what != FIRST for step in self._steps for span in step):
            store.write_text(file_name(self.rank), json.dumps(self.record()))

    def _add(self, part: Part, what: str, until: float) -> None:
        if until > self._mark:
            self._steps[-1].append(Span(self.actor, part, what, self._step, self._mark, until))
        self._mark = max(self._mark, until)


class TimedPanel:
    """A `Panel` that tells a recorder when it was asked and when it answered; otherwise the panel itself."""

    def __init__(self, panel: "Panel", recorder: Recorder) -> None:
        self.panel, self.recorder = panel, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.panel, name)

    def ask(self, samples: "Samples", groups: Tensor) -> "Pending":
        """Ask the panel; see `Panel.ask`."""
        begun = time.time()
        pending = self.panel.ask(samples, groups)
        remote = hasattr(self.panel, "stamps")
        if self.recorder.recording:
            after = "between question and answer" if remote else what_follows(samples)
            what: tuple[Part, str] = ("wire", "packing") if remote else ("compute", "critics")
            self.recorder.lap(*what, begun, after)
        return _TimedPending(self, pending, begun, what_follows(samples))


def what_follows(samples: "Samples") -> str:
    """Return what a trainer does once it has the verdict on `samples`."""
    return "backward, averaging, optimizer" if samples.last else "backward, next forward"


@dataclass(frozen=True)
class _TimedPending:
    timed: TimedPanel
    pending: "Pending"
    asked: float
    after: str

    def result(self) -> "PanelVerdict":
        panel, recorder = self.timed.panel, self.timed.recorder
        timings = getattr(panel, "timings", None)
        begun, wire = time.time(), getattr(timings, "wire_s", 0.0)
        verdict = self.pending.result()
        stamps: Mapping[int, tuple[float, float]] | None = getattr(panel, "stamps", None)
        if stamps is not None and recorder.recording:
            recorder.lap("waiting", "waiting for critics", begun, self.after)
            packed = getattr(self.pending, "packing_s", 0.0)
            recorder.split("wire", "unpacking", max(0.0, getattr(timings, "wire_s", 0.0) - wire - packed))
            recorder.judged({lane(panel, group): both for group, both in stamps.items()}, self.asked)
        return verdict


def lane(panel: Any, group: int) -> str:
    """Return the name of the row of a group; of its replicas each has its own."""
    from counterpoint.critics.panel import group_name

    replica = getattr(panel.hosts[group], "replica", 0)
    return group_name(group) + (f" replica {replica}" if replica else "")


def timed(trainer: Any, recorder: Recorder) -> None:
    """Have `recorder` told of what a trainer asks its panel; a trainer without a panel is left alone."""
    if getattr(trainer, "panel", None) is not None:
        trainer.panel = TimedPanel(trainer.panel, recorder)


def read_timeline(store: RunStore) -> Timeline | None:
    """Return the timeline of the steps that every rank of a run recorded; None where there is none."""
    records: list[dict[str, Any]] = []
    while store.exists(name := file_name(len(records))):
        records.append(json.loads(store.read_text(name)))
    return merged(records) if records else None


def merged(records: Sequence[dict[str, Any]]) -> Timeline | None:
    """Return one timeline of the ranks' records, in rank order; None if rank 0 has recorded nothing.

    Hosts are brought to rank 0's clock by the messages between them, and other ranks by the hosts that they
    share with rank 0. A record of other steps, of an earlier life with more ranks, is left out.
    """
    steps = {span["step"] for span in records[0]["spans"]}
    records = [one for one in records if steps & {span["step"] for span in one["spans"]}]
    if not records:
        return None
    known: dict[str, tuple[float, float]] = {}
    errors: dict[str, float] = {}
    spans, judged = [], set()
    for record in records:
        bounds = clock_bounds(record["messages"])
        shared = [_difference(known[name], limits) for name, limits in bounds.items() if name in known]
        limits = intersection(shared)
        shift = middle(*limits)
        if record is not records[0]:
            errors[trainer_name(record["rank"])] = (limits[1] - limits[0]) / 2 if shared else float("inf")
        for name, (low, high) in bounds.items():
            known.setdefault(name, (low + shift, high + shift))
        own = (Span(**span) for span in record["spans"] if span["step"] in steps)
        spans += [replace(s, begin=s.begin - shift, end=s.end - shift) for s in own]
        judged |= {(message[0], message[3], message[4]) for message in record["messages"]}
    errors |= {name: (high - low) / 2 for name, (low, high) in known.items()}
    first, last = min(s.begin for s in spans), max(s.end for s in spans)
    spans += _judgements(judged, known, first, last)
    spans = [replace(s, begin=s.begin - first, end=s.end - first) for s in spans]
    return Timeline(tuple(sorted(spans, key=lambda s: (s.actor, s.begin))), errors)


def _difference(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Return between what the difference of two numbers lies, given what each lies between."""
    return (one[0] - other[1], one[1] - other[0])


def _judgements(
    judged: Iterable[tuple[str, float, float]],
    known: Mapping[str, tuple[float, float]],
    first: float,
    last: float,
) -> list[Span]:
    """Return when each group judged; the ranks that asked together were told the same times."""
    spans = []
    for name, begin, end in judged:
        shift = middle(*known[name])
        if end - shift > first and begin - shift < last:
            at, until = max(first, begin - shift), min(last, end - shift)
            spans.append(Span(name, "compute", "judging", -1, at, until))
    return spans


def clock_bounds(messages: Sequence[Sequence[Any]]) -> dict[str, tuple[float, float]]:
    """Return between what each host's clock minus this one's must lie, in seconds.

    `messages` are (host, asked, answered, begun, ended): the first two times by this clock, the others by the
    host's.
    """
    limits: dict[str, list[tuple[float, float]]] = {}
    for name, asked, answered, begun, ended in messages:
        limits.setdefault(name, []).append((ended - answered, begun - asked))
    return {name: intersection(each) for name, each in limits.items()}


def intersection(limits: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return what all intervals share; clocks that drifted share nothing, and then the narrowest counts."""
    if not limits:
        return (0.0, 0.0)
    low, high = max(low for low, _ in limits), min(high for _, high in limits)
    return (low, high) if low <= high else min(limits, key=lambda one: one[1] - one[0])


def middle(low: float, high: float) -> float:
    """Return the offset to assume between `low` and `high`: none where that is possible."""
    return 0.0 if low <= 0.0 <= high else (low + high) / 2


def trainer_name(rank: int) -> str:
    """Return the name of a rank's lane."""
    return f"trainer-{rank}"


def file_name(rank: int) -> str:
    """Return the name of the file with the record of a rank."""
    return FILE if rank == 0 else f"timeline-{rank}.json"
