"""What a trial tries: values drawn by Optuna's samplers, or bred from a population's best.

Nothing is remembered between calls: a proposal is a function of its arguments, so that a resumed sweep
tries what the undisturbed one would have tried. Spaces are `tune_space.settled`: their conditions name keys
of the space only.
"""

import copy
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

from counterpoint.seeds import seed_of
from jobs.tune_ledger import TrialRecord
from jobs.tune_parameter import (
    Parameter,
    Space,
    cells,
    conditions_of,
    entries,
    holding,
    in_order,
    is_number,
    same,
)
from jobs.tune_space import check_schedules

if TYPE_CHECKING:
    from jobs.tune_settings import SearcherConfig

optuna.logging.set_verbosity(optuna.logging.ERROR)

FEWEST_FOR_IMPORTANCE = 4
"""Trials below which a share of the variance means nothing."""
TREES, DEPTH = 64, 64


def propose(
    space: Space, searcher: "SearcherConfig", seed: int, index: int, records: Sequence[TrialRecord], mode: str
) -> dict[str, Any]:
    """Return the values of trial `index` by dotted key, as plain numbers, text, lists and mappings.

    Independent draws (`random`, and the first `startup_trials` of `tpe`) depend on `space`, `seed` and
    `index` alone. Otherwise Optuna's multivariate tree-structured Parzen estimator learns from `records`
    too, in the order of their index; running trials count as bad ones nearby (a constant liar), so that
    trials at the same time differ. Of a grid, trial i has cell i modulo their number.
    """
    for key, entry in space.items():
        strange = [name for name in conditions_of(entry) if name not in space]
        if strange:
            raise ValueError(
                f"space.{key}: when names {strange[0]}, which is not in the space: settle it first"
            )
    stream = seed_of(seed, "tune", index) % 2**32
    learns = searcher.kind == "tpe" and index >= searcher.startup_trials
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=stream)
    if learns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=searcher.startup_trials,
                seed=stream,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
    others = [record for record in records if record.index != index] if learns else []
    study = _study(space, others, mode, sampler)
    grid = cells(space)
    cell = grid[index % len(grid)] if grid else {}
    study.enqueue_trial(_drawn(space, cell))
    trial = study.ask()
    params: dict[str, Any] = {}
    for key in in_order(space):
        held = holding(space[key], params)
        if held is not None:
            params[key] = _suggested(trial, _name(space, key, held[0]), held[1])
    return {key: params[key] for key in space if key in params}


def study_of(space: Space, records: Sequence[TrialRecord], mode: str) -> optuna.Study:
    """Return the records as a study in memory, in the order of their index.

    A parameter is called by its key, with the place of its entry in brackets where the key has several
    (`lr[1]`); options are given by their place. Stopped trials are pruned ones, with their last report as
    their value.
    """
    return _study(space, records, mode, optuna.samplers.RandomSampler(seed=0))


def compared(records: Sequence[TrialRecord]) -> tuple[int | None, dict[int, float]]:
    """Return what trials can be compared by: a step, or None for the end of the trial; and values by index.

    Where a scheduler has stopped trials, finished ones alone would be few, and all of them good: then it is
    the progress metric at the last step that every trial with a report has reached.
    """
    ended = [record for record in records if record.state in ("done", "stopped")]
    if any(record.state == "stopped" for record in ended):
        told = [record for record in ended if record.last is not None]
        step = min((record.reports[-1].step for record in told), default=0)
        reached = {
            record.index: report.value for record in told for report in record.reports if report.step == step
        }
        return step, {index: value for index, value in reached.items() if math.isfinite(value)}
    return None, {r.index: r.value for r in ended if r.value is not None and math.isfinite(r.value)}


def importance(space: Space, records: Sequence[TrialRecord], mode: str, seed: int) -> dict[str, float]:
    """Return by key the share of the variance of `compared` values that the key explains alone (fANOVA).

    Hutter et al. 2014, with Optuna's random forest: the shares of keys that all trials set add up to 1,
    interactions left out. A key that only some trials set, or from different ranges, has its share among
    the trials of its most frequent entry and the keys common to these: a share of another whole, not to be
    added up with others. Keys with too few trials are left out; with fewer than four trials, or equal
    values only, nothing is returned. Of few trials the shares are a hint and no more: they depend on the
    seed of the forest.
    """
    _, values = compared(records)
    known = {record.index: _drawn(space, record.params) for record in records if record.index in values}
    named = {
        _name(space, key, place): (key, parameter)
        for key, entry in space.items()
        for place, parameter in enumerate(entries(entry))
        if len(parameter.values) > 1
    }
    having = {name: frozenset(i for i, drawn in known.items() if name in drawn) for name in named}
    found: dict[str, float] = {}
    most: dict[str, int] = {}
    for trials in sorted(set(having.values()), key=lambda group: (-len(group), sorted(group))):
        common = {name: named[name][1] for name, others in sorted(having.items()) if trials <= others}
        for name, share in _shares({i: known[i] for i in sorted(trials)}, common, values, seed).items():
            key = named[name][0]
            if having[name] == trials and len(trials) > most.get(key, 0):
                found[key], most[key] = share, len(trials)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def mutations(space: Space, seed: int) -> dict[str, Callable[[], Any]]:
    """Return by key what draws its value anew, each from a stream of its own."""
    return {key: _drawer(entries(entry)[0], seed_of(seed, "mutation", key)) for key, entry in space.items()}


def clamped(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return perturbed values brought back: into the range, to a whole number, or to the nearest option."""
    return {
        key: _brought_back(entries(space[key])[0], value) if key in space else value
        for key, value in params.items()
    }


def check_pbt(space: Space, job: str, base: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, unless every key of the space may change in mid-run."""
    check_schedules(space, job, base)


def _study(
    space: Space, records: Sequence[TrialRecord], mode: str, sampler: optuna.samplers.BaseSampler
) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, direction="minimize" if mode == "min" else "maximize")
    study.add_trials([_trial(space, record) for record in sorted(records, key=lambda r: r.index)])
    return study


def _trial(space: Space, record: TrialRecord) -> FrozenTrial:
    drawn = _drawn(space, record.params)
    reports = {r.step: r.value for r in record.reports if not math.isnan(r.value)}
    last = reports[max(reports)] if reports else None
    value = record.value if record.value is not None and not math.isnan(record.value) else None
    state = {
        "done": TrialState.FAIL if value is None else TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "running": TrialState.RUNNING,
    }[record.state]
    return create_trial(
        state=state,
        value={TrialState.COMPLETE: value, TrialState.PRUNED: last}.get(state),
        params=drawn,
        distributions={name: _distribution(parameter) for name, parameter in _drawn_from(space, drawn)},
        intermediate_values=reports,
    )


def _name(space: Space, key: str, place: int) -> str:
    """Return what Optuna calls an entry: its ranges must not change under one name."""
    return key if len(entries(space[key])) == 1 else f"{key}[{place}]"


def _drawn_from(space: Space, drawn: Mapping[str, Any]) -> list[tuple[str, Parameter]]:
    named = (
        (_name(space, key, place), parameter)
        for key, entry in space.items()
        for place, parameter in enumerate(entries(entry))
    )
    return [(name, parameter) for name, parameter in named if name in drawn]


def _drawn(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Optuna would have drawn for `params`; what the space does not have now is left out."""
    found: dict[str, Any] = {}
    for key in (key for key in space if key in params):
        held = holding(space[key], params)
        drawn = None if held is None else _place_of(held[1], params[key])
        if held is not None and drawn is not None:
            found[_name(space, key, held[0])] = drawn
    return found


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "randint":
        return IntDistribution(int(parameter.low), int(parameter.high))
    if parameter.kind in ("uniform", "loguniform"):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.kind == "loguniform")
    return CategoricalDistribution(range(len(parameter.values)))


def _measured(parameter: Parameter) -> BaseDistribution:
    """Return the distribution on the scale on which draws are even: fANOVA integrates over lengths."""
    if parameter.kind != "loguniform":
        return _distribution(parameter)
    return FloatDistribution(math.log(parameter.low), math.log(parameter.high))


def _place_of(parameter: Parameter, value: Any) -> Any:
    """Return a value as Optuna has it: an option by its place; None where it is outside."""
    if parameter.kind in ("choice", "grid"):
        return next((i for i, option in enumerate(parameter.values) if same(option, value)), None)
    inside = isinstance(value, int | float) and parameter.low <= value <= parameter.high
    return (int(value) if parameter.kind == "randint" else float(value)) if inside else None


def _suggested(trial: optuna.Trial, name: str, parameter: Parameter) -> Any:
    """Draw a value of the configuration, or take the one that the trial was given."""
    if parameter.kind in ("choice", "grid"):
        place = trial.suggest_categorical(name, range(len(parameter.values)))
        return copy.deepcopy(parameter.values[place])
    if parameter.kind == "randint":
        return int(trial.suggest_int(name, int(parameter.low), int(parameter.high)))
    log = parameter.kind == "loguniform"
    return float(trial.suggest_float(name, parameter.low, parameter.high, log=log))


def _shares(
    drawn: Mapping[int, Mapping[str, Any]],
    parameters: Mapping[str, Parameter],
    values: Mapping[int, float],
    seed: int,
) -> dict[str, float]:
    """Return the shares of parameters that all of these trials set; nothing where they would mean nothing."""
    seen = [values[index] for index in drawn]
    if len(seen) < FEWEST_FOR_IMPORTANCE or not parameters or max(seen) == min(seen):
        return {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = {name: _measured(parameter) for name, parameter in parameters.items()}
    for index, found in drawn.items():
        params = {
            name: math.log(found[name]) if parameter.kind == "loguniform" else found[name]
            for name, parameter in parameters.items()
        }
        study.add_trial(create_trial(value=values[index], params=params, distributions=distributions))
    forest = FanovaImportanceEvaluator(
        n_trees=TREES, max_depth=DEPTH, seed=seed_of(seed, "importance") % 2**32
    )
    shares = forest.evaluate(study)
    whole = sum(shares.values())
    return {name: share / whole for name, share in shares.items()} if whole > 0 else {}


def _drawer(parameter: Parameter, seed: int) -> Callable[[], Any]:
    """Return what draws a value of an entry, and the next one when it is called again."""
    stream = random.Random(seed)
    if parameter.kind in ("choice", "grid"):
        return lambda: copy.deepcopy(stream.choice(parameter.values))
    if parameter.kind == "randint":
        return lambda: stream.randint(int(parameter.low), int(parameter.high))
    if parameter.kind == "uniform":
        return lambda: stream.uniform(parameter.low, parameter.high)
    low, high = math.log(parameter.low), math.log(parameter.high)
    return lambda: min(max(math.exp(stream.uniform(low, high)), parameter.low), parameter.high)


def _brought_back(parameter: Parameter, value: Any) -> Any:
    if parameter.kind not in ("choice", "grid"):
        near = min(max(value, parameter.low), parameter.high)
        return round(near) if parameter.kind == "randint" else float(near)
    options = parameter.values
    if any(same(option, value) for option in options) or not is_number(value):
        return next((option for option in options if same(option, value)), options[0])
    numbers = [option for option in options if is_number(option)]
    return min(numbers, key=lambda option: (abs(option - value), option), default=options[0])
