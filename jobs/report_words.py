"""What a run's numbers say, in words: the summary, and which of the aims of a distillation are met."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.report_record import RunRecord

MANY_STEPS = 25
ONE_STEP_SHARE, MANY_STEP_RATIO = 0.2, 1.25
ACCURACY, RECALL_SHARE = 0.95, 0.8
STAGE_WORDS = {"warmup": "warm-up", "heads": "heads alone", "panel": "panel"}
_WORDS = ("no", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Aim:
    """One thing that a distilled student should reach."""

    what: str
    measured: str
    wanted: str
    met: bool


def aims(record: RunRecord) -> list[Aim]:
    """Return the aims on which the one-step student can be judged with the scores that are there."""
    student = record.scores.get(("student", 1), {})
    once, many = (record.scores.get(("teacher", steps), {}) for steps in (1, MANY_STEPS))
    found = [
        _ratio(
            "Frechet distance, as a share of the teacher's at 1 step",
            "fd",
            student,
            once,
            most=ONE_STEP_SHARE,
        ),
        _ratio(
            f"Frechet distance, over the teacher's at {MANY_STEPS} steps",
            "fd",
            student,
            many,
            most=MANY_STEP_RATIO,
        ),
        _accuracy(student),
        _ratio(
            f"recall, over the teacher's at {MANY_STEPS} steps", "recall", student, many, least=RECALL_SHARE
        ),
    ]
    return [aim for aim in found if aim is not None]


def summary(record: RunRecord) -> str:
    """Return a few sentences on how the run went."""
    parts = [
        _standing(record),
        _distances(record),
        _verdict(aims(record)),
        _panel_effect(record),
        _learning(record),
        _alarms(record),
    ]
    return " ".join(part for part in parts if part) or "The run has logged nothing yet."


def number(value: float | None) -> str:
    """Return a figure with about three significant digits; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    if size >= 10_000 or 0 < size < 0.001:
        return f"{value:.2e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """Return a share with three decimals; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """Return a whole number with its thousands apart; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:,.0f}"


def in_steps(steps: int) -> str:
    """Return "1 step", "2 steps" and so on."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def duration(seconds: float) -> str:
    """Return a length of time as a person says it, such as 1 h 3 min, 2 min 5 s or 4.1 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def pool_words(record: RunRecord) -> str:
    """Return what the pool of heads consists of, in a sentence or two; nothing for a run without one."""
    pool = record.pool
    if not pool.get("heads"):
        return ""
    groups = _counted(len(pool.get("groups") or []), "critic group")
    text = f"{count(pool['heads'])} heads in {groups}, one per noise level"
    slots, spares = pool.get("slots"), pool.get("heads_per_slot")
    if slots and spares:
        text += f": {_counted(slots, 'slot')} with {_counted(spares, 'interchangeable head')} each"
    updates = pool.get("updates_per_life")
    return f"{text}." if updates is None else f"{text}. A head lives for about {number(updates)} updates."


def alarms(record: RunRecord) -> list[tuple[int, str]]:
    """Return (step, text) of every alarm that was raised, in order."""
    rows = [*record.metrics, *record.evaluations]
    return sorted((row["step"], str(text)) for row in rows for text in row.get("alarms") or [])


def _ratio(
    what: str, figure: str, mine: Mapping[str, float], theirs: Mapping[str, float],
    most: float = np.inf, least: float = 0.0,
) -> Aim | None:  # fmt: skip
    above, below = mine.get(figure), theirs.get(figure)
    if above is None or not below:
        return None
    ratio = round(above / below, 9)  # 0.64 over 0.8 is as good as 0.8
    wanted = f"at least {least:g}" if least else f"at most {most:g}"
    return Aim(what, f"{ratio:.3f}", wanted, least <= ratio <= most)


def _accuracy(student: Mapping[str, float]) -> Aim | None:
    value = student.get("accuracy")
    if value is None:
        return None
    return Aim("accuracy of the classes", f"{value:.3f}", f"at least {ACCURACY:g}", value >= ACCURACY)


def _standing(record: RunRecord) -> str:
    if record.results or not record.metrics:
        return ""
    stage = f", in the stage {record.stages[-1].name!r}" if record.stages else ""
    text = f"This run has not finished: its log ends at step {record.metrics[-1]['step']}{stage}."
    for row in reversed(record.evaluations):
        distance = (row.get("steps_1") or {}).get("fd")
        if distance is not None:
            newest = f"Its newest scored snapshot, of step {row['step']}, lies at a Frechet distance of"
            return f"{text} {newest} {number(distance)} in one step."
    return text


def _distances(record: RunRecord) -> str:
    own = "student" if record.is_student else "teacher"
    mine = {
        n: row["fd"]
        for (who, n), row in sorted(record.scores.items())
        if who == own and row.get("fd") is not None
    }
    if not mine:
        return ""
    text = f"The {own}'s images lie at a Frechet distance of {_listed(mine)} from held-out real ones"
    theirs = {
        n: row["fd"]
        for (who, n), row in sorted(record.scores.items())
        if who != own and row.get("fd") is not None
    }
    if theirs:
        text += f", its teacher's at {_listed(theirs)}"
    floor = record.floor.get("fd")
    return text + (f"; real images lie at {number(floor)} from one another." if floor is not None else ".")


def _listed(distances: dict[int, float]) -> str:
    parts = [f"{number(fd)} in {'one step' if n == 1 else f'{n} steps'}" for n, fd in distances.items()]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _verdict(found: list[Aim]) -> str:
    if not found:
        return ""
    missed = [aim for aim in found if not aim.met]
    if not missed:
        return f"In one step it meets all {_counted(len(found), 'aim')} below."
    reasons = "; ".join(f"{aim.what} is {aim.measured}, wanted {aim.wanted}" for aim in missed)
    return f"In one step it misses {_counted(len(missed))} of its {_counted(len(found), 'aim')}: {reasons}."


def _panel_effect(record: RunRecord) -> str:
    """Say whether the stage against the panel lowered the distance that the warm-up had reached."""
    end = record.warmup_end
    scored = [(row["step"], (row.get("steps_1") or {}).get("fd")) for row in record.evaluations]
    before = [fd for step, fd in scored if fd is not None and end is not None and step <= end]
    started = next((stage.first for stage in record.stages if stage.name == "panel"), None)
    after = [fd for step, fd in scored if fd is not None and started is not None and step >= started]
    if not before or not after:
        return ""
    change = f"from {number(before[-1])} after the warm-up to {number(after[-1])}"
    if after[-1] < before[-1]:
        return f"The panel paid: it brought the one-step distance of snapshots {change}."
    gap = _final_gap(record)
    blame = (
        ""
        if gap is None
        else f", while the heads told real from generated by {number(gap)} logits on average"
    )
    return f"The panel did not pay: the one-step distance of snapshots went {change}{blame}."


def _final_gap(record: RunRecord) -> float | None:
    """Return the mean logit gap over the last quarter of the steps that have one."""
    rows = [row["gap"] for row in record.metrics if row.get("gap")]
    gaps = [
        gap
        for row in rows[-max(1, len(rows) // 4) :]
        for kinds in row.values()
        for levels in kinds.values()
        for gap in levels
        if gap is not None
    ]
    return float(np.mean(gaps)) if gaps else None


def _learning(record: RunRecord) -> str:
    losses = [row["loss"] for row in record.metrics if isinstance(row.get("loss"), float)]
    if record.is_student or not losses:
        return ""
    if record.is_policy:
        # Perception's loss, which comes first, measures something else.
        losses = [row["loss"] for row in record.metrics if row.get("stage") == "policy"] or losses
    tenth = max(1, len(losses) // 10)
    first, last = number(float(np.mean(losses[:tenth]))), number(float(np.mean(losses[-tenth:])))
    return f"Its training loss went from {first} to {last} in {len(losses):,} steps."


def _alarms(record: RunRecord) -> str:
    raised = len(alarms(record))
    if raised:
        return f"{_counted(raised, 'alarm').capitalize()} {'was' if raised == 1 else 'were'} raised."
    return "No alarm was raised." if record.is_student and record.metrics else ""


def _counted(things: int, noun: str = "") -> str:
    word = _WORDS[things] if things < len(_WORDS) else count(things)
    return f"{word} {noun}{'' if things == 1 else 's'}" if noun else word
