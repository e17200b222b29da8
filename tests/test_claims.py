"""Claims: which runs they take, what arms over seeds say, and the page that is drawn from stored outcomes."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from jobs import claim_work
from jobs.claim import ClaimConfig, CompareConfig, VariationConfig, methods, read_claim
from jobs.claim_page import claims_page
from jobs.claim_plan import Run, planned
from jobs.claim_results import outcome, read_outcomes, store_outcome
from jobs.claim_verdict import arm_summary, bootstrap_interval, compared
from jobs.config_errors import ConfigError
from jobs.reproduce import ReproduceConfig, arguments, main, sets_of_images

CLAIMS = Path(__file__).parent.parent / "configs" / "claims"
LOWER = CompareConfig(arm="a", to="b", metric="fd", better="lower")


def claim(**changes: Any) -> ClaimConfig:
    """A claim about two samplers of one teacher."""
    data: dict[str, Any] = {
        "paper": {"title": "A paper", "arxiv": "2310.13268", "claim": "12 against 28"},
        "claim": "a is below b",
        "models": {"teacher": {"job": "train", "config": {"teacher": {"steps": 3}}}},
        "base": {"job": "evaluate", "config": {"run": "{teacher}", "steps": [4]}},
        "arms": {"a": {"config": {"steps": [5]}}, "b": {}},
        "seeds": [0, 1],
        "metric": "fd",
        "compare": {"arm": "a", "to": "b"},
    }
    return ClaimConfig.model_validate(data | changes)


def test_arms_of_a_seed_share_its_models_and_its_noise() -> None:
    plan = planned(claim(), (), "memory://claims")
    assert [run.name for run in plan.models] == ["teacher, seed 0", "teacher, seed 1"]
    for (arm, seed), run in plan.arms.items():
        assert run.config["run"] == plan.models[seed].uri
        assert run.needs == (plan.models[seed].uri,)
        assert run.config["evaluation"]["seed"] == 1234 + seed
        assert run.config["steps"] == ([5] if arm == "a" else [4])
    assert plan.models[1].config["seed"] == 1
    assert len({run.uri for run in plan.runs}) == 6
    assert all(plan.runs.index(model) < plan.runs.index(run) for model in plan.models for run in
               plan.arms.values() if model.uri in run.needs)  # fmt: skip


def test_runs_are_named_by_what_they_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, same = planned(claim(), (), "memory://claims"), planned(claim(metric="kid"), (), "memory://claims")
    assert [run.uri for run in plain.runs] == [run.uri for run in same.runs]
    # A default that is written out is the same run; another number, in a model or an arm, is another one.
    written = claim(arms={"a": {"config": {"steps": [5], "reference_steps": 0}}, "b": {}})
    assert planned(written, (), "memory://claims").arms["a", 0].uri == plain.arms["a", 0].uri
    longer = (VariationConfig(models={"teacher": {"teacher": {"steps": 4}}}),)
    other = planned(claim(), longer, "memory://claims")
    assert not {run.uri for run in other.runs} & {run.uri for run in plain.runs}
    # Nor does it matter where the command is given.
    monkeypatch.chdir(tmp_path)
    assert [run.uri for run in planned(claim(), (), "memory://claims").runs] == [
        run.uri for run in plain.runs
    ]
    wider = (VariationConfig(arms={"a": {"steps": [6]}}),)
    only_a = planned(claim(), wider, "memory://claims")
    assert {arm for arm, _ in plain.arms if plain.arms[arm, 0].uri != only_a.arms[arm, 0].uri} == {"a"}


def test_a_variation_lies_over_the_arms_and_brings_its_seeds() -> None:
    quick = VariationConfig(config={"evaluation": {"samples": 8}}, arms={"a": {"steps": [1]}}, seeds=(7,))
    plan = planned(claim(), (quick,), "memory://claims")
    assert sorted(plan.arms) == [("a", 7), ("b", 7)]
    assert all(run.config["evaluation"]["samples"] == 8 for run in plan.arms.values())
    assert plan.arms["a", 7].config["steps"] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {"arm": "c", "to": "b"}}, "compare names c; give one of the arms a, b"),
        ({"smoke": {"models": {"student": {}}}}, r"smoke.models has student; give one of teacher"),
        ({"smoke": {"arms": {"c": {}}}}, r"smoke.arms has c; give one of a, b"),
        ({"arms": {"a": {}}}, "at least 2"),
    ],
)
def test_a_claim_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claim(**changes)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"job": "evaluate", "config": {"stepz": [1]}},
            r"a, seed 0: unknown key stepz = .1.; the nearest",
        ),
        ({"job": "dream", "config": {}}, "job = dream is no verb"),
        ({"job": "evaluate", "config": {"steps": []}}, r"a, seed 0: invalid steps = \[\]"),
    ],
)
def test_an_arm_that_its_job_refuses_is_named(base: dict[str, Any], message: str) -> None:
    arms: dict[str, Any] = {"a": {}, "b": {}}
    with pytest.raises(ConfigError, match=message) as refused:
        planned(claim(base=base, arms=arms), (), "memory://claims")
    assert "\n" not in str(refused.value)


def test_unknown_claims_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"methods = nitrofusio: give some of .*nitrofusion"):
        read_claim(CLAIMS, "nitrofusio")
    with pytest.raises(ConfigError, match="methods = "):
        read_claim(CLAIMS, "../digits/teacher")
    with pytest.raises(ValueError, match="name claims to run, or --all"):
        ReproduceConfig()
    with pytest.raises(ValueError, match="name claims to run, or --all"):
        ReproduceConfig(methods=("pag",), all=True)


def test_bare_words_are_the_methods() -> None:
    assert arguments(["pag", "--smoke", "raag", "run=x"]) == ["--smoke", "run=x", "methods=[pag, raag]"]
    assert arguments(["--all"]) == ["--all"]


def test_the_bootstrap_interval_is_the_exact_one_of_all_resamples() -> None:
    """With three pairs there are 27 resamples, whose means can be written down."""
    differences = [-0.3, -0.1, 0.05]
    means = np.sort([np.mean(draw) for draw in itertools.product(differences, repeat=3)])
    low, high = bootstrap_interval(differences)
    # A random draw of resamples finds the same steps of the distribution function.
    assert low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"), abs=0.03)
    assert high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"), abs=0.03)
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval([0.2, 0.2]) == (0.2, 0.2)


def test_students_interval_is_scipys() -> None:
    a, b = [1.0, 1.2, 0.9, 1.1], [1.5, 1.4, 1.6, 1.3]
    found = compared(LOWER, {"a": a, "b": b})
    wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["students_t"] == pytest.approx([wanted.low, wanted.high])
    assert found["difference"] == pytest.approx(-0.4)
    assert arm_summary(a)["standard_error"] == pytest.approx(stats.sem(a))


@pytest.mark.parametrize(
    ("a", "better", "margin", "verdict"),
    [
        ([1.0, 1.1, 1.2], "lower", 0.0, "holds"),
        ([1.0, 1.1, 1.2], "lower", 0.5, "does not show here"),
        ([1.0, 1.1, 1.2], "higher", 0.0, "reversed"),
        ([1.0, 2.1, 1.2], "lower", 0.0, "does not show here"),
        ([2.0, 2.1, 2.2], "lower", 0.0, "reversed"),
        ([2.0, 2.1, 2.2], "higher", 0.3, "holds"),
        ([1.0], "lower", 0.0, "does not show here"),
    ],
)
def test_verdicts(a: list[float], better: Any, margin: float, verdict: str) -> None:
    pair = LOWER.model_copy(update={"better": better, "margin": margin})
    assert compared(pair, {"a": a, "b": [1.5, 1.6, 1.7][: len(a)]})["verdict"] == verdict


def found_for(values: dict[tuple[str, int], float], plan: Any) -> dict[str, dict[str, Any]]:
    """Headlines of all runs of a plan."""
    models = {run.uri: {"seconds": 60.0} for run in plan.models}
    return models | {run.uri: {"fd": values[key], "seconds": 30.0} for key, run in plan.arms.items()}


def test_an_outcome_is_stored_beside_the_claim_and_drawn_from_there(tmp_path: Path) -> None:
    stated = claim()
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(stated.model_dump(mode="json")))
    (tmp_path / "unrun.yaml").write_text(yaml.safe_dump(stated.model_dump(mode="json")))
    plan = planned(stated, (), "memory://claims")
    values = {("a", 0): 1.0, ("a", 1): 1.1, ("b", 0): 2.0, ("b", 1): 2.2}
    result = outcome(stated, plan, found_for(values, plan), "python -m jobs.reproduce steps", at_once=2)
    assert result["verdict"] == "holds"
    # Two teachers side by side, then four arms in pairs.
    assert result["minutes"] == pytest.approx(2.0)
    store_outcome(tmp_path, "steps", "digits", result)
    store_outcome(tmp_path, "steps", "idx", result | {"verdict": "reversed"})
    assert read_outcomes(tmp_path, "steps")["digits"]["arms"]["a"]["fd"]["seeds"] == [1.0, 1.1]
    main(ReproduceConfig(all=True, claims=tmp_path, page=tmp_path / "CLAIMS.md"))
    page = (tmp_path / "CLAIMS.md").read_text()
    assert page == claims_page(tmp_path)
    rows = [line for line in page.splitlines() if line.startswith(("| steps", "| unrun"))]
    assert ["**holds**" in rows[0], "**reversed**" in rows[1], "not run" in rows[2]] == [True] * 3
    assert "fd: 1.05 +- 0.05 against 2.1 +- 0.1; difference -1.05 [-1.1, -1]" in rows[0]


def test_a_figure_that_a_job_does_not_give_is_named() -> None:
    stated = claim(metric="fdd")
    plan = planned(stated, (), "memory://claims")
    found = found_for(dict.fromkeys(plan.arms, 1.0), plan)
    with pytest.raises(ValueError, match=r"metric=fdd: a, seed 0 .evaluate. .* it gave fd, seconds"):
        outcome(stated, plan, found, "", 1)


def test_images_of_ones_own_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    idx = {"models": {"teacher": {"data": {"source": "idx"}}}}
    assert list(sets_of_images(claim(idx=idx), smoke=False)) == ["digits"]
    monkeypatch.setenv("COUNTERPOINT_DATA", "s3://images/fashion")
    assert list(sets_of_images(claim(), smoke=False)) == ["digits"]
    found = sets_of_images(claim(idx=idx), smoke=True)
    assert [len(found["digits"]), len(found["idx"])] == [1, 2]
    plan = planned(claim(idx=idx), found["idx"], "memory://claims")
    assert plan.models[0].config["data"]["uri"] == "s3://images/fashion"
    assert planned(claim(idx=idx), found["digits"], "memory://claims").models[0].uri != plan.models[0].uri


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def evaluate(config: Any) -> dict[str, Any]:
        calls.append(config)
        return {"fd": 1.0, "report": "x", "table": [1]}

    run = planned(claim(), (), str(tmp_path)).arms["a", 0]
    _, model = claim_work.entry("evaluate")
    monkeypatch.setattr(claim_work, "entry", lambda job: (evaluate, model))
    first, second = claim_work.do(run), claim_work.do(run)
    assert first == second
    assert len(calls) == 1
    assert calls[0].steps == (5,)
    assert set(first) == {"fd", "report", "seconds"}
    kept = json.loads((Path(run.uri) / "claim.json").read_text())
    assert kept["config"] == run.config
    broken = Run("x", "evaluate", run.config, str(tmp_path / "other"))
    monkeypatch.setattr(claim_work, "entry", lambda job: ((lambda config: 1 / 0), model))
    with pytest.raises(ZeroDivisionError):
        claim_work.do(broken)
    assert not (tmp_path / "other" / "claim.json").exists()


@pytest.mark.parametrize("method", methods(CLAIMS))
def test_every_claim_that_is_stated_can_be_planned(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPOINT_DATA", "s3://images/fashion")
    stated = read_claim(CLAIMS, method)
    assert len(stated.seeds) >= 3
    assert stated.idx is not None
    for smoke in (False, True):
        for variations in sets_of_images(stated, smoke).values():
            assert planned(stated, variations, "memory://claims").runs


def test_the_page_is_drawn_from_the_outcomes_that_are_stored() -> None:
    assert (CLAIMS.parent.parent / "CLAIMS.md").read_text() == claims_page(CLAIMS)
    for method in methods(CLAIMS):
        assert "digits" in read_outcomes(CLAIMS, method), f"{method} was never run"
