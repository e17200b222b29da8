"""The report of a sweep: read back with an HTML parser, its figures against those worked out here."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sweep_parts import (
    RATE,
    REDUCTION,
    REFRESH,
    asha_trials,
    configured,
    params_of,
    pbt_configured,
    population,
    stored,
    trial,
)
from test_report import Page

from cluster.storage import RunStore
from jobs.report import ReportConfig, main
from jobs.tune_axes import dimension, jitter, wrapped
from jobs.tune_curves import takeovers
from jobs.tune_ledger import Report, TrialRecord
from jobs.tune_record import read_sweep
from jobs.tune_report import lengths, render, trial_pools, write_tune_report
from jobs.tune_table import best_first, csv_table, rows, short_names, standard_error, table
from jobs.tune_words import confirm_rows

HOSTILE = "</pre></svg><script>alert('1')</script>\"><img src=x onerror=alert(2)> ${x}"
CONFIRM = {
    "metric": "student_1_fd",
    "best": [2.0, 2.2, 2.4],
    "base": [3.0, 3.1, 3.5],
    "difference": {"mean": -1.0, "low": -1.4, "high": -0.6},
    "verdict": "better than the base",
}


def page_of(store: RunStore) -> Page:
    write_tune_report(store)
    return Page(store.read_text("report.html"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    run = tmp_path_factory.mktemp("sweep")
    store = stored(run, configured(run), asha_trials(run), headline={}, confirm=CONFIRM)
    store.write_text("best.yaml", "teacher: x\n")
    for seed in range(2):
        store.write_text(f"trials/0006/seed-{seed}/report.html", "x")
    return store


@pytest.fixture(scope="module")
def page(swept: RunStore) -> Page:
    return page_of(swept)


def test_the_page_is_complete_in_itself_and_runs_nothing(page: Page) -> None:
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert {one["href"] for one in page.all("a")} == {f"trials/0006/seed-{s}/report.html" for s in (0, 1)}
    assert not re.search(r"#0[bcd]000\d", page.source), "a stand-in colour was left"
    for variable in set(re.findall(r"var\((--[\w-]+)\)", page.source)):
        assert f"{variable}:" in page.source


def test_the_headline_is_the_best_trial_with_its_error_over_seeds(page: Page, swept: RunStore) -> None:
    done = [t for t in read_sweep(swept).trials if t.state == "done"]
    best = min(done, key=lambda t: t.value or math.inf)
    error = np.std(best.values, ddof=1) / math.sqrt(3)
    assert f"Trial {best.index} has the least student_1_fd, {best.value:.3f} ± {error:.3f}" in words(page)
    assert f"python -m jobs.distill {swept.location('best.yaml')}" in page.text
    assert f"{best.params[RATE]:.4g}" in page.text
    assert "5 ran to the end, 9 stopped early, 1 failed, 1 not ended yet." in words(page)


def test_steps_saved_are_those_that_stopped_trials_did_not_take(page: Page) -> None:
    trials = asha_trials("x")
    taken = sum(t.steps for t in trials if t.state in ("done", "stopped"))
    whole = 14 * 3 * 900
    assert f"{taken:,} training steps instead of {whole:,}" in words(page)
    assert f"{100 * (1 - taken / whole):.0f} % less" in words(page)


def test_every_trial_has_a_row_and_the_best_comes_first(page: Page, swept: RunStore) -> None:
    body = page.source[page.source.index("All trials") :]
    first = [int(i) for i in re.findall(r'<tr class="\w+(?: own)?"><th scope="row">(\d+)</th>', body)]
    assert sorted(first) == list(range(16))
    records = {t.index: t for t in read_sweep(swept).trials}
    done = [records[i].value or math.nan for i in first[:5]]
    assert done == sorted(done)
    assert records[first[5]].state == "running"
    assert records[first[-1]].state == "failed"


def test_failures_keep_their_whole_traceback_folded_under_its_last_line(page: Page) -> None:
    assert "<summary><b>trial 9</b> ValueError: loss is nan</summary>" in page.source
    assert "Traceback (most recent call last):" in page.text


def test_charts_show_lines_scales_rungs_and_importance(page: Page) -> None:
    told = [one["aria-label"] for one in page.all("svg")]
    titles = [label.split(". ")[0] for label in told]
    assert titles[:3] == ["What was tried", "Learning curves", "What mattered"]
    assert titles[3:] == [RATE, REFRESH, REDUCTION]
    assert "16 trials" in told[0]
    assert "Logarithmic: critics.learning_rate." in page.text
    assert "rung 100" in page.text
    assert "rung 300" in page.text
    assert "rung 900" not in page.text
    assert "5 finished trials, logarithmic scale" in words(page)
    shares = [float(s) for s in re.findall(r"critics\.\w+ (\d\.\d\d)", told[2])]
    assert 0.9 < sum(shares) < 1.1


def test_confirmation_and_cost_are_told(page: Page) -> None:
    assert "2.20 ± 0.12" in page.text  # the deviation of 2.0, 2.2, 2.4 is 0.2, over the root of 3
    assert "[-1.40, -0.600]" in page.text
    assert "Verdict: better than the base." in page.text
    # Three runs of 1.85 CPUs and the trial's own process: two trials on 16 CPUs.
    assert "On 1 machine of 16 CPUs, 2 trials at once" in words(page)


def test_the_verb_report_makes_it_too(tmp_path: Path) -> None:
    stored(tmp_path, configured(tmp_path), [trial(0)])
    assert main(ReportConfig(run=str(tmp_path))) == {"report": str(tmp_path / "report.html")}
    assert "A sweep of distill, 1 trial" in (tmp_path / "report.html").read_text()


def test_a_store_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        write_tune_report(RunStore(str(tmp_path)))


def test_the_population_s_schedules_are_drawn_with_their_takeovers(tmp_path: Path) -> None:
    members = population()
    found = page_of(stored(tmp_path, pbt_configured(tmp_path), members))
    titles = [one["aria-label"] for one in found.all("svg")]
    best = min(members, key=lambda m: m.value or math.inf)
    learned = [f"{s.params[RATE]:.4g} from step {s.step}" for s in best.segments]
    assert len(learned) > 1
    assert any(f"Best: {', '.join(learned)}" in title for title in titles)
    assert takeovers(members) == 5
    assert "5 take-overs lived on" in words(found)
    assert "steps saved" not in found.text


def test_a_copied_takeover_counts_once() -> None:
    members = population()
    copied = replace(members[0], segments=members[2].segments)
    assert takeovers([members[2]]) == takeovers([members[2], copied]) == 2


WITHOUT = {key: value for key, value in params_of(3).items() if key != REFRESH}
EDGES: dict[str, list[TrialRecord]] = {
    "no trial": [],
    "begun": [TrialRecord(0, params_of(0))],
    "one done": [trial(0)],
    "none finished": [trial(0, "stopped", 100), trial(1, "failed", 100, error="")],
    "one value": [trial(i, params=params_of(1)) for i in range(3)],
    "missing key": [trial(0), trial(1), replace(trial(3), params=WITHOUT)],
    "not finite": [
        trial(0),
        replace(trial(1), value=math.nan, values=(math.nan, 1.0, 2.0)),
        replace(trial(2), value=math.inf),
        replace(trial(3), reports=(Report(100, math.nan, (math.nan,)), Report(200, 3.0, (3.0,)))),
    ],
    "odd values": [
        replace(trial(i), params={RATE: value, REFRESH: None, REDUCTION: [value, {"kind": "linear"}]})
        for i, value in enumerate((None, True, "x", 1, 1.5, [1, 2], {"kind": "cosine", "start": 1}))
    ],
}


@pytest.mark.parametrize("name", EDGES)
def test_whatever_a_sweep_has_makes_a_page(name: str, tmp_path: Path) -> None:
    found = page_of(stored(tmp_path, configured(tmp_path), EDGES[name]))
    assert found.open == []
    assert f"{len(EDGES[name]):,} trial" in found.text
    assert not re.search(r"\b(nan|inf|NaN)\b", found.text.split("Configuration")[0])


def test_a_line_is_broken_where_its_trial_lacks_a_key(tmp_path: Path) -> None:
    lacking = replace(trial(3), params=WITHOUT)
    whole, broken = (
        render(read_sweep(stored(tmp_path / name, configured(tmp_path), [record])))
        for name, record in (("whole", trial(3)), ("broken", lacking))
    )
    assert "A line is broken where its trial lacks the key." in broken
    assert "lacks the key" not in whole
    # Of three pieces, to the objective's axis too, two touch the key that is lacking.
    pieces = [page[: page.index("</svg>")].count("stroke-width: 2.4") for page in (whole, broken)]
    assert pieces == [3, 1]


def test_trials_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    store = stored(tmp_path, configured(tmp_path), EDGES["not finite"])
    assert {record.index for record in read_sweep(store).ranked} == {0, 3}


def test_the_most_is_best_where_more_is_better(tmp_path: Path) -> None:
    config = configured(tmp_path, objective={"metric": "recall", "mode": "max", "progress": "steps_1.recall"})
    store = stored(tmp_path, config, [replace(trial(i), value=-2.0 + i % 2, values=()) for i in range(3)])
    assert "Trial 1 has the most recall, -1.00; the next, trial 0, has -2.00." in words(page_of(store))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    config = configured(tmp_path, objective={"metric": HOSTILE, "progress": HOSTILE})
    trials = [replace(trial(i), params={HOSTILE: HOSTILE + str(i), RATE: 0.1 * (i + 1)}) for i in range(3)]
    failed = trial(3, "failed", 200, error=HOSTILE, runs=(f"{tmp_path}/{HOSTILE}", "no://such"))
    trials.append(replace(failed, params={}))
    confirm = CONFIRM | {"metric": HOSTILE, "verdict": HOSTILE}
    found = page_of(stored(tmp_path, config, trials, confirm=confirm, room={"trials": 1, "why": HOSTILE}))
    assert found.open == []
    assert not found.all("script")
    assert not found.all("img")
    assert HOSTILE in found.text


def test_results_that_are_half_there_do_not_hinder(tmp_path: Path) -> None:
    half = {"best": [1.0, math.nan], "base": None, "difference": {"mean": math.nan}}
    store = stored(tmp_path, configured(tmp_path), [], confirm=half, seconds={"trials": 90.0})
    found = page_of(store)
    assert found.open == []
    assert "1 min 30 s" in found.text
    told = confirm_rows(read_sweep(store))
    assert [row["each"] for row in told] == ["1.00, \N{EN DASH}", "", "[\N{EN DASH}, \N{EN DASH}]"]
    for nothing in ("[]", "{", '{"confirm": null}'):
        store.write_text("results.json", nothing)
        assert confirm_rows(read_sweep(store)) == []


def test_a_configuration_that_does_not_hold_any_more_is_reported_without_estimate(tmp_path: Path) -> None:
    store = stored(tmp_path, configured(tmp_path), [trial(0), trial(1)])
    text = store.read_text("config.yaml").replace("heads_alone: 100", "no_such_key: 1")
    store.write_text("config.yaml", text)
    found = page_of(store)
    assert "not known, as the job's configuration cannot be read any more" in found.text
    assert "Trial" in found.text


def test_rendering_twice_gives_the_same_page(swept: RunStore, page: Page) -> None:
    assert render(read_sweep(swept)) == page.source


def test_a_trial_s_length_and_actors_come_from_its_own_configuration(tmp_path: Path) -> None:
    config = configured(tmp_path)
    longer = replace(trial(1), params=params_of(1) | {"adversarial.steps": 1000})
    assert lengths(read_sweep(stored(tmp_path, config, [trial(0), longer]))) == {0: 2700, 1: 3300}
    pools = {pool.name: pool.count for pool in trial_pools(config, {"critics.actors": 2}) or ()}
    assert pools["critics"] == 3 * 2
    alone = configured(tmp_path, scheduler={"kind": "none"})
    assert {pool.name: pool.count for pool in trial_pools(alone, {}) or ()}["critics"] == 4


def test_axes_take_their_scale_from_the_space() -> None:
    log = dimension("a", {"loguniform": [1e-4, 1e-2]}, [{"a": 1e-3}])
    assert log.log
    assert log.place(1e-3) == pytest.approx(0.5)
    assert [text for _, text in log.ticks()] == [f"{v:g}" for v in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)]
    wide = dimension("a", {"loguniform": [1e-5, 1e-1]}, [])
    assert [text for _, text in wide.ticks()] == ["1e-05", "0.0001", "0.001", "0.01", "0.1"]
    plain = dimension("a", [{"uniform": [0, 1]}, {"uniform": [3, 5], "when": {"b": 1}}], [{"a": 7.0}, {}])
    assert (plain.low, plain.high, plain.log) == (0.0, 7.0, False)
    assert plain.value({}) is None
    listed = dimension("a", {"choice": [4, 1, None, "x"]}, [{"a": 1}, {"a": [1, 2]}])
    assert [text for _, text in listed.ticks()] == ["4", "1", "null", "x", "[1, 2]"]
    assert [text for _, text in dimension("a", {"grid": [4, 1, 2.0]}, [{"a": 2}]).ticks()] == ["1", "2", "4"]


def test_jitter_is_even_and_stays_within_its_category() -> None:
    found = [jitter(index) for index in range(100)]
    assert max(map(abs, found)) < 0.5
    assert abs(np.mean(found)) < 0.02
    assert found == [jitter(index) for index in range(100)]


def test_long_names_are_broken_without_losing_a_letter() -> None:
    name = "critics.discriminator_learning_rate.start"
    assert wrapped(name).replace("\n", "") == name
    assert max(map(len, wrapped(name).split("\n"))) <= 17


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    found = short_names(["a.b.rate.start", "a.c.rate.start", "steps", "b.steps"])
    assert found == {
        "a.b.rate.start": "b.rate.start",
        "a.c.rate.start": "c.rate.start",
        "steps": "steps",
        "b.steps": "b.steps",
    }


def test_the_table_is_aligned_and_the_best_comes_first() -> None:
    lines = table(asha_trials("x"), "min").splitlines()
    assert len(lines) == 17
    assert len({len(line) for line in lines}) == 1
    first = best_first(asha_trials("x"), "min")[0]
    assert lines[1].startswith(f"trial {first.index} ")
    assert f"{first.value:.4g}" in lines[1]
    assert "steps (swept)" in table([replace(trial(0), params={"steps": 3})], "min").splitlines()[0]
    assert table([], "min")


def test_rows_hold_plain_numbers_and_csv_reads_back() -> None:
    odd = replace(trial(7), params={RATE: None, REFRESH: [1, 2], REDUCTION: 'a,"b"'})
    trials = [*EDGES["not finite"], odd]
    found = rows(trials, "min")
    json.dumps(found, allow_nan=False)
    assert [row["rank"] for row in found] == [1, 2, 3, None, None]
    read = list(csv.DictReader(io.StringIO(csv_table(trials, "min"))))
    assert [int(row["trial"]) for row in read] == [row["trial"] for row in found]
    told = next(row for row in read if row["trial"] == "7")
    assert (told[RATE], told[REFRESH], told[REDUCTION]) == ("null", "[1, 2]", 'a,"b"')


def test_the_standard_error_is_numpy_s() -> None:
    values = (1.0, 4.0, 2.5, 2.0)
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2.0)
    assert standard_error((1.0,)) is None
    assert standard_error((1.0, math.nan)) is None
