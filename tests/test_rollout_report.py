"""The report of a comparison: whole, harmless, and claiming no more than is resolved."""

import json
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import GREEDY, RANDOM, SPACE, TEXT, decision, episode, frames, played
from test_report import Page

from cluster.storage import RunStore
from jobs import report
from jobs.config import dump_config
from jobs.rollout_cells import Cell
from jobs.rollout_report import write_rollout_report
from jobs.rollout_results import compare, table
from jobs.rollout_settings import PolicyArm, RolloutConfig, RuleArm
from jobs.rollout_trace import save_trace
from jobs.rollout_videos import VideosConfig, save_video
from jobs.rollout_words import summary, verdict
from jobs.runs import write_results

HOSTILE = "text </svg><script>alert(1)</script>"
EPISODES = 60


def configured(run: Path, name: str = "MG text") -> RolloutConfig:
    return RolloutConfig(
        run=str(run),
        first_seed=100,
        episodes=EPISODES,
        split="calibration",
        policies=(
            PolicyArm(name="base", run="/runs/base-{seed}", seeds=(0, 1)),
            PolicyArm(name="joint", run="/runs/joint-{seed}", seeds=(0, 1)),
        ),
        rules=(
            RuleArm(name="greedy", selection=GREEDY),
            RuleArm(name="random-of-4", selection=RANDOM),
            RuleArm(name=name, selection=TEXT),
        ),
    )


def results(config: RolloutConfig, lead: int = 0) -> dict[str, Any]:
    """Results in which the last rule solves `lead` episodes more than the others, of 30, in every cell."""
    cells = []
    for cell in config.cells():
        won = {"expert": EPISODES, "random": 0}.get(cell.policy, 30)
        won += lead if cell.rule == config.rules[-1].name else 0
        aside = {"s999": "hung at step 12"} if cell.rule == "greedy" and cell.replica == "base-0" else {}
        cells.append(played(cell, [i < won for i in range(EPISODES)], **aside))
    return compare(config, cells)


def written(config: RolloutConfig, found: dict[str, Any]) -> RunStore:
    store = RunStore(config.run)
    rule = config.rules[-1].name
    cell = Cell("base", 0, rule, "/runs/base-0", TEXT)
    trace = (decision(0), decision(1, lost=(2,)), decision(2, lost=(0, 1, 2, 3), chosen=-1))
    made = episode(100, True, trace=trace, frames=frames(9))
    save_trace(store, cell, made, SPACE)
    save_video(VideosConfig(scale=1), store, cell, made)
    save_video(VideosConfig(scale=1), store, cell, episode(101, False, frames=frames(4)))
    store.write_text("config.yaml", dump_config(config))
    store.write_text(
        "environment.json", json.dumps({"commit": "abc123", "command": ["/x/jobs/rollout.py", "a"]})
    )
    write_results(store, found)
    write_rollout_report(store)
    return store


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    config = configured(tmp_path_factory.mktemp("report"), HOSTILE)
    return Page(written(config, results(config, lead=14)).read_text("report.html"))


def test_the_page_is_complete_in_itself_and_runs_nothing(page: Page) -> None:
    assert page.open == []
    assert not page.all("script")
    addresses = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert HOSTILE in page.text


def test_everything_asked_for_is_on_the_page(page: Page) -> None:
    images = [image["src"] for image in page.all("img")]
    assert sum(image.startswith("data:image/gif") for image in images) == 2
    assert sum(image.startswith("data:image/png") for image in images) == 3
    drawings = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert sum("Chunks of 4 candidates" in label for label in drawings) == 3
    assert f"base with {HOSTILE} 73.3 %" in drawings[0]
    for words in (
        "Success by rule and policy", "Against greedy, same policy", "Against random choice",
        "Against the policy base", "pick up the red block", "hung at step 12", "not decodable",
        "the greedy chunk was taken", "calibration", "abc123", "python -m jobs.rollout a", "first_seed: 100",
    ):  # fmt: skip
        assert words in page.text, words


def test_what_is_resolved_is_said_with_its_interval(tmp_path: Path) -> None:
    found = results(configured(tmp_path), lead=14)
    row = next(
        r for r in found["comparisons"] if (r["policy"], r["kind"]) == ("base", "baseline") and r["gained"]
    )
    assert (row["gained"], row["lost"], verdict(row)) == (28, 0, "higher")
    text = summary(found)
    assert "base with MG text against greedy +23.3 points [" in text
    assert "base with random-of-4 against" not in text
    assert text.endswith("All others are not resolved.")
    assert "random actions in 0.0 % and the scripted expert in 100.0 %" in text


def test_what_is_not_resolved_is_not_claimed(tmp_path: Path) -> None:
    found = results(configured(tmp_path), lead=2)
    assert {verdict(row) for row in found["comparisons"]} == {"not resolved"}
    assert "none is resolved after Holm's correction" in summary(found)


def test_training_seeds_that_disagree_are_named(tmp_path: Path) -> None:
    row = {"p_holm": 0.001, "difference": 0.1, "by_seed": [0.3, -0.1]}
    assert verdict(row) == "higher, training seeds disagree"


def test_a_policy_that_does_worse_everywhere_is_told_in_one_clause(tmp_path: Path) -> None:
    config = configured(tmp_path)
    cells = [
        played(cell, [i < (45 if cell.policy == "base" else 10) for i in range(EPISODES)])
        for cell in config.cells()
    ]
    text = summary(compare(config, cells))
    assert "joint against base under 3 of 3 rules, \N{MINUS SIGN}58.3 to \N{MINUS SIGN}58.3 points" in text


def test_the_table_and_the_headline_are_of_the_same_counts(tmp_path: Path) -> None:
    found = results(configured(tmp_path), lead=14)
    lines = table(found).splitlines()
    (line,) = [line for line in lines if line.startswith("base, MG text")]
    assert line.split()[3:6] == ["88", "120", "73.3"]
    headline = found["headline"]
    assert headline["mg_text_success_rate"] == round(88 / 120, 4)
    assert (headline["greedy_success_rate"], headline["random_success_rate"]) == (0.5, 0.0)
    assert (headline["expert_success_rate"], headline["set_aside"]) == (1.0, 1)
    assert headline["episodes"] == EPISODES * 14


def test_the_report_can_be_written_again(tmp_path: Path) -> None:
    config = configured(tmp_path)
    store = written(config, results(config))
    store.write_text("cells/base-0/greedy.jsonl", "")
    before = store.read_text("report.html")
    store.delete("report.html")
    assert report.main(report.ReportConfig(run=config.run)) == {"report": str(tmp_path / "report.html")}
    assert store.read_text("report.html") == before


def test_a_run_without_films_traces_or_successes_has_a_report_too(tmp_path: Path) -> None:
    config = configured(tmp_path)
    store = RunStore(config.run)
    write_results(store, compare(config, [played(cell, []) for cell in config.cells()]))
    write_rollout_report(store)
    assert "Every rule" in Page(store.read_text("report.html")).text
