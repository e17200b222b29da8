"""The student's training: what each stage moves, and that it is the same however it is cut."""

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny import digits, double, pairs, panel, rows_of, unet
from torch import Tensor

from counterpoint.critics.group import Samples
from counterpoint.critics.panel import LocalPanel, PanelVerdict, Pending
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import AdversarialConfig, Distiller, WarmupConfig
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.strategies.learner import Learner
from counterpoint.student import StudentConfig

WARMUP = {"steps": 2, "batch_size": 8, "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2)}
ADVERSARIAL = {"steps": 3, "heads_alone": 2, "batch_size": 8, "adversarial_weight": 0.5}
STAGES = ["warmup", "warmup", "heads", "heads", "panel", "panel", "panel"]
FIRST_OF_PANEL = 4
JOINED = ("fake", "real", "labels")


def distiller(
    critics: Any = None,
    place: Place | None = None,
    accumulate: int = 1,
    dropout: float = 0.0,
    warmup: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Distiller:
    return Distiller(
        unet(seed=1, dropout=dropout).to(dtype),
        build_noise_scheduler(NoiseConfig()),
        pairs(dtype=dtype),
        digits(),
        critics,
        StudentConfig(),
        WarmupConfig(**WARMUP | (warmup or {})),
        AdversarialConfig(**ADVERSARIAL | options),
        seed=5,
        place=place or Place(),
        accumulate=accumulate,
    )


@dataclass
class Listening:
    """A panel that writes down what it was asked and how its heads were when it had answered."""

    panel: LocalPanel
    asked: list[tuple[Samples, Tensor]] = field(default_factory=list)
    digests_after: list[dict[str, str]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.panel, name)

    def ask(self, samples: Samples, groups: Tensor) -> Pending:
        answer = self.panel.ask(samples, groups)
        self.asked.append((samples, groups))
        self.digests_after.append(self.panel.digests())
        return answer


def weights(student: Distiller) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in student.unet.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def gradient(monkeypatch: pytest.MonkeyPatch, student: Distiller, step: int) -> dict[str, Tensor]:
    """The gradients that one step hands to the optimizer."""
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
        student.step(step)
    return {name: p.grad.clone() for name, p in student.unet.named_parameters() if p.grad is not None}


def test_each_stage_moves_what_it_should() -> None:
    critics = panel(levels_per_step=4)
    student = distiller(critics)
    assert student.total_steps == len(STAGES)
    assert [student.stage(step) for step in range(7)] == STAGES
    for step, stage in enumerate(STAGES):
        before, heads = weights(student), critics.digests()
        figures = student.step(step)
        assert figures["stage"] == stage
        assert (critics.digests() != heads) is (stage != "warmup")
        assert moved(before, weights(student)) is (stage != "heads" or step == 2)
        assert ("learning_rate" in figures) is (stage != "heads")
        assert ("gap" in figures) is (stage != "warmup")
        assert ("verdict_gradient_norm" in figures) is (stage == "panel")


def test_the_student_leaves_the_warm_up_with_its_average_and_a_fresh_optimizer() -> None:
    student = distiller(panel())
    for step in range(2):
        student.step(step)
    average = student.weights()
    assert moved(average, weights(student))
    student.step(2)
    assert not moved(average, weights(student))
    assert not student.learner.optimizer.state
    assert student.learner.config == student.adversarial.optimizer


def test_heads_are_bit_equal_across_the_students_step() -> None:
    critics = Listening(panel(levels_per_step=4))
    student = distiller(critics)
    for step in range(7):
        before = weights(student)
        student.step(step)
        if STAGES[step] == "panel":
            assert moved(before, weights(student))
            assert critics.digests() == critics.digests_after[-1]


@pytest.mark.parametrize("options", [{}, {"order": "student_first", "levels_per_step": 2, "critic_steps": 2}])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit_wherever_it_was_cut(options: dict[str, Any]) -> None:
    def make() -> Distiller:
        return distiller(panel(refresh_rate=0.05, **options), dropout=0.1)

    unbroken, states, figures = make(), [], []
    for step in range(7):
        states.append(unbroken.state())
        figures.append(unbroken.step(step))
    states.append(unbroken.state())
    for cut in range(7):
        # Cut anywhere, two steps lead to the state that was stored there, hence all further ones to the end.
        end, resumed = min(cut + 2, 7), make()
        resumed.load(states[cut], cut)
        torch.rand(3)
        assert str([resumed.step(step) for step in range(cut, end)]) == str(figures[cut:end])
        for name, part in resumed.state().items():
            assert all(torch.equal(x, states[end][name][key]) for key, x in part.items()), (cut, name)


def test_the_panel_is_told_which_of_its_own_steps_comes_next() -> None:
    told: list[int] = []

    class Hosted(Listening):
        def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
            told.append(step)

    student = distiller(Hosted(panel()))
    for step in range(7):
        student.load(student.state(), step)
    assert told == [0, 0, 0, 1, 2, 3, 4]


def test_a_running_trainer_can_go_back() -> None:
    student = distiller(panel(refresh_rate=0.05))
    student.step(0)
    state = student.state()
    first = [str(student.step(step)) for step in range(1, 7)]
    student.load(state, 1)
    assert [str(student.step(step)) for step in range(1, 7)] == first


@pytest.mark.parametrize("step", [1, FIRST_OF_PANEL])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_the_large_batchs_for_student_and_heads(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, step: int
) -> None:
    panels = [precise(order="student_first", levels_per_step=2) for _ in range(2)]
    whole, parts = (
        distiller(critics, accumulate=n, dtype=torch.float64, real="teacher")
        for critics, n in zip(panels, (1, accumulate), strict=True)
    )
    before = heads(panels[0])
    torch.testing.assert_close(gradient(monkeypatch, parts, step), gradient(monkeypatch, whole, step))
    torch.testing.assert_close(heads(panels[1]), heads(panels[0]))
    assert torch.equal(heads(panels[0]), before) is (step < FIRST_OF_PANEL)


def heads(critics: LocalPanel) -> Tensor:
    return torch.cat([rows_of(group) for group in critics.groups])


def precise(**options: Any) -> LocalPanel:
    """A panel in double precision, for students that are; teachers' samples are then the real ones."""
    critics = panel(**options)
    for group in critics.groups:
        double(group)
    return critics


class Shared:
    """One panel asked by two ranks: it judges when both have spoken, as a host of critics does."""

    def __init__(self, panel: LocalPanel) -> None:
        self.panel, self.pool = panel, panel.pool
        self.said: dict[int, tuple[Samples, Tensor]] = {}
        self.barrier = threading.Barrier(2, timeout=240)
        self.verdict: PanelVerdict | None = None

    def of_rank(self, rank: int) -> Any:
        return RankPanel(self, rank)

    def judge(self, rank: int, samples: Samples, groups: Tensor) -> PanelVerdict:
        self.said[rank] = samples, groups
        if self.barrier.wait() == 0:
            both = [self.said[r] for r in (0, 1)]
            fake, real, labels = (torch.cat([getattr(s, name) for s, _ in both]) for name in JOINED)
            whole = replace(both[0][0], fake=fake, real=real, labels=labels)
            self.verdict = self.panel.ask(whole, torch.cat([g for _, g in both])).result()
        self.barrier.wait()
        assert self.verdict is not None
        if self.verdict.gradient is None:
            return self.verdict
        # The mean over both ranks' samples, told to each as a mean over its own.
        return replace(self.verdict, gradient=2 * self.verdict.gradient.chunk(2)[rank])


@dataclass
class RankPanel:
    shared: Shared
    rank: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared.panel, name)

    def ask(self, samples: Samples, groups: Tensor) -> Any:
        verdict = self.shared.judge(self.rank, samples, groups)

        class Answered:
            def result(self) -> PanelVerdict:
                return verdict

        return Answered()


@pytest.mark.parametrize(("accumulate", "order"), [(1, "critics_first"), (2, "student_first")])
def test_ranks_average_to_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, order: str
) -> None:
    options: dict[str, Any] = {"order": order, "levels_per_step": 2}
    single, shared = precise(**options), Shared(precise(**options))
    precision: dict[str, Any] = {"dtype": torch.float64, "real": "teacher"}
    alone = distiller(single, **precision)
    ranks = [distiller(shared.of_rank(r), Place(r, 2), accumulate, **precision) for r in range(2)]
    monkeypatch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
    alone.step(FIRST_OF_PANEL)
    threads = [threading.Thread(target=rank.step, args=(FIRST_OF_PANEL,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p, one, other in zip(*(student.unet.parameters() for student in (alone, *ranks)), strict=True):
        torch.testing.assert_close((one.grad + other.grad) / 2, p.grad)
    torch.testing.assert_close(heads(shared.panel), heads(single))


@pytest.mark.parametrize("regression_weight", [0.0, 0.7])
@pytest.mark.parametrize(
    "name", ["conv_out.weight", "mid_block.resnets.0.conv1.weight", "class_embedding.weight"]
)
def test_the_students_gradient_is_the_finite_difference(
    monkeypatch: pytest.MonkeyPatch, name: str, regression_weight: float
) -> None:
    """Of regression_weight x regression + adversarial_weight x the panel's loss, in one parameter."""
    critics = precise(order="student_first", levels_per_step=2, loss="softplus", refresh_rate=0.0)
    student = distiller(critics, dtype=torch.float64, real="teacher", regression_weight=regression_weight)
    start = critics.state()
    found = gradient(monkeypatch, student, FIRST_OF_PANEL)[name]
    index = int(found.abs().argmax())
    weight = dict(student.unet.named_parameters())[name].data.view(-1)
    losses = []
    monkeypatch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
    for h in (1e-4, -2e-4):
        critics.load(start, 0)
        weight[index] += h
        figures = student.step(FIRST_OF_PANEL)
        losses.append(regression_weight * figures["regression_loss"] + 0.5 * figures["adversarial_loss"])
    estimate = (losses[0] - losses[1]) / 2e-4
    assert abs(estimate) > 1e-6
    assert float(found.view(-1)[index]) == pytest.approx(estimate, rel=1e-4)


def test_without_weight_the_panel_is_never_asked() -> None:
    class Deaf:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the panel was asked for {name}")

    student = distiller(Deaf(), adversarial_weight=0.0)
    assert student.total_steps == 5
    assert [student.step(step)["stage"] for step in range(5)] == ["warmup"] * 2 + ["panel"] * 3
    assert sorted(student.state()) == ["optimizer", "unet"]


def test_a_continued_warm_up_regresses_at_its_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    student = distiller(adversarial_weight=0.0, regression_weight=0.25)
    steps: list[int] = []

    def note(_self: Learner, step: int) -> tuple[float, float]:
        steps.append(step)
        return 0.0, 0.0

    monkeypatch.setattr(Learner, "step", note)
    for step in range(5):
        student.step(step)
    assert steps == [0, 1, 0, 1, 2]


def test_critics_may_take_several_steps_per_step_of_the_student() -> None:
    critics = Listening(panel(critic_steps=3, levels_per_step=4, refresh_rate=0.0))
    student = distiller(critics, steps=7, heads_alone=1)
    moves, learned = [], []
    for step in range(10):
        before, rows = weights(student), [rows_of(group) for group in critics.groups]
        figures = student.step(step)
        if student.stage(step) == "panel":
            moves.append(moved(before, weights(student)))
            learned.append(
                all(not torch.equal(a, rows_of(g)) for a, g in zip(rows, critics.groups, strict=True))
            )
            assert ("gradient_norm" in figures) is moves[-1]
    assert moves == [False, False, True, False, False, True, False]
    assert learned == [True] * 7
    assert [s.judge for s, _ in critics.asked] == [False, *moves]
    assert not any(s.fake.requires_grad for s, _ in critics.asked)


@pytest.mark.parametrize("real", ["data", "teacher"])
def test_heads_compare_with_data_of_the_class_or_with_the_teachers_sample(real: str) -> None:
    critics = Listening(panel())
    student = distiller(critics, real=real)
    for step in range(7):
        student.step(step)
    images, ends = digits(), {tuple(x.flatten().tolist()): i for i, x in enumerate(pairs().samples)}
    classes = {tuple(x.flatten().tolist()): int(c) for x, c in zip(images.images, images.labels, strict=True)}
    seen = set()
    for samples, _ in critics.asked:
        for x, label in zip(samples.real, samples.labels, strict=True):
            key = tuple(x.flatten().tolist())
            seen.add(key)
            assert classes[key] == label
            if real == "teacher":
                assert pairs().labels[ends[key]] == label
    assert any(key not in ends for key in seen) is (real == "data")


def test_samples_go_to_the_groups_of_their_place_in_the_step() -> None:
    critics = Listening(panel(order="student_first", levels_per_step=2))
    student = distiller(critics, accumulate=2)
    for step in range(7):
        student.step(step)
    assert [(s.step, s.micro, s.micros) for s, _ in critics.asked] == [
        (k, m, 2) for k in range(5) for m in (0, 1)
    ]
    for step in range(5):
        groups = torch.cat([groups for samples, groups in critics.asked if samples.step == step])
        assert torch.equal(groups, critics.pool.assign_groups(step, 8))


def test_figures_are_means_over_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "step", lambda self, step: (0.0, 0.0))
    rows = [
        distiller(panel(order="student_first", levels_per_step=2), accumulate=n).step(FIRST_OF_PANEL)
        for n in (1, 4)
    ]
    for name in ("regression_loss", "adversarial_loss", "critic_loss"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4)
    assert rows[0]["voting"] == rows[1]["voting"] == 2 * 15
    assert rows[0]["refreshed"] == rows[1]["refreshed"]
    assert sorted(rows[0]["gap"]) == sorted(rows[1]["gap"])
    assert all(len(gap) == 3 for gap in rows[0]["gap"].values())


@pytest.mark.parametrize(
    ("critics", "options", "message"),
    [
        (None, {}, "there is no panel: give one, or set it to 0"),
        ({}, {"batch_size": 9, "accumulate": 2}, "batch_size=9 cannot be shared out"),
        ({"levels_per_step": 4}, {"accumulate": 4}, "levels_per_step=4 does not divide the 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    critics: dict[str, Any] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distiller(None if critics is None else panel(**critics), **options)


def test_a_class_without_images_is_refused_where_heads_want_data() -> None:
    few = digits().subset(torch.nonzero(digits().labels != 3).flatten())
    args = (
        unet(),
        build_noise_scheduler(NoiseConfig()),
        pairs(),
        few,
        panel(),
        StudentConfig(),
        WarmupConfig(),
    )
    with pytest.raises(ValueError, match=r"no image of classes \[3\]: set adversarial.real=teacher"):
        Distiller(*args, AdversarialConfig(), seed=0)
    Distiller(*args, AdversarialConfig(real="teacher"), seed=0)
