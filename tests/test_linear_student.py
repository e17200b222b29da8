"""Conversion to linear attention: what is copied, what the teacher teaches, and the job end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, SIDE, digits, unet
from tiny_jobs import HERE, train_config
from torch.nn import functional as F

from cluster.storage import RunStore
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler, draw_noisy_batch, noisy_input
from counterpoint.dit import DiT, DiTConfig, build_dit
from counterpoint.learned_variance import denoising_loss
from counterpoint.linear_student import LinearStudentConfig, LinearStudentTrainer, linearize
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.seeds import generator
from jobs import evaluate, train
from jobs import linearize as job
from jobs.linearize import LinearizeConfig
from jobs.runs import final_weights, read_results

SHAPE: dict[str, Any] = {
    "patch_size": 2, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 4,
    "learned_variance": True,
}  # fmt: skip
NOISE = build_noise_scheduler(NoiseConfig())
ATTENTION = {f"to_{part}.{kind}" for part in ("q", "k", "v", "out.0") for kind in ("weight", "bias")}
CONVOLUTION = {"local.weight", "local.bias"}


def teacher(**options: Any) -> DiT:
    """A small transformer whose every weight does something."""
    network = build_dit(DiTConfig(**SHAPE | options), 1, SIDE, CLASSES, seed=7)
    for index, parameter in enumerate(network.parameters()):
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, "shake", index)))
    return network


def trainer(distil: str, source: DiT | None = None, **options: Any) -> LinearStudentTrainer:
    config = LinearStudentConfig(**{"distil": distil, "steps": 6, "batch_size": 8} | options)
    source = source or teacher()
    student = linearize(source, 2, 3, seed=1).student
    return LinearStudentTrainer(student, source, NOISE, digits(), config, seed=0)


def of_attention(names: tuple[str, ...]) -> set[str]:
    return {name.partition(".attn1.")[2] for name in names if ".attn1." in name}


def test_all_but_the_attention_is_inherited() -> None:
    source = teacher()
    made = linearize(source, heads=2, kernel_size=3, seed=1)
    theirs = dict(source.named_parameters())
    ours = dict(made.student.named_parameters())
    assert set(made.copied) | set(made.fresh) == set(ours)
    assert set(made.copied) == {name for name in theirs if ".attn1." not in name}
    assert of_attention(made.fresh) == ATTENTION | CONVOLUTION
    assert len(made.fresh) == 2 * len(ATTENTION | CONVOLUTION)
    assert all(torch.equal(ours[name], theirs[name]) for name in made.copied)
    assert not any(torch.equal(ours[n], theirs[n]) for n in made.fresh if n in theirs and "weight" in n)
    changed = {"attention": "linear", "linear_heads": 2, "kernel_size": 3}
    assert dict(made.student.config) == dict(source.config) | changed
    ours[made.copied[0]].data.add_(1.0)
    assert not torch.equal(ours[made.copied[0]], theirs[made.copied[0]])


def test_other_inheritances() -> None:
    source = teacher()
    everything = linearize(source, 2, 3, "everything", seed=1)
    assert of_attention(everything.fresh) == CONVOLUTION
    assert of_attention(everything.copied) == ATTENTION
    assert linearize(source, 2, 3, "nothing", seed=1).copied == ()
    same = linearize(source, inherit="everything", attention="softmax", seed=1)
    assert same.fresh == ()
    x, labels = torch.randn(2, 1, SIDE, SIDE), torch.tensor([0, 10])
    found, expected = (n.eval()(x, 9, class_labels=labels).sample for n in (same.student, source))
    assert torch.equal(found, expected)


def test_only_softmax_transformers_are_converted() -> None:
    for wrong in (unet(), teacher(attention="linear")):
        with pytest.raises(ValueError, match="without softmax attention to convert"):
            linearize(wrong)
    with pytest.raises(ValueError, match="heads=3 does not divide"):
        linearize(teacher(), heads=3)
    with pytest.raises(ValueError, match="distil=noise, or a teacher"):
        trainer("hybrid", teacher(learned_variance=False))
    assert trainer("noise", teacher(learned_variance=False)).step(0)["loss"] > 0


def test_the_hybrid_loss_adds_the_teachers_prediction_and_variance() -> None:
    images = digits()
    batch = draw_noisy_batch(images.images, images.labels, 8, 1000, CLASSES, 0.5, generator(0, "batch"))
    x_t, heard = noisy_input(NOISE, batch.images, batch.noise, batch.timesteps)
    source = teacher()
    losses = {}
    for distil in ("none", "noise", "hybrid"):
        made = trainer(distil, source)
        losses[distil] = made.loss(batch)
    told, said = (
        network(x_t, heard, class_labels=batch.labels) for network in (source, made.learner.network)
    )
    plain = denoising_loss(made.learner.network, NOISE, batch)
    prediction = (told.sample - said.sample).square().sum() / told.sample.numel()
    variance = (told.variance - said.variance).square().sum() / told.variance.numel()
    torch.testing.assert_close(losses["none"], plain)
    torch.testing.assert_close(losses["noise"], plain + 0.5 * prediction)
    torch.testing.assert_close(losses["hybrid"], plain + 0.5 * prediction + 0.05 * variance)
    losses["hybrid"].backward()
    assert all(parameter.grad is None for parameter in source.parameters())
    assert not source.training
    assert all(p.grad is not None for p in made.unet.parameters())


def test_the_student_comes_nearer_to_its_teacher() -> None:
    """Even where the data says otherwise: the teacher was never trained."""
    source = teacher()
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.5}
    made = trainer("noise", source, steps=40, batch_size=16, optimizer=optimizer)
    plain = trainer("none", source, steps=40, batch_size=16, optimizer=optimizer)
    x, labels = torch.randn(32, 1, SIDE, SIDE, generator=generator(0, "x")), torch.arange(32) % CLASSES
    for step in range(40):
        made.step(step)
        plain.step(step)
    with torch.no_grad():
        told = source(x, 500, class_labels=labels).sample
        near, far = (
            F.mse_loss(one.unet.eval()(x, 500, class_labels=labels).sample, told) for one in (made, plain)
        )
    assert near < far


def test_a_resumed_training_is_the_unbroken_one() -> None:
    unbroken, resumed = trainer("hybrid"), trainer("hybrid")
    unbroken.step(0)
    state = unbroken.state()
    resumed.load(state, 1)
    assert [resumed.step(step) for step in (1, 2)] == [unbroken.step(step) for step in (1, 2)]
    assert not any("teacher" in name for part in state.values() for name in part)


@pytest.fixture(scope="module")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of jobs.train with a diffusion transformer."""
    run = tmp_path_factory.mktemp("dit") / "teacher"
    train.main(train_config(run, dit=SHAPE, steps=[2]))
    return str(run)


def linear_config(run: Path, source: str, **options: Any) -> LinearizeConfig:
    base: dict[str, Any] = {
        "run": str(run), "teacher": source, "steps": [2], "evaluation": {"workers": 0, "samples": 80},
        "student": {"steps": 7, "batch_size": 16, "heads": 2, "kernel_size": 3}, **HERE,
    }  # fmt: skip
    return LinearizeConfig.model_validate(base | options)


def test_the_job_leaves_a_pipeline_and_figures_and_says_what_was_copied(
    tiny_dit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = job.main(linear_config(tmp_path / "whole", tiny_dit))
    store = RunStore(str(tmp_path / "whole"))
    results = read_results(store)
    assert set(results["headline"]) == {"floor_fd", "fd_2", "accuracy_2"}
    assert of_attention(tuple(results["conversion"]["fresh"])) == ATTENTION | CONVOLUTION
    pipeline = ClassConditionalPipeline.from_pretrained(f"{store.uri}/pipeline", low_cpu_mem_usage=False)
    assert pipeline.unet.config.attention == "linear"
    weights = final_weights(store)
    assert all(torch.equal(p, weights[name]) for name, p in pipeline.unet.named_parameters())
    assert "A linear diffusion transformer" in store.read_text("report.html")
    scored = evaluate.main(
        evaluate.EvaluateConfig.model_validate(
            {"run": store.uri, "steps": [2], "evaluation": {"workers": 0, "samples": 80}}
        )
    )
    assert scored["fd_2"] == pytest.approx(told["fd_2"], rel=1e-4)

    # Broken off and taken up again, it is the same run.
    step = LinearStudentTrainer.step

    def failing(self: LinearStudentTrainer, now: int) -> dict[str, Any]:
        if now == 6:
            raise RuntimeError("the machine fell over")
        return step(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(LinearStudentTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="fell over"):
            job.main(linear_config(tmp_path / "broken", tiny_dit))
    again = job.main(linear_config(tmp_path / "broken", tiny_dit, resume=True))
    assert again["fd_2"] == told["fd_2"]


def test_the_job_refuses_before_there_is_a_run(tiny_dit: str, tiny_teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a UNet2DModel without softmax"):
        job.main(linear_config(tmp_path / "run", tiny_teacher))
    with pytest.raises(ValueError, match="is not a run"):
        job.main(linear_config(tmp_path / "run", str(tmp_path)))
    assert not (tmp_path / "run").exists()
