"""Numbers that change over training: their course, what is refused, and that runs replay them exactly."""

import itertools
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from tiny import digits, pairs, panel, pool, samples, unet
from tiny_jobs import CRITICS
from torch import Tensor, nn

from cluster.storage import RunStore
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.panel import LocalPanel
from counterpoint.critics.pool import Pool
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import Distiller
from counterpoint.optimization import OptimizerConfig
from counterpoint.schedules import (
    Scheduled,
    bounds,
    extremes,
    is_constant,
    mean_of,
    progress_at,
    read_scheduled,
    value_at,
)
from counterpoint.section import Section
from counterpoint.strategies.whole import WholeLearner
from counterpoint.student import StudentConfig
from jobs.config import dump_config, parse_config
from jobs.config_errors import ConfigError
from jobs.progress import progress_of, schedules_in
from jobs.report_panel_charts import expected_refreshes, refreshes
from jobs.report_record import read_record
from jobs.report_schedules import schedule_charts, scheduled_points
from jobs.runs import open_run
from jobs.settings import DistillConfig, TrainConfig
from jobs.train_policy import PolicyTrainConfig

STEPS = 40


def linear(start: float, end: float, **span: float) -> dict[str, Any]:
    return {"kind": "linear", "start": start, "end": end, **span}


def switched(at: float, before: Any, after: Any) -> dict[str, Any]:
    return {"kind": "piecewise", "pieces": [{"at": 0.0, "value": before}, {"at": at, "value": after}]}


def course(schedule: Any, steps: int = STEPS) -> list[float]:
    return [value_at(read_scheduled(schedule), progress_at(step, steps)) for step in range(steps + 1)]


class Held(Section):
    """A field with a range."""

    rate: Annotated[Scheduled, bounds(ge=0.0, le=1.0)] = 0.5
    """A rate."""
    scale: Annotated[Scheduled, bounds(gt=0.0, lt=2.0)] = 1.0
    """A scale."""


def test_the_forms_are_those_of_numpy_and_torch() -> None:
    assert course(linear(3.0, 1.0)) == pytest.approx(np.linspace(3.0, 1.0, STEPS + 1))
    exponential = {"kind": "exponential", "start": 1e-2, "end": 1e-5}
    assert course(exponential) == pytest.approx(np.geomspace(1e-2, 1e-5, STEPS + 1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.02)
    wanted = []
    for _ in range(STEPS + 1):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert course({"kind": "cosine", "start": 0.3, "end": 0.02}) == pytest.approx(wanted)
    assert course({"kind": "constant", "value": 0.7}) == course(0.7) == [0.7] * (STEPS + 1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_a_span_holds_its_ends_outside(kind: str) -> None:
    whole = course({"kind": kind, "start": 2.0, "end": 0.5})
    found = course({"kind": kind, "start": 2.0, "end": 0.5, "begin": 0.25, "until": 0.75}, 2 * STEPS)
    assert found[: STEPS // 2 + 1] == [2.0] * (STEPS // 2 + 1)
    assert found[STEPS + STEPS // 2 :] == [0.5] * (STEPS // 2 + 1)
    assert found[STEPS // 2 : STEPS + STEPS // 2 + 1] == pytest.approx(whole)


def test_a_piece_begins_at_exactly_its_step_and_reads_the_progress_of_the_whole() -> None:
    for total, step in itertools.product((1, 3, 7, 49, 600, 1234), (1, 2, 3, 5, 48, 333)):
        if step < total:
            schedule = read_scheduled(switched(progress_at(step, total), 1.0, 2.0))
            assert value_at(schedule, progress_at(step - 1, total)) == 1.0
            assert value_at(schedule, progress_at(step, total)) == 2.0
            # Ticks of a finer clock meet the same moment at the same step.
            assert value_at(schedule, progress_at(3 * step - 1, 3 * total)) == 1.0
            assert value_at(schedule, progress_at(3 * step, 3 * total)) == 2.0
    nested = switched(0.3, 5.0, linear(0.0, 1.0))
    assert course(nested, 10) == [5.0] * 3 + course(linear(0.0, 1.0), 10)[3:]


def test_extremes_and_means_are_those_of_the_course() -> None:
    forms: list[Any] = [
        0.4,
        linear(0.2, 0.9, begin=0.1, until=0.3),
        {"kind": "cosine", "start": 0.8, "end": 0.1},
        {"kind": "exponential", "start": 0.01, "end": 1.0},
        switched(0.25, linear(0.0, 1.0), switched(0.75, linear(1.0, 0.5), 0.6)),
    ]
    for form in forms:
        schedule, found = read_scheduled(form), course(form, 4000)
        low, high = extremes(schedule)
        assert (low, high) == pytest.approx((min(found), max(found)), abs=1e-3)
        assert low <= min(found)
        assert high >= max(found)
        assert mean_of(schedule) == pytest.approx(np.mean(found), abs=1e-3)
        assert is_constant(schedule) is (len(set(found)) == 1)


def test_a_plain_number_stays_one_and_a_schedule_comes_back() -> None:
    assert Held(rate=1).model_dump(mode="json") == {"rate": 1.0, "scale": 1.0}
    held = Held.model_validate({"rate": switched(0.5, 0.1, linear(0.5, 0.2))})
    assert Held.model_validate(held.model_dump(mode="json")) == held == Held(**dict(held))
    assert hash(held) == hash(Held.model_validate(held.model_dump()))


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("critics.refresh_rate=2", "invalid critics.refresh_rate = 2: input should be less than or equal"),
        ("critics.refresh_rate={kind: linear, start: 0, end: 2}", "critics.refresh_rate: the linear schedule "
         "reaches 2, but the number must be at most 1"),
        ("critics.refresh_rate.start=0.1", "required key critics.refresh_rate.kind"),
        ("critics.refresh_rate={kind: linaer, start: 0, end: 1}", "critics.refresh_rate.kind = linaer: "),
        ("critics.refresh_rate={kind: linear, start: 0}", "required key critics.refresh_rate.end"),
        ("critics.refresh_rate={kind: linear, start: 0, end: 1, e: 1}", "unknown key critics.refresh_rate.e"),
        ("critics.refresh_rate=often", "invalid critics.refresh_rate = often: input should be a valid num"),
        ("critics.refesh_rate=0.1", "the nearest valid key is critics.refresh_rate (float | schedule"),
        ("adversarial.adversarial_weight={kind: exponential, start: 0, end: 1}", "must both be above 0"),
        ("critics.refresh_rate={kind: linear, start: 0, end: 1, begin: 0.5, until: 0.2}", "lower begin"),
        ("critics.learning_rate={kind: piecewise, pieces: [{at: 0.1, value: 1}]}", "must begin with 0.0"),
        ("critics.learning_rate={kind: piecewise, pieces: []}", "at least 1 item"),
        ("warmup.optimizer.learning_rate={kind: linear, start: 0.1, end: 0.01}", "set decay=false"),
        ("critics.band_weights=[1, 2]", "band_weights has 2 entries for 4 noise_levels"),
        ("critics.band_weights=[0, 0, 0, {kind: linear, start: 1, end: 0, until: 0.5}]", "all 0 at progress"),
        ("critics.heads_drawn=3", "set panel=uniform"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(argument: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DistillConfig, [argument])
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " more)" not in str(caught.value)


def test_a_schedule_of_a_file_is_changed_key_by_key_and_replaced_by_another_form(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("critics: {refresh_rate: {kind: linear, start: 0.1, end: 0.0}}\n")
    found = parse_config(DistillConfig, [str(tmp_path / "base.yaml"), "critics.refresh_rate.start=0.2"])
    assert found.critics.refresh_rate == read_scheduled(linear(0.2, 0.0))
    piecewise = "{kind: piecewise, pieces: [{at: 0, value: 0.5}]}"
    (tmp_path / "top.yaml").write_text(f"extends: base.yaml\ncritics: {{refresh_rate: {piecewise}}}\n")
    found = parse_config(DistillConfig, [str(tmp_path / "top.yaml")])
    assert value_at(found.critics.refresh_rate, 0.3) == 0.5


def tiny_pool(total: int = 50, seed: int = 0, **options: Any) -> Pool:
    plain = pool(CriticsConfig(heads_per_slot=2, width=4, groups=2), FrozenEncoder(unet()), seed)
    config = CriticsConfig.model_validate({"heads_per_slot": 2, "width": 4, "groups": 2} | options)
    return Pool(config, plain.slots, plain.timesteps, seed, total)


def test_refreshes_are_the_sum_of_the_rates_so_far() -> None:
    schedule = switched(0.4, linear(0.013, 0.2), {"kind": "cosine", "start": 0.3, "end": 0.0})
    for per_step in (1, 3):
        changing, ticks = tiny_pool(refresh_rate=schedule), 50 * per_step
        due, before = Fraction(0), 0
        for tick in range(ticks):
            rate = value_at(read_scheduled(schedule), tick / ticks)
            due += Fraction(str(rate)) * changing.size
            assert len(changing.refreshed(tick, per_step)) == math.floor(due) - before
            before = math.floor(due)
    assert changing.refreshed(17) == tiny_pool(refresh_rate=schedule).refreshed(17)  # of any tick, alone


@pytest.mark.parametrize("draw", ["without_replacement", "bernoulli"])
def test_a_schedule_that_does_not_change_is_the_number(draw: str) -> None:
    number = tiny_pool(0, refresh_rate=0.037, refresh_draw=draw)
    same = tiny_pool(0, refresh_rate=linear(0.037, 0.037), refresh_draw=draw)
    ticks = [number.refreshed(tick) for tick in range(60)]
    assert ticks == [same.refreshed(tick) for tick in range(60)]
    due = Fraction("0.037") * number.size
    if draw == "without_replacement":
        assert list(map(len, ticks)) == [math.floor((t + 1) * due) - math.floor(t * due) for t in range(60)]
    # Sums that happen to be constant before a change are the number's too.
    later = tiny_pool(100, refresh_rate=switched(0.6, 0.037, 0.5), refresh_draw=draw)
    assert ticks == [later.refreshed(tick) for tick in range(60)]


def test_how_many_heads_judge_may_change() -> None:
    changing = tiny_pool(10, panel="uniform", heads_drawn=linear(1.0, 11.0))
    for step in range(10):
        chosen = changing.panel(step, 0)
        assert len(set(chosen)) == len(chosen) == 1 + step
    plain = tiny_pool(panel="uniform")
    same = tiny_pool(panel="uniform", heads_drawn=len(plain.slots))
    assert [plain.panel(step, 1) for step in range(9)] == [same.panel(step, 1) for step in range(9)]
    with pytest.raises(ValueError, match=r"critics\.heads_drawn reaches 1e"):
        tiny_pool(panel="uniform", heads_drawn=linear(1.0, 1e6))
    with pytest.raises(ValueError, match=r"critics\.learning_rate changes over training, but"):
        tiny_pool(0, learning_rate=linear(0.1, 0.2))


def test_band_weights_scale_what_each_noise_level_says() -> None:
    weights = [linear(1.0, 0.0), 1.0, 2.0, 0.0]
    plain, weighed = panel(levels_per_step=4), panel(levels_per_step=4)
    weighed_pool = tiny_pool(4, levels_per_step=4, band_weights=weights)
    weighed = LocalPanel(
        Pool(plain.pool.config.model_copy(update={"band_weights": weighed_pool.config.band_weights}),
             plain.pool.slots, plain.pool.timesteps, plain.pool.seed, 4),
        plain.groups[0].encoder, plain.groups[0].alphas_cumprod,
    )  # fmt: skip
    for step in range(2):
        asked, groups = samples(step, 8), torch.arange(8) % 4
        one, other = (it.ask(asked, groups).result() for it in (plain, weighed))
        now = np.array([1 - step / 4, 1.0, 2.0, 0.0])
        now /= now.mean()
        assert weighed.pool.band_weights(step) == pytest.approx(list(now))
        assert one.gradient is not None
        assert other.gradient is not None
        scaled = one.gradient * torch.tensor(now, dtype=torch.float32)[groups].view(-1, 1, 1, 1)
        torch.testing.assert_close(other.gradient, scaled)
    assert plain.digests() == weighed.digests()  # heads learn as ever


def test_updates_per_life_take_the_means() -> None:
    assert CriticsConfig(refresh_rate=linear(0.0, 0.02)).updates_per_life() == pytest.approx(6.25)
    drawn = CriticsConfig(panel="uniform", heads_drawn=linear(0.0 + 5, 15.0), levels_per_step=4)
    assert drawn.updates_per_life(slots=20) == pytest.approx(10 / 80 / 0.01)


def test_an_optimizer_reads_its_settings_step_by_step() -> None:
    config = OptimizerConfig.model_validate(
        {
            "learning_rate": linear(0.1, 0.02), "weight_decay": switched(0.5, 0.3, 0.0), "warmup_steps": 0,
            "max_gradient_norm": switched(0.25, 0.5, 5.0), "ema_decay": switched(0.5, 0.9, 0.5),
            "decay": False,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(mine.state_dict())
    learner = WholeLearner(mine, config, 8)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=config.betas)
    inputs = 3 * torch.randn(8, 5, 3)
    for step in range(8):
        learner.backward(learner.network(inputs[step]).square().sum())
        rate, _ = learner.step(step)
        assert rate == pytest.approx(np.linspace(0.1, 0.02, 9)[step])
        assert learner.average.decay == (0.9 if step < 4 else 0.5)
        theirs(inputs[step]).square().sum().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5 if step < 2 else 5.0)
        adamw.param_groups[0] |= {"lr": rate, "weight_decay": 0.3 if step < 4 else 0.0}
        adamw.step()
        adamw.zero_grad()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


NUMBERS: dict[str, tuple[float, float]] = {
    "critics.refresh_rate": (0.25, 0.5),  # whole heads, so that no fraction is carried over the switch
    "critics.learning_rate": (0.01, 0.002),
    "critics.weight_decay": (0.0, 0.1),
    "critics.heads_drawn": (3.0, 7.0),
    "critics.band_weights.2": (1.0, 4.0),
    "adversarial.adversarial_weight": (0.5, 0.1),
    "adversarial.regression_weight": (1.0, 0.3),
    "adversarial.optimizer.learning_rate": (1e-3, 2e-4),
    "adversarial.optimizer.weight_decay": (0.0, 0.2),
}
BASE: dict[str, Any] = {
    "warmup": {"steps": 2, "batch_size": 8},
    "adversarial": {"steps": 5, "heads_alone": 2, "batch_size": 8, "optimizer": {"decay": False}},
    "critics": CRITICS | {"actors": 0, "panel": "uniform", "band_weights": [1.0, 1.0, 1.0, 1.0]},
}
SWITCH = 6


def config_of(values: Mapping[str, Any]) -> DistillConfig:
    """The configuration with `values` by dotted key."""
    data: dict[str, Any] = {name: dict(part) for name, part in BASE.items()}
    data["adversarial"]["optimizer"] = {"decay": False, "warmup_steps": 0}
    data["critics"]["band_weights"] = list(data["critics"]["band_weights"])
    for key, value in values.items():
        *path, last = key.split(".")
        node = data
        for part in path:
            node = node[part]
        node[int(last) if isinstance(node, list) else last] = value  # type: ignore[index]
    return DistillConfig.model_validate(data)


def distiller_of(config: DistillConfig) -> Distiller:
    encoder = FrozenEncoder(unet())
    plain = pool(CriticsConfig(**CRITICS), encoder, 0)
    layout = Pool(config.critics.plain(), plain.slots, plain.timesteps, 0, config.adversarial.panel_steps)
    noise = build_noise_scheduler(NoiseConfig())
    critics = LocalPanel(layout, encoder, noise.alphas_cumprod)
    return Distiller(
        unet(seed=1), noise, pairs(), digits(), critics, StudentConfig(), config.warmup, config.adversarial, 5
    )


def switching(first: float | None = None) -> DistillConfig:
    """Every number switched at step SWITCH by a piece of a schedule."""
    plain = config_of({})
    return config_of(
        {
            key: switched(progress_of(plain, key, SWITCH), *values) if first is None else values[int(first)]
            for key, values in NUMBERS.items()
        }
    )


def same(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(one[part][name], other[part][name]) for name in one[part])
        for part in one
    )


def test_pieces_do_what_switching_by_hand_does_and_a_resumed_run_what_an_undisturbed_one_does() -> None:
    whole = distiller_of(switching())
    figures = [whole.step(step) for step in range(whole.total_steps)]
    assert [row.get("adversarial_weight") for row in figures] == [None] * 2 + [0.5] * 4 + [0.1] * 3
    assert [row.get("refresh_rate") for row in figures] == [None] * 2 + [0.25] * 4 + [0.5] * 3

    before = distiller_of(switching(0))
    for step in range(SWITCH):
        before.step(step)
    state = before.state()
    for config in (switching(1), switching()):
        after = distiller_of(config)
        after.load(state, SWITCH)
        for step in range(SWITCH, after.total_steps):
            after.step(step)
        assert same(after.state(), whole.state())
    constant = distiller_of(switching(0))
    constant.load(state, SWITCH)
    for step in range(SWITCH, constant.total_steps):
        constant.step(step)
    assert not same(constant.state(), whole.state())


def test_progress_is_that_of_the_part_of_the_run() -> None:
    config = config_of({})
    for key, at_six in {
        "critics.refresh_rate": 4 / 7, "adversarial.adversarial_weight.start": 4 / 7,
        "adversarial.optimizer.learning_rate": 2 / 5, "warmup.optimizer.ema_decay": 1.0,
    }.items():  # fmt: skip
        assert progress_of(config, key, 6) == progress_of(config.model_dump(), key, 6) == at_six
        assert progress_of(config, key, 0) == 0.0
    without = config_of({"adversarial.adversarial_weight": 0.0})
    assert progress_of(without, "adversarial.regression_weight", 6) == 4 / 5
    teacher = TrainConfig.model_validate({"teacher": {"steps": 8}})
    assert progress_of(teacher, "teacher.optimizer.learning_rate", 2) == 0.25
    policy = PolicyTrainConfig.model_validate({"training": {"steps": 10, "perception": {"steps": 4}}})
    looking = 4 if policy.network.vision.kind == "pointer" else 0
    assert progress_of(policy, "training.optimizer.learning_rate", 9) == (9 - looking) / 10
    with pytest.raises(ValueError, match=r"critics\.refresh_rate does not change over training"):
        progress_of(teacher, "critics.refresh_rate", 0)
    found = dict(schedules_in(switching().model_dump(mode="json")))
    assert found.keys() == NUMBERS.keys()


def test_the_report_draws_what_changed(tmp_path: Path) -> None:
    config, store = switching(), RunStore(tmp_path)
    store.write_text("config.yaml", dump_config(config))
    stages = ["warmup"] * 2 + ["heads"] * 2 + ["panel"] * 5
    rows = [{"step": step, "stage": stage, "refreshed": 3} for step, stage in enumerate(stages)]
    store.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    store.write_text("results.json", json.dumps({"pool": {"heads": 100}}))
    record = read_record(store)
    charts = schedule_charts(record)
    assert [chart.title for chart in charts] == [key for key, _ in schedules_in(record.config)]
    assert {chart.title for chart in charts} == set(NUMBERS)
    for key, (before, after) in NUMBERS.items():
        steps, values = scheduled_points(record, key, dict(schedules_in(record.config))[key])
        first = 4 if "optimizer" in key else 2
        assert steps.tolist() == list(range(first, 9))
        assert values.tolist() == [before if step < SWITCH else after for step in range(first, 9)]
    due = expected_refreshes(record, config.critics.refresh_rate, np.arange(2.0, 9.0))
    assert due == pytest.approx(np.cumsum([0.25] * 4 + [0.5] * 3))
    assert refreshes(record) is not None


def test_a_run_from_before_schedules_goes_on(tmp_path: Path) -> None:
    config = config_of({"critics.panel": "one_per_slot", "critics.band_weights": []})
    config = config.model_copy(update={"run": str(tmp_path)})
    store = open_run(config.run, config, resume=False, in_process=True)
    lines = store.read_text("config.yaml").splitlines()
    assert any(line.strip() == "refresh_rate: 0.01" for line in lines)
    old = [line for line in lines if "band_weights" not in line and "heads_drawn" not in line]
    store.write_text("config.yaml", "\n".join(old))
    open_run(config.run, config, resume=True, in_process=True)
    changed = config.model_copy(
        update={"critics": config.critics.model_copy(update={"refresh_rate": read_scheduled(linear(0, 1))})}
    )
    with pytest.raises(ValueError, match=r"critics\.refresh_rate"):
        open_run(config.run, changed, resume=True, in_process=True)
