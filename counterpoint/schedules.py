"""A number that changes over training, as a value: a pure function of progress.

Progress runs from 0 at the first step of whatever the number belongs to towards 1 after its last. Because a
schedule knows nothing but progress, any process works out the number of any step, and a run that resumes, or
replays another's configuration, has the same numbers in the same steps.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, FiniteFloat, Tag, TypeAdapter, model_validator
from pydantic_core import PydanticKnownError

from counterpoint.section import Section

MOMENTS = 1000
"""Moments over which the mean of a schedule is taken."""


class ConstantSchedule(Section):
    """One number throughout, as if it stood there by itself."""

    kind: Literal["constant"]
    """The form of the schedule: constant, linear, cosine, exponential or piecewise."""
    value: FiniteFloat
    """The number."""


class Span(Section):
    """Between which two moments a schedule goes from one number to another."""

    kind: Literal["linear", "cosine", "exponential"]
    """The form of the schedule."""
    start: FiniteFloat
    """The number up to `begin`."""
    end: FiniteFloat
    """The number from `until` on."""
    begin: float = Field(default=0.0, ge=0.0, le=1.0)
    """Progress at which the change begins."""
    until: float = Field(default=1.0, ge=0.0, le=1.0)
    """Progress at which it is complete."""

    @model_validator(mode="after")
    def _check_span(self) -> "Span":
        if not self.begin < self.until:
            raise ValueError(
                f"begin={self.begin} is not below until={self.until}: lower begin or raise until"
            )
        return self

    def share(self, progress: float) -> float:
        """Return which share of the way from `begin` to `until` lies behind `progress`, in [0,1]."""
        return min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))


class LinearSchedule(Span):
    """In equal steps from `start` to `end`."""

    kind: Literal["linear"]
    """A straight line."""


class CosineSchedule(Span):
    """Along half a cosine from `start` to `end`: slowly, fast, slowly (Loshchilov & Hutter 2017, eq. 5)."""

    kind: Literal["cosine"]
    """Half a cosine."""


class ExponentialSchedule(Span):
    """In equal ratios from `start` to `end`."""

    kind: Literal["exponential"]
    """A geometric sequence."""

    @model_validator(mode="after")
    def _check_ends(self) -> "ExponentialSchedule":
        if min(self.start, self.end) <= 0.0:
            raise ValueError(
                f"start={self.start} and end={self.end} of an exponential schedule must both be above 0: "
                "raise them, or take kind: linear"
            )
        return self


class Piece(Section):
    """From when on which number, or which schedule, holds."""

    at: float = Field(ge=0.0, le=1.0)
    """Progress from which on it holds."""
    value: "Scheduled"
    """A number, or a schedule, which is read at the progress of the whole: it does not begin anew here."""


class PiecewiseSchedule(Section):
    """One number or schedule after another."""

    kind: Literal["piecewise"]
    """Pieces."""
    pieces: tuple[Piece, ...] = Field(min_length=1)
    """The pieces, the first at 0.0 and each later than the one before."""

    @model_validator(mode="after")
    def _check_pieces(self) -> "PiecewiseSchedule":
        moments = [piece.at for piece in self.pieces]
        if moments[0] != 0.0 or any(later <= sooner for sooner, later in pairwise(moments)):
            raise ValueError(
                f"at={moments} of pieces must begin with 0.0 and rise: put the pieces in order, the first "
                "at 0.0"
            )
        return self

    def windows(self) -> Iterator[tuple[float, float, "Scheduled"]]:
        """Yield from when until when which value holds."""
        ends = [*(piece.at for piece in self.pieces[1:]), 1.0]
        for piece, end in zip(self.pieces, ends, strict=True):
            yield piece.at, end, piece.value


SCHEDULES = (ConstantSchedule, LinearSchedule, CosineSchedule, ExponentialSchedule, PiecewiseSchedule)
"""The forms that a schedule may have."""


NUMBER = "a plain number"
FORMS = ("constant", "linear", "cosine", "exponential", "piecewise")
"""Their names."""


def kind(value: Any) -> Any:
    """Return the form of a schedule, given or parsed; None where a mapping does not say, else `NUMBER`."""
    if isinstance(value, dict):
        return value.get("kind")
    return getattr(value, "kind", NUMBER)


Schedule = ConstantSchedule | LinearSchedule | CosineSchedule | ExponentialSchedule | PiecewiseSchedule
Scheduled = Annotated[
    Annotated[float, Tag(NUMBER)]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[ExponentialSchedule, Tag("exponential")]
    | Annotated[PiecewiseSchedule, Tag("piecewise")],
    Discriminator(kind),
]
"""A number, or a schedule of it. A plain number stays one, also when it is written down again."""

Piece.model_rebuild()
PiecewiseSchedule.model_rebuild()
_READER: TypeAdapter[Any] = TypeAdapter(Scheduled)


def read_scheduled(value: object) -> Scheduled:
    """Return the number or schedule that plain `value` describes; pydantic's ValidationError if none."""
    found: Scheduled = _READER.validate_python(value)
    return found


def progress_at(step: int, total: int) -> float:
    """Return the progress of step `step` (from 0) of `total`, in [0,1], rounded correctly.

    Whoever asks for a moment of a schedule must have it from here: equal fractions are then equal numbers,
    so that a piece begins at exactly the step whose progress it names.
    """
    return min(max(0, step), max(1, total)) / max(1, total)


def value_at(scheduled: Scheduled, progress: float) -> float:
    """Return the number that holds at `progress` in [0,1]."""
    if isinstance(scheduled, ConstantSchedule):
        return scheduled.value
    if isinstance(scheduled, PiecewiseSchedule):
        held = [piece.value for piece in scheduled.pieces if piece.at <= progress]
        return value_at(held[-1] if held else scheduled.pieces[0].value, progress)
    if not isinstance(scheduled, Span):
        return scheduled
    share = scheduled.share(progress)
    if share in (0.0, 1.0):
        return scheduled.end if share else scheduled.start
    if isinstance(scheduled, LinearSchedule):
        return scheduled.start + (scheduled.end - scheduled.start) * share
    if isinstance(scheduled, CosineSchedule):
        return scheduled.end + (scheduled.start - scheduled.end) * 0.5 * (1.0 + math.cos(math.pi * share))
    return float(scheduled.start * (scheduled.end / scheduled.start) ** share)


def extremes(scheduled: Scheduled, first: float = 0.0, last: float = 1.0) -> tuple[float, float]:
    """Return the lowest and the highest number between progress `first` and `last`, both included."""
    if not isinstance(scheduled, PiecewiseSchedule):  # every other form is monotone
        ends = value_at(scheduled, first), value_at(scheduled, last)
        return min(ends), max(ends)
    found = [
        extremes(value, max(first, begin), min(last, end))
        for begin, end, value in scheduled.windows()
        if max(first, begin) <= min(last, end)
    ]
    return min(low for low, _ in found), max(high for _, high in found)


def is_constant(scheduled: Scheduled) -> bool:
    """Whether the number never changes."""
    low, high = extremes(scheduled)
    return low == high


def mean_of(scheduled: Scheduled) -> float:
    """Return the mean over training: exact for a constant, else over the middles of 1000 equal parts."""
    if is_constant(scheduled):
        return value_at(scheduled, 0.0)
    return math.fsum(value_at(scheduled, (i + 0.5) / MOMENTS) for i in range(MOMENTS)) / MOMENTS


def turns(scheduled: Scheduled) -> set[float]:
    """Return 0, 1 and every progress between at which the course of a schedule may break."""
    found = {0.0, 1.0}
    if isinstance(scheduled, Span):
        found |= {scheduled.begin, scheduled.until}
    if isinstance(scheduled, PiecewiseSchedule):
        found |= {piece.at for piece in scheduled.pieces}
        for piece in scheduled.pieces:
            found |= turns(piece.value)
    return found


def bounds(*, ge: float | None = None, gt: float | None = None, le: float | None = None,
           lt: float | None = None) -> AfterValidator:  # fmt: skip
    """Return what keeps a field of type `Scheduled` in its range: `Annotated[Scheduled, bounds(ge=0.0)]`.

    A plain number out of range is refused in the words in which pydantic refuses any number, a schedule that
    leaves it at any progress with the number that does.
    """

    def check(scheduled: Scheduled) -> Scheduled:
        low, high = extremes(scheduled)
        rules = (
            ("greater_than_equal", "ge", ge, low, "at least", ge is None or low >= ge),
            ("greater_than", "gt", gt, low, "above", gt is None or low > gt),
            ("less_than_equal", "le", le, high, "at most", le is None or high <= le),
            ("less_than", "lt", lt, high, "below", lt is None or high < lt),
        )
        for error, name, limit, reached, words, kept in rules:
            if not kept:
                if isinstance(scheduled, float):
                    raise PydanticKnownError(error, {name: limit})  # type: ignore[arg-type]
                raise ValueError(
                    f"the {scheduled.kind} schedule reaches {reached:g}, but the number must be {words} "
                    f"{limit:g}: keep all of its values {words} {limit:g}"
                )
        return scheduled

    return AfterValidator(check)
