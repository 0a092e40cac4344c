"""The table of steps against closed forms and diffusers' own schedulers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from pumice.models import NoiseSchedule
from pumice.purify.walk import Walk, ancestral, first_of, rescheduled, respaced, walk
from pumice.testbed.tiny import ddim_scheduler

GUIDED_DIFFUSION = NoiseSchedule.from_config(DDPMScheduler().config)
STABLE_DIFFUSION = NoiseSchedule.from_config(ddim_scheduler("epsilon").config)


def epsilon(x: Tensor, t: int) -> Tensor:
    """A network, as far as a scheduler can tell."""
    return torch.sin(3 * x + t / 100)


def x0_of(schedule: NoiseSchedule) -> Callable[[Tensor, int], Tensor]:
    return lambda x, t: schedule.to_x0(epsilon(x, t), x, t)


def follow(
    way: Walk,
    x: Tensor,
    denoise: Callable[[Tensor, int], Tensor],
    noise: list[Tensor],
    share: float | Tensor = 0.0,
) -> list[Tensor]:
    """Every x of a walk, from its formula."""
    last, found = torch.zeros_like(x), []
    for step, t in enumerate(way.timesteps.tolist()):
        of_x, of_x0, of_last, small, large = way.coefficients[step]
        x0 = denoise(x, t)
        spread = (0.5 * (share * large + (1 - share) * small)).exp() * noise[step] * way.noisy[step]
        x, last = of_x * x + of_x0 * x0 + of_last * last + spread, x0
        found.append(x)
    return found


@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_steps_are_those_of_diffusers(variance, steps):
    scheduler = DDPMScheduler(variance_type=variance, clip_sample=False)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[-50:]
    way = ancestral(GUIDED_DIFFUSION, timesteps.tolist())
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": 0.3}[variance]
    expected, noise = x, []
    for number, t in enumerate(timesteps):
        output = epsilon(expected, int(t))
        if variance == "learned_range":
            output = torch.cat((output, torch.full_like(output, 2 * share - 1)), dim=1)
        draw = torch.Generator().manual_seed(number)
        noise.append(torch.randn(x.shape, generator=draw, dtype=torch.float64))
        expected = scheduler.step(output, t, expected, generator=draw.manual_seed(number)).prev_sample
    found = follow(way, x, x0_of(GUIDED_DIFFUSION), noise, share)
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)  # its table is float32


@pytest.mark.parametrize("count", [1, 2, 3, 10, 30])
def test_the_solver_is_that_of_diffusers(count):
    way = walk(STABLE_DIFFUSION, 300, "dpmsolver++", count)
    scheduler = DPMSolverMultistepScheduler.from_config(ddim_scheduler("epsilon").config)
    scheduler.set_timesteps(timesteps=way.timesteps.tolist())
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(epsilon(expected, int(t)), t, expected).prev_sample
    found = follow(way, x, x0_of(STABLE_DIFFUSION), [torch.zeros_like(x)] * count)
    torch.testing.assert_close(found[-1], expected, rtol=1e-3, atol=1e-4)


def test_the_ends_of_the_variance_are_beta_and_that_of_the_posterior():
    way = walk(GUIDED_DIFFUSION, 150)
    betas = DDPMScheduler().betas.double()[:151].flip(0)
    torch.testing.assert_close(way.coefficients[:, 4].exp(), betas, rtol=1e-3, atol=0)
    abar = GUIDED_DIFFUSION.alphas_cumprod[:151].flip(0)
    posterior = betas[:-1] * (1 - abar[1:]) / (1 - abar[:-1])
    torch.testing.assert_close(way.coefficients[:-1, 3].exp(), posterior, rtol=1e-3, atol=0)
    assert way.noisy == (True,) * 150 + (False,)
    assert way.coefficients.isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_moments_of_a_gaussian_follow_the_walk(share):
    """x0 ~ N(m, 1): with v = 1 each step is the exact reverse one, with less it loses variance."""
    mean, way = 0.3, walk(GUIDED_DIFFUSION, 149)
    draw = torch.Generator().manual_seed(1)
    x = mean + torch.randn(100_000, generator=draw, dtype=torch.float64)
    x = way.alpha * x + way.sigma * torch.randn(x.shape, generator=draw, dtype=torch.float64)

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha = GUIDED_DIFFUSION.alphas_cumprod[t].sqrt()
        return mean + alpha * (x - alpha * mean)

    noise = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for _ in way.timesteps]
    found = follow(way, x, denoise, noise, share)[-1]
    variance = 1.0  # of x_t, whose closed form goes along
    for step, t in enumerate(way.timesteps):
        of_x, of_x0, _, small, large = way.coefficients[step]
        slope = of_x + of_x0 * GUIDED_DIFFUSION.alphas_cumprod[t].sqrt()
        variance = slope**2 * variance + way.noisy[step] * (share * large + (1 - share) * small).exp()
    assert found.mean().item() == pytest.approx(mean, abs=0.015)  # 4 standard errors
    assert found.var().item() == pytest.approx(float(variance), abs=0.02)
    if share == 1:
        assert float(variance) == pytest.approx(1, abs=1e-3)


def test_the_solver_follows_the_flow_of_a_gaussian_to_second_order():
    """x0 ~ N(m, s^2): the flow keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2)."""
    mean, s, first = 0.5, 0.3, 800
    fine = NoiseSchedule.from_config(DDPMScheduler(16000, 1e-4 / 16, 0.02 / 16).config)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def spread(t: int) -> tuple[Tensor, Tensor]:
        alpha, sigma = fine.alpha_sigma(torch.tensor(t))
        return alpha, (alpha**2 * s**2 + sigma**2).sqrt()

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha, std = spread(t)
        return mean + alpha * s**2 / std**2 * (x - alpha * mean)

    def error(count: int) -> float:
        # steps over a fixed stretch, first * 16 to half of it: a walk of twice as many, cut
        way = walk(fine, first * 16 - 1, "dpmsolver++", 2 * count)
        found = follow(way, x, denoise, [torch.zeros_like(x)] * len(way))[count - 1]
        (alpha, std), (alpha_end, std_end) = spread(first * 16 - 1), spread(int(way.timesteps[count]))
        exact = alpha_end * mean + std_end / std * (x - alpha * mean)
        return float((found - exact).abs().max())

    errors = [error(count) for count in (8, 16, 32, 64)]
    orders = [math.log2(before / after) for before, after in pairwise(errors)]
    assert min(orders[1:]) > 1.8 and errors[-1] < 1e-3, (errors, orders)


def test_one_shot_is_one_prediction():
    way = walk(GUIDED_DIFFUSION, 9, "one_shot")
    assert way.timesteps.tolist() == [9] and way.noisy == (False,)
    torch.testing.assert_close(way.coefficients[0, :3], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def test_look_ups():
    std = (1 - GUIDED_DIFFUSION.alphas_cumprod).sqrt()
    for t, expected in ((9, 0.044), (40, 0.142), (100, 0.32), (401, 0.90)):
        assert float(std[t]) == pytest.approx(expected, rel=0.02)
    assert float(STABLE_DIFFUSION.alphas_cumprod[300]) == pytest.approx(0.5905, abs=1e-4)
    spaced = respaced(GUIDED_DIFFUSION, 250)
    assert (spaced[0], spaced[10], spaced[100], spaced[249]) == (0, 40, 401, 999)
    assert len(set(spaced)) == 250 and respaced(GUIDED_DIFFUSION, 1) == [0]
    way = rescheduled(GUIDED_DIFFUSION, 10)
    assert way.timesteps.tolist() == spaced[10:0:-1] and all(way.noisy)  # it ends at timestep 0, noisy


def test_a_solver_has_no_more_steps_than_timesteps():
    assert walk(GUIDED_DIFFUSION, 9, "dpmsolver++").timesteps.tolist() == list(range(9, -1, -1))
    assert len(walk(GUIDED_DIFFUSION, 99, "dpmsolver++")) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000,), "t: got timestep 1000, expected 0 to 999"),
        ((-1,), "t: got timestep -1"),
        ((9, "ddim"), "sampler: got 'ddim', expected one of ddpm"),
        ((9, "ddpm", 5), "num_inference_steps: got 5, expected none for 'ddpm'"),
        ((9, "dpmsolver++", 11), "num_inference_steps: got 11, expected at most 10"),
        ((9, "dpmsolver++", 0), "num_inference_steps: got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        walk(GUIDED_DIFFUSION, *arguments)


def test_pure_noise_is_no_beginning():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="t: at timestep 999 nothing is left"):
        walk(NoiseSchedule.from_config(scheduler.config), 999)


def test_counts_outside_the_schedule():
    assert first_of(GUIDED_DIFFUSION, 1000) == 999
    with pytest.raises(ValueError, match="t: got 1001, expected 1 to 1000"):
        first_of(GUIDED_DIFFUSION, 1001)
    with pytest.raises(ValueError, match="t: got 0"):
        first_of(GUIDED_DIFFUSION, 0)
    with pytest.raises(ValueError, match="t: got 250, expected 1 to 249 for variant='ds'"):
        rescheduled(GUIDED_DIFFUSION, 250)
