"""Forward process, conversions and the teacher's loss against diffusers' own."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny import CLASSES, unet

from counterpoint.diffusion import (
    BetaSchedule,
    NoiseConfig,
    NoisyBatch,
    PredictionType,
    add_noise,
    build_noise_scheduler,
    diffusion_loss,
    draw_noisy_batch,
    drop_condition,
    predict_x0,
    training_target,
)

PREDICTIONS: tuple[PredictionType, ...] = ("v_prediction", "epsilon", "sample")
SCHEDULES: tuple[BetaSchedule, ...] = ("squaredcos_cap_v2", "linear", "scaled_linear")
TIMES = torch.tensor([0, 250, 600, 900])


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, noise


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_forward_process_is_diffusers(schedule: BetaSchedule) -> None:
    scheduler = build_noise_scheduler(NoiseConfig(beta_schedule=schedule))
    x, noise = draw()
    expected = DDPMScheduler(beta_schedule=schedule).add_noise(x, noise, TIMES)
    torch.testing.assert_close(add_noise(scheduler.alphas_cumprod, x, noise, TIMES), expected)


def test_the_schedule_keeps_its_precision_until_the_roots_are_taken() -> None:
    x, noise = (t.bfloat16() for t in draw())
    abar = build_noise_scheduler(NoiseConfig()).alphas_cumprod
    noised = add_noise(abar, x, noise, TIMES)
    assert noised.dtype == torch.bfloat16
    torch.testing.assert_close(
        noised.float(), add_noise(abar, x.float(), noise.float(), TIMES), rtol=0.02, atol=0.05
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_ddims_estimate(prediction: PredictionType, schedule: BetaSchedule) -> None:
    x, output = draw()
    ddim = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    ddim.set_timesteps(1000)
    found = predict_x0(output, x, TIMES, ddim.alphas_cumprod, prediction)
    for i, t in enumerate(TIMES):
        expected = ddim.step(output[i], int(t), x[i]).pred_original_sample
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_the_image(prediction: PredictionType) -> None:
    scheduler = build_noise_scheduler(NoiseConfig(prediction_type=prediction))
    x, noise = draw()
    noisy = scheduler.add_noise(x, noise, TIMES)
    target = training_target(scheduler, x, noise, TIMES)
    back = predict_x0(target, noisy, TIMES, scheduler.alphas_cumprod, prediction)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_squared_error_of_each_prediction_type(prediction: PredictionType) -> None:
    scheduler, network = build_noise_scheduler(NoiseConfig(prediction_type=prediction)), unet()
    x, noise = draw()
    labels = torch.tensor([0, 3, 10, 9])
    abar = scheduler.alphas_cumprod[TIMES].reshape(-1, 1, 1, 1)
    noisy = abar.sqrt() * x + (1 - abar).sqrt() * noise
    target = {"sample": x, "epsilon": noise, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x}
    output = network(noisy, TIMES, class_labels=labels).sample
    expected = (output - target[prediction]).square().mean()
    loss = diffusion_loss(network, scheduler, NoisyBatch(x, labels, TIMES, noise))
    torch.testing.assert_close(loss, expected)


def test_conditions_are_dropped_at_their_rate() -> None:
    labels = torch.arange(5000) % CLASSES
    for rate in (0.0, 0.1, 1.0):
        dropped = drop_condition(labels, CLASSES, rate, torch.Generator().manual_seed(0))
        gone = dropped == CLASSES
        assert float(gone.float().mean()) == pytest.approx(rate, abs=0.02)
        assert torch.equal(dropped[~gone], labels[~gone])


def test_batches_pair_images_with_their_labels_over_all_times() -> None:
    images = torch.arange(50.0).reshape(50, 1, 1, 1) / 100
    batch = draw_noisy_batch(images, torch.arange(50), 4000, 20, 50, 0.25, torch.Generator().manual_seed(0))
    kept = batch.labels < 50
    assert torch.equal(batch.images[kept].flatten(), batch.labels[kept] / 100)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.bincount(batch.timesteps, minlength=20).min() > 130
    assert len(torch.bincount(batch.timesteps)) == 20
    assert torch.unique(batch.images).numel() == 50
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.05)


def test_parts_of_a_batch_are_the_batch() -> None:
    batch = draw_noisy_batch(draw()[0], torch.arange(4), 6, 1000, 10, 0.5, torch.Generator().manual_seed(0))
    parts = [batch.part(slice(i, i + 2), "cpu") for i in (0, 2, 4)]
    for name in ("images", "labels", "timesteps", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_a_schedule_too_short_for_four_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps"):
        NoiseConfig(num_train_timesteps=3)
