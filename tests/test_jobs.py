"""The jobs end to end in one process: what they store and refuse, and that a resumed run is the same run."""

import json
import logging
import os
import signal

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from tiny_jobs import CRITICS, distill_config, train_config

from cluster.checkpoints import checkpoint_steps, latest_checkpoint
from cluster.metrics_log import MetricsLog
from cluster.storage import RunStore
from counterpoint.distillation import Distiller
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.teacher import TeacherTrainer
from jobs import distill, evaluate, launch, sample, train
from jobs.config import ConfigError, parse_config
from jobs.evaluate import EvaluateConfig
from jobs.runs import read_config, read_results
from jobs.sample import SampleConfig
from jobs.settings import DistillConfig, TrainConfig

FIGURES = {"fd", "kid", "precision", "recall", "accuracy", "train_fd"}
TEACHER_STEPS, STUDENT_STEPS = 12, 17


def checkpoint(uri):
    """Every tensor of the newest checkpoint of a run, by file and name."""
    newest = latest_checkpoint(RunStore(uri))
    return {
        f"{f}/{key}": value for f in newest.files for key, value in newest.tensors(f).items()
    }, newest.step


def assert_same_end(uri, expected):
    """The two runs ended on the same step with bit-equal weights, averages, moments, heads and clocks."""
    (found, step), (wanted, last) = checkpoint(uri), checkpoint(expected)
    assert step == last
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def logged_steps(uri):
    return [row["step"] for row in MetricsLog(RunStore(uri), tensorboard=False).read()]


@pytest.fixture
def interrupt_at(monkeypatch):
    """Send this process the terminal's Ctrl-C once the loop has shown a step."""
    watch = launch.Shown.watch

    def arrange(step):
        def watched(self, figures):
            watch(self, figures)
            if figures.get("step") == step and figures.get("stage") != "pairs":
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(launch.Shown, "watch", watched)

    return arrange


@pytest.fixture
def crash_at(monkeypatch):
    """Let a trainer's class raise when it should take a step; None lets it work again."""

    def arrange(trainer, step):
        works = getattr(trainer.step, "works", trainer.step)

        def failing(self, now):
            if now == step:
                raise RuntimeError("the machine fell over")
            return works(self, now)

        failing.works = works
        monkeypatch.setattr(trainer, "step", failing)

    return arrange


def flip_a_byte(uri, step, name):
    store = RunStore(uri)
    folder = f"checkpoints/step-{step:08d}"
    entry = json.loads(store.read_text(f"{folder}/manifest.json"))["files"][name]
    content = bytearray(store.read_bytes(f"{folder}/{entry['file']}"))
    content[-1] ^= 1
    store.write_bytes(f"{folder}/{entry['file']}", bytes(content))


def test_teacher_leaves_everything_that_later_jobs_need(tiny_teacher):
    store = RunStore(tiny_teacher)
    results = read_results(store)
    assert set(results["headline"]) >= {"floor_fd", "teacher_1_fd", "teacher_4_fd"}
    assert [row["name"] for row in results["rows"]] == [
        "real vs real (floor)",
        "teacher, 1 step",
        "teacher, 4 steps",
    ]
    for row in results["rows"][1:]:
        assert set(row) >= FIGURES
        assert row["samples"] == 80
        assert all(np.isfinite(row[name]) for name in FIGURES)
    assert results["headline"]["teacher_4_fd"] == results["rows"][2]["fd"]
    names = set(store.list())
    assert names >= {
        "config.yaml", "environment.json", "metrics.jsonl", "results.json",
        "features/classifier.safetensors", "grids/real.png", "grids/teacher-4-steps.png",
    }  # fmt: skip
    assert any(name.startswith("tensorboard/") for name in names)
    assert logged_steps(tiny_teacher) == list(range(1, TEACHER_STEPS + 1))
    assert read_config(store, TrainConfig) == train_config(tiny_teacher)


def test_student_leaves_results_grids_and_a_report(tiny_run):
    store = RunStore(tiny_run)
    results = read_results(store)
    assert set(results["headline"]) >= {
        "floor_fd", "teacher_1_fd", "teacher_4_fd", "student_1_fd", "student_2_fd", "student_4_fd",
        "student_1_train_fd", "student_2_train_fd", "student_4_train_fd", "student_1_accuracy",
        "student_1_recall",
    }  # fmt: skip
    by_name = {row["name"]: row for row in results["rows"]}
    assert list(by_name)[3:] == ["student, 1 step", "student, 2 steps", "student, 4 steps"]
    assert results["headline"]["student_1_recall"] == by_name["student, 1 step"]["recall"]
    assert results["headline"]["student_2_fd"] == by_name["student, 2 steps"]["fd"]
    assert results["headline"]["student_4_train_fd"] == by_name["student, 4 steps"]["train_fd"]
    pool = results["pool"]
    assert pool["heads"] == pool["slots"] * pool["heads_per_slot"] * len(pool["groups"])
    for grid in ("student-1-step", "student-2-steps", "student-4-steps", "teacher-4-steps", "real"):
        assert store.exists(f"grids/{grid}.png")
    report = store.read_text("report.html")
    assert "student, 4 steps" in report
    assert "student-1-step" in report or "data:image/png" in report
    rows = MetricsLog(store, tensorboard=False).read()
    assert [row["stage"] for row in rows] == ["warmup"] * 6 + ["heads"] * 3 + ["panel"] * 8
    assert all(np.isfinite(row["adversarial_loss"]) for row in rows[9:])


def test_diffusers_loads_teacher_and_student(tiny_teacher, tiny_run):
    for uri, steps in ((tiny_teacher, 4), (tiny_run, 1)):
        pipeline = ClassConditionalPipeline.from_pretrained(f"{uri}/pipeline", low_cpu_mem_usage=False)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline([0, 9], steps, output_type="pt").images
        assert images.shape == (2, 1, 8, 8)
        assert images.abs().max() <= 1
        alone = UNet2DModel.from_pretrained(f"{uri}/pipeline/unet", low_cpu_mem_usage=False)
        weights = latest_checkpoint(RunStore(uri)).tensors("weights")
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    assert isinstance(pipeline.scheduler, TimestepShiftScheduler)


def test_evaluate_finds_the_figures_of_the_run_itself(tiny_run, tiny_teacher, capsys):
    for uri, steps, row in ((tiny_run, 2, "student, 2 steps"), (tiny_teacher, 4, "teacher, 4 steps")):
        options = {"run": uri, "steps": [steps], "evaluation": {"workers": 0, "samples": 80}}
        found = evaluate.main(EvaluateConfig.model_validate(options))
        (expected,) = (line for line in read_results(RunStore(uri))["rows"] if line["name"] == row)
        for name in ("fd", "kid", "precision", "recall", "accuracy"):
            assert found[f"{name}_{steps}"] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert "real vs real (floor)" in capsys.readouterr().err


def drawn(run, out, **options):
    sample.main(SampleConfig.model_validate({"run": run, "out": str(out), "per_class": 3} | options))
    return np.load(out) if out.suffix == ".npz" else out.read_bytes()


def test_sample_depends_on_seed_class_and_number_alone(tiny_run, tmp_path):
    every = drawn(tiny_run, tmp_path / "a.npz", seed=7)
    assert every["images"].shape == (30, 1, 8, 8)
    assert every["labels"].tolist() == [label for label in range(10) for _ in range(3)]
    some = drawn(tiny_run, tmp_path / "b.npz", seed=7, classes=[4, 2], per_class=2)
    assert some["labels"].tolist() == [4, 4, 2, 2]
    np.testing.assert_allclose(some["images"], every["images"][[12, 13, 6, 7]], atol=1e-5)
    other = drawn(tiny_run, tmp_path / "c.npz", seed=8)
    assert np.abs(other["images"] - every["images"]).max() > 0.1
    further = drawn(tiny_run, tmp_path / "d.npz", seed=7, steps=4)
    assert np.abs(further["images"] - every["images"]).max() > 1e-3


def test_sample_draws_the_same_png_again(tiny_run, tmp_path):
    first, second = (drawn(tiny_run, tmp_path / name, classes=[1, 8]) for name in ("a.png", "b.png"))
    assert first == second
    width, height = Image.open(tmp_path / "a.png").size
    assert (width, height) == (3 * 40 + 2 * 2, 2 * 40 + 2)
    assert drawn(tiny_run, tmp_path / "c.png", classes=[1, 8], seed=1) != first


def test_sample_refuses_what_it_cannot_make(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        drawn(tiny_run, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="must be classes from 0 to 9"):
        drawn(tiny_run, tmp_path / "a.png", classes=[11])
    with pytest.raises(ValueError, match="no saved pipeline"):
        drawn(str(tmp_path), tmp_path / "a.png")


def test_used_run_is_refused_without_resume(tiny_teacher, tiny_run):
    with pytest.raises(ValueError, match="add resume=true"):
        train.main(train_config(tiny_teacher))
    with pytest.raises(ValueError, match="add resume=true"):
        distill.main(distill_config(tiny_run, tiny_teacher))


def test_resumed_run_must_compute_the_same(tiny_teacher, tiny_run):
    stored = RunStore(tiny_run).read_text("config.yaml")
    refused = [
        ("seed=1", train.main, train_config(tiny_teacher, resume=True, seed=1)),
        ("seed=4", distill.main, distill_config(tiny_run, tiny_teacher, resume=True, seed=4)),
        (
            "critics.refresh_rate=0.5",
            distill.main,
            distill_config(
                tiny_run, tiny_teacher, resume=True, critics=CRITICS | {"actors": 0, "refresh_rate": 0.5}
            ),
        ),
    ]
    for words, main, config in refused:
        with pytest.raises(ValueError, match=words) as caught:
            main(config)
        assert "was made with" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert RunStore(tiny_run).read_text("config.yaml") == stored


def test_unfinished_or_missing_runs_are_named(tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        distill.main(distill_config(tmp_path / "student", str(tmp_path / "absent")))
    RunStore(str(tmp_path / "begun")).write_text(
        "config.yaml", RunStore(tiny_teacher).read_text("config.yaml")
    )
    with pytest.raises(ValueError, match="has not finished"):
        distill.main(distill_config(tmp_path / "student", str(tmp_path / "begun")))
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["critics.actors=0", "trainer.workers=2"], "set critics.actors to 1 or more"),
        (["critics.actors=4", "trainer.workers=0"], "needs Ray, which trainer.workers=0 does without"),
        (["critics.order=critics_first", "trainer.accumulate=2"], "set critics.order=student_first"),
        (["critics.actors=5"], "exceeds the 4 critic groups"),
    ],
)
def test_settings_at_odds_are_refused_in_one_line(arguments, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(DistillConfig, arguments)
    assert "\n" not in str(caught.value)


def test_memory_is_refused_where_workers_could_not_see_it():
    trainer = {"workers": 1}
    with pytest.raises(ValueError, match="lives in one process's memory"):
        train.main(train_config("memory://refused/teacher", trainer=trainer))
    assert not RunStore("memory://refused/teacher").exists("config.yaml")


def test_runs_in_memory_are_the_runs_on_disk(tiny_teacher, tiny_run, tmp_path):
    teacher, student = "memory://jobs/teacher", "memory://jobs/student"
    train.main(train_config(teacher))
    assert_same_end(teacher, tiny_teacher)
    told = distill.main(distill_config(student, teacher))
    assert_same_end(student, tiny_run)
    assert told["report"] == "memory:///jobs/student/report.html"
    assert RunStore(student).exists("report.html")
    expected = read_results(RunStore(tiny_run))["headline"]
    assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert drawn(student, tmp_path / "a.png") == drawn(tiny_run, tmp_path / "b.png")


def test_stopped_teacher_goes_on_as_if_nothing_had_happened(tiny_teacher, tmp_path, interrupt_at):
    run = str(tmp_path / "run")
    interrupt_at(7)
    told = train.main(train_config(run))
    assert told == {"run": run, "stopped_at_step": 7, "go_on_with": "resume=true"}
    assert checkpoint(run)[1] == 7
    assert not RunStore(run).exists("results.json")
    interrupt_at(None)
    assert "teacher_4_fd" in train.main(train_config(run, resume=True))
    assert_same_end(run, tiny_teacher)
    assert logged_steps(run) == list(range(1, TEACHER_STEPS + 1))
    assert read_results(RunStore(run))["headline"] == read_results(RunStore(tiny_teacher))["headline"]


def test_a_crash_before_the_first_checkpoint_and_a_damaged_newest_one_cost_only_steps(
    tiny_teacher, tmp_path, crash_at, caplog
):
    run = str(tmp_path / "run")
    crash_at(TeacherTrainer, 2)
    with pytest.raises(RuntimeError, match="fell over"):
        train.main(train_config(run))
    crash_at(TeacherTrainer, 11)
    with pytest.raises(RuntimeError, match="fell over"):
        train.main(train_config(run, resume=True))
    assert logged_steps(run) == list(range(1, 12))
    assert checkpoint_steps(RunStore(run))[-2:] == [5, 10]
    flip_a_byte(run, 10, "optimizer")
    crash_at(TeacherTrainer, None)
    with caplog.at_level(logging.WARNING):
        train.main(train_config(run, resume=True))
    assert "does not match its checksum" in caplog.text
    assert_same_end(run, tiny_teacher)
    assert logged_steps(run) == list(range(1, TEACHER_STEPS + 1))


def test_student_stopped_in_every_stage_and_crashed_is_the_undisturbed_one(
    tiny_teacher, tiny_run, tmp_path, interrupt_at, crash_at, monkeypatch
):
    run = str(tmp_path / "run")
    for life, step in enumerate((3, 6, 8, 9, 11)):  # within each stage, and on both borders
        interrupt_at(step)
        told = distill.main(distill_config(run, tiny_teacher, resume=life > 0))
        assert told["stopped_at_step"] == step
    interrupt_at(None)
    crash_at(Distiller, 16)
    with pytest.raises(RuntimeError, match="fell over"):
        distill.main(distill_config(run, tiny_teacher, resume=True))
    assert checkpoint_steps(RunStore(run)) == [11, 15]
    flip_a_byte(run, 15, "critics-2")
    crash_at(Distiller, None)
    told = distill.main(distill_config(run, tiny_teacher, resume=True))
    assert_same_end(run, tiny_run)
    assert logged_steps(run) == list(range(1, STUDENT_STEPS + 1))
    expected = read_results(RunStore(tiny_run))["headline"]
    assert {name: told[name] for name in expected} == expected
