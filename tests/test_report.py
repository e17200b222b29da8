"""The report: read back with an HTML parser, and its words against figures worked out here."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from cluster.checkpoints import save_checkpoint
from cluster.storage import RunStore, save_image
from jobs.config import run_job
from jobs.report import MAX_FRAMES, REPORT, ReportConfig, main, render, with_run, write_report
from jobs.report_panel_charts import ages, counted_ages, expected_ages, gap_map
from jobs.report_record import HeadAges, read_record
from jobs.report_words import aims, duration, number, summary

WARMUP, HEADS, PANEL = 40, 8, 32
RATE = 0.05
HOSTILE = "</pre></svg><script>alert('1')</script>\"><img src=x onerror=alert(2)> ${x}"
VOID = {"meta", "img", "br", "path", "use"}


@dataclass
class Page(HTMLParser):
    """A page as its elements: (tag, attributes), and the text a reader sees."""

    source: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element `tag`."""
        return [attributes for name, attributes in self.elements if name == tag]


def gap(value: float) -> dict[str, list[float | None]]:
    return {
        "global_conditional": [value, value + 0.5, None],
        "local_unconditional": [value - 1.0, value, value],
    }


def metrics() -> Iterator[dict[str, Any]]:
    for step in range(1, WARMUP + HEADS + PANEL + 1):
        row: dict[str, Any] = {"step": step, "regression_loss": 1.0 / step, "samples_per_second": 90.0}
        if step <= WARMUP:
            yield row | {"stage": "warmup", "learning_rate": 1e-3, "gradient_norm": 0.4}
            continue
        row |= {"critic_loss": 1.9, "refreshed": 2, "voting": 6, "gap": {f"group{step % 2}": gap(step / 100)}}
        if step <= WARMUP + HEADS:
            yield row | {"stage": "heads"}
        else:
            yield row | {"stage": "panel", "adversarial_loss": -0.1, "gradient_norm": 0.4}


def result(name: str, fd: float, recall: float = 0.8, accuracy: float | None = 0.97) -> dict[str, Any]:
    figures = {"fd": fd, "kid": fd / 40, "precision": 0.8, "recall": recall, "accuracy": accuracy}
    return {"name": name, "samples": 500} | figures


def results(**student: float) -> dict[str, Any]:
    rows = [
        result("real vs real (floor)", 8.17),
        result("teacher, 1 step", 90.0, recall=0.1, accuracy=0.4),
        result("teacher, 25 steps", 8.0, recall=0.8),
        result("student, 1 step", **({"fd": 9.0, "recall": 0.7} | student)),
        result("student, 4 steps", 8.5),
    ]
    pool = {"heads": 24, "groups": [{"timestep": 2}, {"timestep": 33}], "slots": 6, "heads_per_slot": 2}
    return {"headline": {}, "rows": rows, "pool": pool, "seconds": {"distill": 61.0, "score": 2.5}}


def snapshot(step: int, fd: float) -> dict[str, Any]:
    return {"step": step} | {f"steps_{n}": {"fd": fd / n, "recall": 0.7, "samples": 100} for n in (1, 2)}


def write_lines(store: RunStore, name: str, rows: Any) -> None:
    store.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))


def picture(shade: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6), shade, dtype=np.uint8))


def born(group: int) -> list[int]:
    """When each of 12 heads was made, in 40 ticks: three are as old as the pool."""
    return [0, 0, 0, 5, 9, 20, 30, 31, 38, 39, 40, 40 - group]


def write_student(folder: Path) -> RunStore:
    """Write what a finished distillation leaves, with figures that are easy to work out."""
    store = RunStore(folder / "student")
    store.write_text("config.yaml", f"data:\n  source: digits\ncritics:\n  refresh_rate: {RATE}\n")
    environment = {"commit": "abc123", "uncommitted_changes": True, "command": ["jobs/distill.py", "a.b=1"]}
    store.write_text("environment.json", json.dumps(environment | {"versions": {"torch": "9.8.7"}}))
    write_lines(store, "metrics.jsonl", metrics())
    write_lines(store, "evaluations.jsonl", [snapshot(20, 30.0), snapshot(40, 12.0), snapshot(80, 9.5)])
    store.write_text("results.json", json.dumps(results()))
    for shade, name in enumerate(["student-1-step", "student-4-steps", "teacher-25-steps", "real"]):
        save_image(store, f"grids/{name}.png", picture(40 * shade))
    for step in range(2, 81, 2):
        save_image(store, f"grids/step-{step:08d}-1.png", picture(step))
    groups = {
        f"critics-{group}": {
            "ticks": torch.tensor(40),
            "bank0.born": torch.tensor(born(group)[:5]),
            "bank0.updates": torch.arange(5),
            "bank1.born": torch.tensor(born(group)[5:]),
            "bank1.updates": torch.arange(7),
        }
        for group in range(2)
    }
    save_checkpoint(store, WARMUP + HEADS + PANEL, groups, {})
    return store


@pytest.fixture
def student(tmp_path: Path) -> RunStore:
    """A finished run to change."""
    return write_student(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A finished run to read, with its report."""
    store = write_student(tmp_path_factory.mktemp("report"))
    write_report(store)
    return store


@pytest.fixture(scope="module")
def page(finished: RunStore) -> "Page":
    """The report of the finished run."""
    return Page(finished.read_text(REPORT))


def page_of(store: RunStore) -> Page:
    write_report(store)
    return Page(store.read_text(REPORT))


def test_the_page_is_complete_in_itself(page: Page) -> None:
    assert not page.open
    assert not page.all("script")
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), f"<{tag} {name}={value[:60]!r}>"
    assert "http" not in page.source
    assert "@import" not in page.source
    assert re.findall(r"url\((?!#)", page.source) == []


def test_every_reference_inside_the_page_has_one_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#(\w+)', page.source)) == set(ids)


def test_every_picture_can_be_read_by_those_who_do_not_see_it(page: Page) -> None:
    pictures = page.all("img")
    charts = page.all("svg")
    assert len(pictures) == 4 + MAX_FRAMES
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)
    assert len(charts) == 11
    for chart in charts:
        assert chart["role"] == "img"
        assert len(chart["aria-label"]) > 30


def test_pictures_are_inlined_unchanged(finished: RunStore, page: Page) -> None:
    sources = [attributes["src"] for attributes in page.all("img")]
    stored = [base64.b64decode(source.partition("base64,")[2]) for source in sources]
    final = ["student-1-step", "student-4-steps", "teacher-25-steps", "real"]
    assert stored[:4] == [finished.read_bytes(f"grids/{name}.png") for name in final]
    assert stored[4] == finished.read_bytes("grids/step-00000002-1.png")
    assert stored[-1] == finished.read_bytes("grids/step-00000080-1.png")


def test_text_from_a_run_stays_text(student: RunStore) -> None:
    rows = list(metrics())
    rows[50]["alarms"] = [HOSTILE]
    for row in rows[60:]:
        row["stage"] = HOSTILE
    rows[45]["gap"] = {HOSTILE: gap(0.2)}
    write_lines(student, "metrics.jsonl", rows)
    student.write_text(
        "config.yaml", json.dumps({"data": {"source": HOSTILE}, "critics": {"refresh_rate": RATE}})
    )
    bad = results()
    bad["rows"].append(result(f"student, 9 steps {HOSTILE}", 1.0))
    bad["seconds"] = {HOSTILE: 1.0}
    bad["pool"] |= {"warning": HOSTILE, "groups": [{"timestep": HOSTILE}, {"timestep": 3}]}
    student.write_text("results.json", json.dumps(bad))
    student.write_text(
        "environment.json", json.dumps({"commit": HOSTILE, "command": [HOSTILE], "versions": {}})
    )
    save_image(student, "grids/<script>alert(3)<script>.png", picture(9))
    page = page_of(student)
    assert not page.open
    assert not page.all("script")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("alert('1')") >= 9


def test_the_words_agree_with_the_figures(finished: RunStore) -> None:
    text = summary(read_record(finished))
    assert "student's images lie at a Frechet distance of 9.00 in one step and 8.50 in 4 steps" in text
    assert "its teacher's at 90.0 in one step and 8.00 in 25 steps" in text
    assert "real images lie at 8.17 from one another" in text
    assert "meets all four aims" in text
    assert (
        "The panel paid: it brought the one-step distance of snapshots from 12.0 after the warm-up to 9.50"
        in text
    )
    assert "No alarm was raised" in text


@pytest.mark.parametrize(
    ("student_row", "missed"),
    [
        ({"fd": 19.0}, ["a share of the teacher's at 1 step is 0.211", "teacher's at 25 steps is 2.375"]),
        ({"fd": 10.1}, ["Frechet distance, over the teacher's at 25 steps is 1.262"]),
        ({"accuracy": 0.949}, ["accuracy of the classes is 0.949"]),
        ({"recall": 0.63}, ["recall, over the teacher's at 25 steps is 0.787"]),
    ],
)
def test_a_missed_aim_is_said_plainly(
    student: RunStore, student_row: dict[str, float], missed: list[str]
) -> None:
    student.write_text("results.json", json.dumps(results(**student_row)))
    record = read_record(student)
    assert [aim.met for aim in aims(record)].count(False) == len(missed)
    text = summary(record)
    assert f"misses {('one', 'two')[len(missed) - 1]} of its four aims" in text
    for words in missed:
        assert words in text


@pytest.mark.parametrize(
    "figures", [{"fd": 10.0}, {"fd": 10.0, "recall": 0.64}, {"fd": 10.0, "accuracy": 0.95}]
)
def test_an_aim_that_is_just_reached_is_met(student: RunStore, figures: dict[str, float]) -> None:
    student.write_text("results.json", json.dumps(results(**figures)))
    assert all(aim.met for aim in aims(read_record(student)))


def test_a_command_can_be_typed_again(student: RunStore) -> None:
    student.write_text("environment.json", json.dumps({"command": ["/x/jobs/distill.py", "a.b=[1, 2]"]}))
    assert "python -m jobs.distill 'a.b=[1, 2]'" in page_of(student).text


def test_a_panel_that_did_not_pay_is_said_to_and_why(student: RunStore) -> None:
    write_lines(student, "evaluations.jsonl", [snapshot(40, 12.0), snapshot(80, 12.5)])
    judged = [row["gap"] for row in metrics() if "gap" in row][-10:]
    gaps = [g for row in judged for kinds in row.values() for levels in kinds.values() for g in levels]
    mean = np.mean([g for g in gaps if g is not None])
    text = summary(read_record(student))
    assert "did not pay: the one-step distance of snapshots went from 12.0 after the warm-up to 12.5" in text
    assert f"by {mean:.3f} logits on average" in text


def test_the_ages_are_the_checkpoints(finished: RunStore) -> None:
    record = read_record(finished)
    assert [list(group.ages) for group in record.heads] == [[40 - tick for tick in born(g)] for g in range(2)]
    assert [list(group.updates) for group in record.heads] == [[*range(5), *range(7)]] * 2
    counted = counted_ages(record.heads, np.array([0.0, 1.0, 20.0, 40.0]))
    assert counted.tolist() == [3, 9, 6, 6]
    chart = ages(record)
    assert chart is not None
    assert (
        f"{np.mean([40 - tick for g in range(2) for tick in born(g)]):.1f} ticks; 6 heads were never"
        in chart.svg
    )


def test_the_law_of_ages_is_that_of_coins_thrown_each_tick() -> None:
    groups = [HeadAges("critics-0", 40, (0,) * 4000, (0,)), HeadAges("critics-1", 25, (0,) * 4000, (0,))]
    edges = np.array([0.0, 3.0, 10.0, 30.0, 40.0])
    random = np.random.default_rng(0)
    thrown = []
    for group in groups:
        living = np.zeros(len(group.ages), dtype=int)
        for _ in range(group.ticks):
            living = np.where(random.random(len(living)) < RATE, 0, living + 1)
        thrown.append(HeadAges(group.group, group.ticks, tuple(living.tolist()), (0,)))
    law = expected_ages(groups, RATE, edges)
    assert law.sum() == pytest.approx(8000)
    assert chisquare(counted_ages(thrown, edges), law).pvalue > 0.01


def test_the_map_of_gaps_averages_over_those_who_judged(finished: RunStore) -> None:
    chart = gap_map(read_record(finished))
    assert chart is not None
    # Each group judges every other of 40 steps; the last quarter of its 20 are 5.
    wanted = {
        group: np.mean([step / 100 for step in range(49, 81) if step % 2 == group][-5:]) for group in (0, 1)
    }
    cells = re.findall(r">(-?\d\.\d\d)</text>", chart.svg)
    offsets = (0.0, 0.5, -1.0, 0.0, 0.0)
    assert cells == [f"{wanted[group] + offset:.2f}" for group in (0, 1) for offset in offsets]
    assert "t = 33" in chart.svg


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (("results.json",), ("Results", "Aims")),
        (("metrics.jsonl",), ("Logit gap by noise level", "Refreshes", "Against the panel")),
        (("grids", "environment.json"), ("Samples", "Samples over training")),
        (("config.yaml", "checkpoints", "evaluations.jsonl"), ("Ages of the heads", "Recall over training")),
    ],
)
def test_what_is_missing_is_left_out(
    student: RunStore, page: Page, missing: tuple[str, ...], gone: tuple[str, ...]
) -> None:
    for name in missing:
        student.delete(name)
    left = page_of(student)
    assert "None" not in left.text
    assert "How it was made" in left.text
    for heading in gone:
        assert re.search(f"<h[23]>{heading}</h", page.source)
        assert not re.search(f"<h[23]>{heading}</h", left.source)


def test_a_damaged_checkpoint_costs_only_the_ages(student: RunStore) -> None:
    name = next(name for name in student.list("checkpoints") if name.endswith("critics-1.safetensors"))
    student.write_bytes(name, student.read_bytes(name)[:-1])
    page = page_of(student)
    assert "Ages of the heads" not in page.text
    assert "Logit gap by noise level" in page.text


def test_a_run_that_goes_on_says_how_far_it_is(student: RunStore) -> None:
    student.delete("results.json")
    text = summary(read_record(student))
    assert "has not finished: its log ends at step 80, in the stage 'panel'" in text
    assert "snapshot, of step 80, lies at a Frechet distance of 9.50" in text


def test_a_teacher_has_a_report_of_its_own(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write_text("config.yaml", "data:\n  source: textures\n")
    write_lines(
        store, "metrics.jsonl", ({"step": s, "loss": 2.0 / s, "learning_rate": 0.1} for s in range(1, 41))
    )
    rows = [
        result("real vs real (floor)", 8.17),
        result("teacher, 1 step", 90.0),
        result("teacher, 25 steps", 8.4),
    ]
    store.write_text("results.json", json.dumps({"rows": rows, "seconds": {"train": 4.0}}))
    page = page_of(store)
    assert "A diffusion teacher of textures" in page.text
    assert (
        "The teacher's images lie at a Frechet distance of 90.0 in one step and 8.40 in 25 steps" in page.text
    )
    first, last = (np.mean([2.0 / s for s in steps]) for steps in (range(1, 5), range(37, 41)))
    assert f"went from {first:.2f} to {last:.3f}" in page.text
    assert not {"Aims", "The panel", "Alarms"} & set(re.findall(r"<h2>(.*?)</h2>", page.source))


def test_a_student_is_named_after_its_teachers_images(tmp_path: Path) -> None:
    teacher, student = (RunStore(tmp_path / name) for name in ("teacher", "student"))
    write_lines(student, "metrics.jsonl", [{"step": 1, "stage": "warmup"}])
    student.write_text("config.yaml", f"teacher: {teacher.uri}\n")
    assert "<h1>A one-step student</h1>" in render(read_record(student))
    teacher.write_text("config.yaml", "data:\n  source: textures\n")
    assert "<h1>A one-step student of textures</h1>" in render(read_record(student))


def test_a_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    write_lines(
        store,
        "metrics.jsonl",
        [{"step": 1, "stage": "heads", "critic_loss": 2.0, "gap": {"group0": gap(0.0)}}],
    )
    assert len(page_of(store).all("svg")) == 3


def test_a_run_without_a_row_is_a_page_too(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write_text("config.yaml", "seed: 0\n")
    assert "has logged nothing yet" in page_of(store).text


def test_a_report_goes_where_the_run_is() -> None:
    store = RunStore("memory://report-test")
    write_lines(store, "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    assert write_report(store) == "memory:///report-test/report.html"
    assert store.read_text(REPORT).startswith("<!DOCTYPE html>")


def test_a_real_run_has_a_whole_report(tiny_run: str) -> None:
    page = Page(RunStore(tiny_run).read_text(REPORT))
    assert not page.open
    assert "<h1>A one-step student of digits</h1>" in page.source
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert [name for name in headings if name in ("Samples", "Results", "Training", "The panel")] == [
        "Samples",
        "Results",
        "Training",
        "The panel",
    ]
    assert {attributes["alt"] for attributes in page.all("img")} >= {
        "Grid of images: Student, 1 step",
        "Grid of images: Teacher, 4 steps",
        "Grid of images: Real images",
    }
    assert "Ages of the heads" in page.text


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run.*config\.yaml"):
        write_report(RunStore(tmp_path / "nothing"))


def test_the_run_may_be_given_bare(student: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(main, ReportConfig, with_run([student.uri]))
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": student.path(REPORT)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["runs/a"], ["run=runs/a"]),
        (["s3://b/c=d"], ["run=s3://b/c=d"]),
        (["run=runs/a"], ["run=runs/a"]),
        (["--run", "runs/a"], ["--run", "runs/a"]),
        (["report.yaml", "run=x"], ["report.yaml", "run=x"]),
        ([], []),
    ],
)
def test_only_a_bare_uri_is_taken_for_the_run(given: list[str], meant: list[str]) -> None:
    assert with_run(given) == meant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0.0, "0.000"),
        (0.0214, "0.021"),
        (9.4, "9.40"),
        (-90.06, "-90.1"),
        (1234.5, "1,234"),
        (1e-5, "1.00e-05"),
        (123456.0, "1.23e+05"),
    ],
)
def test_figures_keep_about_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.14, "4.1 s"), (125, "2 min 5 s"), (3780, "1 h 3 min"), (59.99, "60.0 s")]
)
def test_a_time_is_told_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text
