"""DPM-Solver-v3 against DDIM and DPM-Solver(++), closed forms, and its own claims in small."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from solver_parts import SIDE, Mixture, normal, schedule, solve
from tiny import unet
from torch import Tensor

from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.inflight import Chain, _fork, advance
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import SamplerConfig, build_sampler
from counterpoint.solvers import dpm_solver_v3
from counterpoint.solvers.derivatives import divided, polynomial
from counterpoint.solvers.dpm_solver_v3 import DPMSolverV3Scheduler
from counterpoint.solvers.empirical_statistics import (
    ModelStatistics,
    half_log_snr,
    save_statistics,
    schedule_of,
)
from counterpoint.solvers.exponential_integrals import segment
from counterpoint.solvers.model_statistics import EstimationConfig, coefficients, estimate, noise_levels

CENTRES = 0.5 * normal(3, 1, SIDE, SIDE, seed=1)
NOISE = normal(6, 1, SIDE, SIDE, seed=7)


def solver(noise: Any, **options: Any) -> DPMSolverV3Scheduler:
    found = build_sampler(SamplerConfig(scheduler="DPMSolverV3Scheduler", options=options), noise)
    assert isinstance(found, DPMSolverV3Scheduler)
    return found


def rival(noise: Any, **options: Any) -> DPMSolverMultistepScheduler:
    fixed = {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}
    return DPMSolverMultistepScheduler.from_config(noise.config, **fixed, **options)


def statistics_of(noise: Any, network: Any, data: Tensor, path: Path, **options: Any) -> str:
    """The URI of statistics estimated on `data`."""
    config = EstimationConfig(**{"samples": 128, "intervals": 32, "batch_size": 128} | options)
    sums = estimate(network, noise, data, torch.zeros(len(data), dtype=torch.long), config, seed=0)
    save_statistics(path, coefficients(sums, noise, config, schedule_of(noise.config)))
    return str(path)


@pytest.mark.parametrize("limit", ["noise", "data"])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_order_one_is_ddim_in_both_limits(limit: str, betas: str, kind: str) -> None:
    noise = schedule(kind, betas)
    network = Mixture(noise, CENTRES, 0.3)
    ddim = DDIMScheduler.from_config(
        noise.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
    found = solve(network, solver(noise, statistics=limit, solver_order=1, corrector="none"), NOISE, 5)
    torch.testing.assert_close(found, solve(network, ddim, NOISE, 5), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("limit", "algorithm"), [("noise", "dpmsolver"), ("data", "dpmsolver++")])
def test_order_two_is_dpm_solver_2m(limit: str, algorithm: str) -> None:
    """diffusers' solver rounds its states to float32."""
    noise = schedule()
    network = Mixture(noise, CENTRES, 0.3)
    expected = solve(network, rival(noise, algorithm_type=algorithm, solver_type="heun"), NOISE, 9)
    found = solve(network, solver(noise, statistics=limit, solver_order=2, corrector="none"), NOISE, 9)
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=1e-5)


def test_order_three_is_dpm_solver_3m_but_for_its_half_of_the_second_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = schedule()
    network = Mixture(noise, CENTRES, 0.3)
    ours = solver(noise, statistics="data", corrector="none")
    plain = solve(network, ours, NOISE, 9)
    expected = solve(network, rival(noise, solver_order=3, solver_type="heun"), NOISE, 9).double()
    assert float((plain - expected).abs().max()) > 1e-4

    def halved(values: Any, offsets: Any) -> list[Tensor]:
        found = polynomial(values, offsets)
        return [*found[:2], *(value / 2 for value in found[2:])]

    monkeypatch.setattr(dpm_solver_v3, "polynomial", halved)
    torch.testing.assert_close(solve(network, ours, NOISE, 9), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_derivatives_of_a_polynomial_are_exact(count: int) -> None:
    offsets = [0.0, 0.7, -0.4, -1.3][:count]
    powers = [torch.tensor(c).double() for c in (2.0, -1.0, 0.5, 3.0)][:count]
    values = [sum(c * offset**k for k, c in enumerate(powers)) for offset in offsets]
    exact = torch.stack([c * f for c, f in zip(powers, (1, 1, 2, 6), strict=False)])
    torch.testing.assert_close(torch.stack(polynomial(values, offsets)), exact)
    if count < 3:
        torch.testing.assert_close(torch.stack(divided(values, offsets)), exact)


def test_divided_differences_leave_out_later_points() -> None:
    values, offsets = list(normal(4, 2)), [0.0, 0.5, -0.3, -1.0]
    for k in range(1, 4):
        exact = torch.stack(polynomial(values[: k + 1], offsets[: k + 1]))[k]
        torch.testing.assert_close(divided(values, offsets)[k], exact)


def test_integrals_are_those_of_a_fine_sum() -> None:
    grid = torch.linspace(-3, 2, 9, dtype=torch.float64)
    tables = [normal(9, 1, 1, 2, seed=seed) for seed in (1, 2, 3)]
    found = segment(ModelStatistics(grid, *tables), -2.21, 0.57)
    fine = torch.linspace(-2.21, 0.57, 20001, dtype=torch.float64)
    l, s, b = ModelStatistics(grid, *tables).at(fine)  # noqa: E741

    def running(values: Tensor) -> Tensor:
        parts = torch.cumulative_trapezoid(values, fine, dim=0)
        return torch.cat([torch.zeros_like(values[:1]), parts])

    growth, scale = running(l), running(s)
    shift = running((-scale).exp() * b)
    weight, passed = (growth + scale).exp(), (fine + 2.21).reshape(-1, 1, 1, 1)
    exact = [growth[-1], scale[-1], shift[-1], running(weight * shift)[-1]]
    exact += [running(weight * passed**k / f)[-1] for k, f in enumerate((1, 1, 2, 6))]
    ours = [found.growth, found.scale, found.shift, found.drift, *found.moments]
    torch.testing.assert_close(torch.stack(ours), torch.stack(exact), atol=1e-5, rtol=1e-5)


def exact_gaussian(noise: Any, spread: float | Tensor, start: int) -> Tensor:
    """Where the ODE takes NOISE, for one Gaussian around CENTRES[0], from timestep `start` to 0."""
    lambdas = half_log_snr(noise.alphas_cumprod)[[start, 0]]
    alpha, sigma = torch.sigmoid(2 * lambdas).sqrt(), torch.sigmoid(-2 * lambdas).sqrt()
    width = [(a**2 * torch.as_tensor(spread) ** 2 + s**2) ** 0.5 for a, s in zip(alpha, sigma, strict=True)]
    return alpha[1] * CENTRES[:1] + width[1] / width[0] * (NOISE - alpha[0] * CENTRES[:1])


@pytest.mark.parametrize(
    ("order", "corrector", "slope"), [(1, "none", 1), (2, "none", 2), (3, "none", 3), (2, "pseudo", 3)]
)
def test_the_error_falls_with_the_order(order: int, corrector: str, slope: int) -> None:
    """A schedule of many timesteps, so that steps even in lambda are even after rounding to timesteps."""
    noise = schedule()
    noise = type(noise).from_config(noise.config, num_train_timesteps=50000, beta_start=2e-6, beta_end=4e-4)
    network = Mixture(noise, CENTRES[:1], 0.5)
    ours = solver(
        noise, statistics="data", solver_order=order, corrector=corrector, lower_order_final=False,
        timestep_spacing="lambda",
    )  # fmt: skip
    exact = exact_gaussian(noise, 0.5, 49999)
    coarse, fine = (float((solve(network, ours, NOISE, n) - exact).abs().max()) for n in (20, 40))
    assert slope - 0.35 < torch.log2(torch.tensor(coarse / fine)) < slope + 1.0


def test_with_statistics_of_a_linear_score_order_one_is_exact(tmp_path: Path) -> None:
    noise, spread = schedule(), normal(1, SIDE, SIDE, seed=2).abs() + 0.3
    network = Mixture(noise, CENTRES[:1], spread)
    data = CENTRES[:1] + spread * normal(20, 1, SIDE, SIDE, seed=3)
    file = statistics_of(noise, network, data, tmp_path / "s.safetensors", samples=4, intervals=256)
    exact = exact_gaussian(noise, spread, 999)
    options = {"solver_order": 1, "corrector": "none"}
    ours, ddim = (solve(network, solver(noise, statistics=s, **options), NOISE, 3) for s in (file, "data"))
    assert float((ours - exact).abs().max()) < 2e-3
    assert float((ddim - exact).abs().max()) > 0.1


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    """A mixture around a few digits, and its statistics."""
    noise = schedule()
    centres = load_data(DataConfig()).train.images[:20].double()
    network = Mixture(noise, centres, 0.3)
    chosen = torch.randint(20, (500,), generator=torch.Generator().manual_seed(5))
    data = centres[chosen] + 0.3 * normal(500, 1, 8, 8, seed=6)
    return noise, network, statistics_of(noise, network, data, tmp_path_factory.mktemp("s") / "s.safetensors")


def test_with_its_statistics_it_is_nearer_than_dpm_solver_in_few_steps(digits: Any) -> None:
    """The same timesteps and order; the method's sheet asks for a fifth less."""
    noise, network, file = digits
    start = normal(48, 1, 8, 8, seed=8)
    fine = solve(network, solver(noise, statistics="data"), start, 100)

    def error(sampler: Any, steps: int) -> float:
        return float((solve(network, sampler, start, steps) - fine).square().mean().sqrt())

    for steps in (5, 8, 10):
        for corrector, rivals in (
            ("none", [rival(noise, solver_order=3), solver(noise, statistics="data", corrector="none")]),
            ("pseudo", [solver(noise, statistics="data")]),
        ):
            ours = error(solver(noise, statistics=file, corrector=corrector), steps)
            assert all(ours < 0.8 * error(other, steps) for other in rivals), (steps, corrector)


def test_the_corrector_moves_the_state_and_leaves_g(digits: Any) -> None:
    """The paper's rule eps + l (x_c - x) / sigma keeps f = (sigma eps - l x) / alpha, all that is stored."""
    noise, network, file = digits
    ours = solver(noise, statistics=file)
    ours.set_timesteps(5)
    x = normal(2, 1, 8, 8)
    for index, t in enumerate(ours.timesteps[:3]):
        output = network(x, t, torch.zeros(2, dtype=torch.long)).sample
        after = ours.step(output, t, x).prev_sample
        alpha, sigma = (
            noise.alphas_cumprod[t].double() ** 0.5,
            (1 - noise.alphas_cumprod[t].double()) ** 0.5,
        )
        eps = alpha * output + sigma * x
        linear, corrected = ours._linear[index], ours._start
        assert torch.equal(corrected, x) == (index == 0)
        moved = eps + linear * (corrected - x) / sigma
        g = (sigma * moved - linear * corrected) / alpha
        torch.testing.assert_close(ours._targets[0], g, atol=1e-5, rtol=1e-5)
        x = after


def test_half_of_the_chain_can_go_uncorrected(digits: Any) -> None:
    noise, network, file = digits
    start = normal(2, 1, 8, 8)
    whole, half, none = (
        solver(noise, statistics=file, **options)
        for options in ({}, {"half_corrector": True}, {"corrector": "none"})
    )
    states: list[list[Tensor]] = []
    for ours in (whole, half, none):
        ours.set_timesteps(5)
        x, states = start, [*states, []]
        for t in ours.timesteps:
            x = ours.step(network(x, t, torch.zeros(2, dtype=torch.long)).sample, t, x).prev_sample
            states[-1].append(x)
    assert all(torch.equal(states[1][i], states[2][i]) for i in range(3))  # 999, 799, 599
    assert not torch.equal(states[1][3], states[2][3])
    assert not torch.equal(states[0][1], states[1][1])


def tiny_statistics(noise: Any, path: Path, side: int = 8) -> str:
    levels = noise_levels(noise, 8)
    sigma = torch.sigmoid(-2 * levels).reshape(-1, 1, 1, 1).expand(9, 1, side, side)
    made_for = schedule_of(noise.config)
    save_statistics(path, ModelStatistics(levels, sigma, 0.1 * sigma, 0.2 * sigma, made_for))
    return str(path)


def test_a_saved_pipeline_carries_its_statistics(tmp_path: Path) -> None:
    noise, labels = build_noise_scheduler(NoiseConfig()), [3, 0]
    file = tmp_path / "elsewhere.safetensors"
    ours = solver(noise, statistics=tiny_statistics(noise, file), solver_order=2)
    pipeline = ClassConditionalPipeline(unet().eval(), ours)
    pipeline.set_progress_bar_config(disable=True)

    def images(of: ClassConditionalPipeline) -> Tensor:
        stream = torch.Generator().manual_seed(0)
        made: Tensor = of(labels, 4, generator=stream, output_type="pt", return_dict=False)[0]
        return made

    expected = images(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    file.unlink()
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    loaded = ClassConditionalPipeline.from_pretrained(moved, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.solver_order == 2
    assert torch.equal(images(loaded), expected)
    again = DPMSolverV3Scheduler.from_config(loaded.scheduler.config)
    assert torch.equal(again.statistics.l, ours.statistics.l)
    loaded.save_pretrained(tmp_path / "second")
    assert torch.equal(images(ClassConditionalPipeline.from_pretrained(tmp_path / "second")), expected)
    assert ours.config.statistics == str(file)
    DPMSolverV3Scheduler(statistics="noise").save_pretrained(tmp_path / "limit")
    assert DPMSolverV3Scheduler.from_pretrained(tmp_path / "limit").config.statistics == "noise"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver_order": 4}, "solver_order=4: give one of 1, 2, 3"),
        ({"corrector": "both"}, "corrector=both: give one of none, polynomial, pseudo"),
        ({"timestep_spacing": "leading"}, "timestep_spacing=leading: give one of trailing, linspace, lambda"),
        ({"statistics": "nowhere.safetensors"}, "statistics=nowhere.safetensors is not there: make the file"),
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(schedule(), **wrong)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tiny_statistics(schedule(), tmp_path / "s.safetensors")
    for other, message in (
        (schedule(betas="squaredcos_cap_v2"), "made for beta_schedule=linear, not for squaredcos_cap_v2"),
        (schedule("epsilon"), "made for prediction_type=v_prediction, not for epsilon"),
    ):
        with pytest.raises(ValueError, match=message):
            solver(other, statistics=file)
    ours = solver(schedule(), statistics=file)
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match=r"of shape \(1, 8, 8\) but the samples of \(1, 4, 4\)"):
        ours.step(NOISE, ours.timesteps[0], NOISE)
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="is not a file of model statistics"):
        solver(schedule(), statistics=str(tmp_path / "text.safetensors"))


def refused(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_steps_out_of_order_are_refused() -> None:
    ours = solver(schedule())
    refused(lambda: ours.step(NOISE, 5, NOISE), "call set_timesteps before step")
    refused(lambda: ours.set_timesteps(1000), "num_inference_steps=1000 .* use fewer steps")
    ours.set_timesteps(2)
    assert ours.timesteps.tolist() == [999, 499]
    refused(lambda: ours.step(NOISE, 7, NOISE), "timestep=7 is not in the schedule")
    ours.step(NOISE, 499, NOISE)
    refused(lambda: ours.step(NOISE, 499, NOISE), "all 2 steps are taken")
    ours.set_timesteps(2)
    assert ours.step(NOISE, 999, NOISE, return_dict=False)[0].shape == NOISE.shape


def test_a_forked_step_leaves_the_original_as_it_is(tmp_path: Path) -> None:
    noise = build_noise_scheduler(NoiseConfig())
    ours = solver(noise, statistics=tiny_statistics(noise, tmp_path / "s.safetensors"))
    ours.set_timesteps(4)
    x = normal(1, 1, 8, 8)
    for t in ours.timesteps[:2]:
        x = ours.step(x.sin(), t, x).prev_sample
    twin = _fork(ours)
    branch = twin.step(x.cos(), twin.timesteps[2], x).prev_sample
    assert not torch.equal(branch, x)
    straight = ours.step(x.sin(), ours.timesteps[2], x).prev_sample
    ours.set_timesteps(4)
    x = normal(1, 1, 8, 8)
    for t in ours.timesteps[:3]:
        x = ours.step(x.sin(), t, x).prev_sample
    assert torch.equal(x, straight)


def test_chains_in_flight_are_the_pipelines_images(tmp_path: Path) -> None:
    network, noise = unet().eval(), build_noise_scheduler(NoiseConfig())
    ours = solver(noise, statistics=tiny_statistics(noise, tmp_path / "s.safetensors"))
    streams = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    chains = [
        Chain(network, ours, label, steps, 1.0, s)
        for label, steps, s in zip((3, 4), (3, 5), streams, strict=True)
    ]
    while waiting := [chain for chain in chains if not chain.done]:
        advance(network, waiting, [2])
    pipeline = ClassConditionalPipeline(network, ours)
    pipeline.set_progress_bar_config(disable=True)
    for chain, label, steps, seed in zip(chains, (3, 4), (3, 5), (1, 2), strict=True):
        stream = torch.Generator().manual_seed(seed)
        made = pipeline([label], steps, generator=stream, output_type="pt", return_dict=False)[0]
        torch.testing.assert_close(chain.image.clamp(-1, 1), made[0], atol=1e-4, rtol=1e-4)
