"""The space of a sweep: what it offers, under which conditions, and how mistakes in it are told."""

from pathlib import Path
from typing import Any

import pytest

from counterpoint.schedules import LinearSchedule
from jobs.config import dump_config, parse_config
from jobs.config_errors import ConfigError
from jobs.config_yaml import read_yaml
from jobs.settings import DistillConfig
from jobs.train_policy import PolicyTrainConfig
from jobs.tune_settings import TuneConfig
from jobs.tune_space import (
    Parameter,
    cells,
    check_schedules,
    check_space,
    job_config,
    laid_over,
    resolved,
    schedule_field,
    settled,
)

RATE = "critics.refresh_rate"
ORDER = "critics.order"
WEIGHT = "adversarial.adversarial_weight"
LINEAR = {"kind": "linear", "start": 1.0, "end": 0.1}
RULES = {
    "policies": [{"name": "joint", "run": "runs/joint"}],
    "rules": [
        {"name": "greedy"},
        {"name": "masked", "selection": {"rule": "masked_condition", "mask": "text"}},
    ],
}


def space_of(text: str) -> dict[str, Any]:
    """Return the space that YAML describes, without a look at any job."""
    found: dict[str, Any] = {}
    for key, entry in read_yaml(text).items():
        several = isinstance(entry, list)
        found[key] = (
            tuple(map(Parameter.model_validate, entry)) if several else Parameter.model_validate(entry)
        )
    return found


def refusal(tmp_path: Path, space: str, base: str = "{}", job: str = "distill") -> str:
    """Return the line with which a sweep's file is refused."""
    file = tmp_path / "tune.yaml"
    file.write_text(f"job: {job}\nbase: {base}\nspace: {space}\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(TuneConfig, [str(file)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("{critics.refresh_rat: {uniform: [0, 0.2]}}", ["nearest valid key is critics.refresh_rate"]),
        (f"{{{RATE}: {{uniform: [0.2, 0.1]}}}}", ["[0.2, 0.1]", "low is above high", "[0.1, 0.2]"]),
        (f"{{{RATE}: {{randint: [3, 1]}}}}", ["[3, 1]", "low is above high"]),
        (f"{{{RATE}: {{uniform: [0.1, 0.1]}}}}", ["[0.1, 0.1]", "set the key in base"]),
        (f"{{{RATE}: {{loguniform: [0.0, 0.2]}}}}", ["0.0 has no logarithm", "above 0"]),
        (f"{{{RATE}: {{loguniform: [-1, 0.2]}}}}", ["-1 has no logarithm", "uniform instead"]),
        (f"{{{RATE}: {{uniform: [low, 0.2]}}}}", ["low is not a finite number"]),
        (f"{{{RATE}: {{uniform: [true, 0.2]}}}}", ["true is not a finite number"]),
        (f"{{{RATE}: {{uniform: [0.0, .inf]}}}}", ["not a finite number"]),
        (f"{{{RATE}: {{uniform: [0.0, 0.1, 0.2]}}}}", ["[low, high]"]),
        (f"{{{RATE}: {{uniform: 0.1}}}}", ["0.1", "list"]),
        (f"{{{RATE}: 0.1}}", ["0.1", "uniform"]),
        (f"{{{RATE}: {{}}}}", ["nothing to try", "exactly one of"]),
        (f"{{{RATE}: {{uniform: [0, 1], grid: [0]}}}}", ["uniform and grid", "exactly one of"]),
        (f"{{{RATE}: {{choice: []}}}}", ["choice = []", "at least one"]),
        (f"{{{RATE}: {{grid: []}}}}", ["grid = []", "at least one"]),
        (f"{{{RATE}: {{grid: [0.1, 0.1]}}}}", ["value twice"]),
        (f"{{{RATE}: {{uniform: [0.0, 1.5]}}}}", ["1.5", "less than or equal to 1"]),
        ("{adversarial.batch_size: {randint: [1.5, 3]}}", ["[1.5, 3]", "whole numbers"]),
        ("{adversarial.batch_size: {uniform: [16, 32]}}", ["fractional part"]),
        ("{critics.loss: {choice: [hinge, hing]}}", ["hing", "'softplus'"]),
        ("{run: {choice: [a, b]}}", ["run", "the sweep sets run itself"]),
        ("{resume: {choice: [true, false]}}", ["resume", "the sweep sets resume itself"]),
        ("{seed: {randint: [0, 9]}}", ["seed", "objective.seeds"]),
        (f"{{{RATE}: {{choice: [0.1], when: {{critics.ordr: x}}}}}}", ["critics.ordr", "critics.order"]),
        (f"{{{RATE}: {{choice: [0.1], when: {{{ORDER}: []}}}}}}", ["never holds"]),
        (f"{{{RATE}: {{choice: [0.1], when: {{{ORDER}: {{over: 1}}}}}}}}", ["{over: 1}", "{above: x}"]),
        (
            f"{{{RATE}: {{choice: [0.1], when: {{{ORDER}: x}}}}, {ORDER}: {{choice: [student_first]}}}}",
            ["never holds", "choice = [student_first]"],
        ),
        (
            f"{{{RATE}: {{choice: [0.1], when: {{{ORDER}: student_first}}}}, "
            f"{ORDER}: {{choice: [student_first], when: {{{RATE}: 0.1}}}}}}",
            ["in a circle", f"{RATE} -> {ORDER} -> {RATE}"],
        ),
        (
            f"{{{RATE}: {{grid: [0.1], when: {{{ORDER}: student_first}}}}, "
            f"{ORDER}: {{choice: [student_first]}}}}",
            ["a grid cannot wait", ORDER],
        ),
        (f"{{{RATE}: [{{grid: [0.1]}}, {{choice: [0.2]}}]}}", ["mixes grid with drawn values"]),
        (
            f"{{{RATE}: {{choice: [0.1], when: {{critics.loss: hinge}}}}, "
            "critics: {choice: [{loss: critic}]}}",
            ["critics.loss", "space.critics changes"],
        ),
    ],
)  # fmt: skip
def test_a_bad_space_is_refused_in_one_line_that_names_the_key(
    space: str, words: list[str], tmp_path: Path
) -> None:
    said = refusal(tmp_path, space)
    key = next(iter(read_yaml(space)))
    assert "\n" not in said
    assert key in said
    for word in words:
        assert word in said


def test_a_bad_base_and_places_that_lists_lack_are_refused_too(tmp_path: Path) -> None:
    assert refusal(tmp_path, f"{{{RATE}: {{choice: [0.1]}}}}", "{critics: {lose: x}}").startswith(
        "base: unknown"
    )
    rules = str(RULES).replace("'", "")
    said = refusal(tmp_path, "{rules.2.selection.mask: {choice: [text]}}", rules, "rollout")
    assert "a list of 2" in said
    said = refusal(tmp_path, "{rules.1.selection.mask: {choice: [text, tex]}}", rules, "rollout")
    assert "rules.1.selection.mask = tex" in said
    said = refusal(tmp_path, "{rules.0.name: {choice: [a]}}", "{policies: [{name: a, run: b}]}", "rollout")
    assert "rules has its default" in said


def test_values_are_tried_with_what_their_conditions_ask_for_and_what_they_bring_along() -> None:
    base = {**RULES, "rules": [{"name": "greedy"}]}
    mask = "rules.0.selection.mask: {choice: [text, state], when: {rules.0.selection.rule: masked_condition}}"
    rule = "rules.0.selection.rule: {choice: [masked_condition, random]}"
    check_space(space_of(f"{{{mask}, {rule}}}"), "rollout", base)
    with pytest.raises(ValueError, match="mask=text has no meaning for rule=greedy"):
        check_space(space_of("{rules.0.selection.mask: {choice: [text]}}"), "rollout", base)
    with pytest.raises(ValueError, match=r"rule=masked_condition needs mask"):
        check_space(space_of(f"{{{rule}}}"), "rollout", base)
    with pytest.raises(ValueError, match=r"rules.0.selection.mask: the base rules out"):
        check_space(space_of(f"{{{mask}}}"), "rollout", base)


def test_a_space_survives_being_written_down(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    text = f"{{{RATE}: [{{uniform: [0, 0.1], when: {{{ORDER}: student_first}}}}, {{choice: [0.5]}}]}}"
    file.write_text(f"space: {text}\n")
    config = parse_config(TuneConfig, [str(file)])
    assert TuneConfig.model_validate(read_yaml(dump_config(config))) == config
    assert read_yaml(dump_config(config))["space"] == read_yaml(text)


def test_cells_are_the_cross_product_of_the_grids_in_order() -> None:
    space = space_of("{a: {grid: [1, 2]}, x: {uniform: [0, 1]}, b: {grid: [u, v, w]}}")
    assert cells(space) == [{"a": a, "b": b} for a in (1, 2) for b in "uvw"]
    assert cells(space_of("{x: {uniform: [0, 1]}}")) == []


def test_a_conditional_grid_has_cells_only_where_it_holds() -> None:
    space = space_of(
        "{n: [{grid: [1], when: {rule: r}}, {grid: [4, 16], when: {rule: [m, k]}}], rule: {grid: [g, r, m]}}"
    )
    assert cells(space) == [
        {"rule": "g"},
        {"rule": "r", "n": 1},
        {"rule": "m", "n": 4},
        {"rule": "m", "n": 16},
    ]


def test_conditions_on_the_base_are_settled_once_and_for_all() -> None:
    text = (
        f"{{{RATE}: [{{uniform: [0, 0.1], when: {{{ORDER}: critics_first}}}}, {{uniform: [0.1, 0.2]}}], "
        f"critics.loss: {{choice: [hinge], when: {{{ORDER}: critics_first}}}}}}"
    )
    space = space_of(text)
    here = settled(space, "distill", {"critics": {"order": "critics_first"}})
    assert [p.values for p in here[RATE]] == [(0, 0.1), (0.1, 0.2)]
    assert not here[RATE][0].when
    assert "critics.loss" in here
    there = settled(space, "distill", {"critics": {"order": "student_first"}})
    assert there[RATE].values == (0.1, 0.2)
    assert "critics.loss" not in there
    # What waits for a key that is never set is never set either.
    waiting = {
        f"{ORDER}": Parameter(choice=("student_first",), when={"critics.loss": "critic"}),
        RATE: Parameter(choice=(0.1,), when={ORDER: "student_first"}),
    }
    assert settled(waiting, "distill", {}) == {}


def test_laying_over_reaches_lists_and_schedules_and_leaves_the_base_alone() -> None:
    base = {"adversarial": {"adversarial_weight": dict(LINEAR)}, "rules": [{"n": 1}, {"n": 2}]}
    found = laid_over(base, {f"{WEIGHT}.start": 0.5, "rules.1.n": 7, "critics.refresh_rate": 0.1})
    assert found["adversarial"]["adversarial_weight"] == LINEAR | {"start": 0.5}
    assert found["rules"] == [{"n": 1}, {"n": 7}]
    assert found["critics"] == {"refresh_rate": 0.1}
    assert base == {"adversarial": {"adversarial_weight": LINEAR}, "rules": [{"n": 1}, {"n": 2}]}
    # A section comes before what lies in it, in whatever order they are named.
    over = {f"{WEIGHT}.end": 0.0, WEIGHT: dict(LINEAR)}
    assert laid_over({}, over)["adversarial"]["adversarial_weight"]["end"] == 0.0
    found = laid_over({"adversarial": base["adversarial"]}, {f"{WEIGHT}.start": 0.5})
    config = resolved("distill", found)
    assert isinstance(config, DistillConfig)
    weight = config.adversarial.adversarial_weight
    assert isinstance(weight, LinearSchedule)
    assert weight.start == 0.5


def test_resolving_keeps_a_sections_default_in_its_parent_and_refuses_in_one_line() -> None:
    assert resolved("train", {"evaluation": {"workers": 2}}).evaluation.every == 0  # type: ignore[attr-defined]
    assert job_config("train_policy") is PolicyTrainConfig
    with pytest.raises(ConfigError, match=r"unknown key critics.refresh_rat = 1"):
        resolved("distill", {"critics": {"refresh_rat": 1}})
    with pytest.raises(ValueError, match=r"job = bake; give one of train,"):
        job_config("bake")


def test_a_population_sweeps_schedules_only() -> None:
    base = {"adversarial": {"adversarial_weight": LINEAR}}
    assert schedule_field("distill", base, f"{WEIGHT}.start") == WEIGHT
    assert schedule_field("distill", {}, RATE) == RATE
    space = f"{{{WEIGHT}.end: {{uniform: [0, 1]}}, critics.band_weights.0: {{choice: [0, 0.1]}}}}"
    check_schedules(space_of(space), "distill", base)
    for text, data, words in (
        ("{adversarial.batch_size: {randint: [8, 16]}}", base, "takes no schedule"),
        (f"{{{WEIGHT}.kind: {{choice: [linear, cosine]}}}}", base, "perturbs numbers"),
        (f"{{{RATE}: {{uniform: [0, 1], when: {{{ORDER}: student_first}}}}}}", base, "has conditions"),
        (f"{{{WEIGHT}.end: {{uniform: [0, 1]}}}}", {}, "leaves to its default"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            check_schedules(space_of(text), "distill", data)
        assert "\n" not in str(caught.value)
        assert next(iter(read_yaml(text))) in str(caught.value)
