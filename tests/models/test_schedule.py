from __future__ import annotations

import diffusers
import pytest
import torch

from pumice.models import NoiseSchedule, UnsupportedModelError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(**config) -> NoiseSchedule:
    return NoiseSchedule.from_config(diffusers.DDIMScheduler(**BETAS | config).config)


def sample(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype)


def test_noise_levels_follow_the_closed_form():
    betas = (
        torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    )
    expected = (1 - betas).cumprod(0)
    assert schedule().alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule().alphas_cumprod, expected, rtol=2e-5, atol=0)
    alpha, sigma = schedule().alpha_sigma(torch.tensor([0, 999]))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [0, 500, torch.tensor(999), torch.tensor([1, 500, 999])])
def test_every_prediction_converts_to_the_truth(prediction_type, timesteps):
    noise_schedule = schedule(prediction_type=prediction_type)
    x0, noise = sample()
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in noise_schedule.alpha_sigma(timesteps))
    x_t = noise_schedule.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
    output = noise_schedule.target(x0, noise, timesteps)
    torch.testing.assert_close(noise_schedule.to_epsilon(output, x_t, timesteps), noise)
    torch.testing.assert_close(noise_schedule.to_x0(output, x_t, timesteps), x0)
    torch.testing.assert_close(noise_schedule.to_v(output, x_t, timesteps), alpha * noise - sigma * x0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("timesteps", [700, torch.tensor([700, 700, 700])])
def test_half_precision_is_converted_in_float32(dtype, timesteps):
    noise_schedule = schedule(prediction_type="v_prediction")
    output, x_t = sample(dtype)
    actual = noise_schedule.to_x0(output, x_t, timesteps)
    assert actual.dtype == torch.float32
    expected = noise_schedule.to_x0(output.double(), x_t.double(), timesteps)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_conversions_agree_with_diffusers():
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)
    noise_schedule = NoiseSchedule.from_config(scheduler.config)
    x0, noise = sample(torch.float32)
    t = torch.tensor([3, 400, 900])
    torch.testing.assert_close(noise_schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(noise_schedule.target(x0, noise, t), scheduler.get_velocity(x0, noise, t))


@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("steps", "offset"), [(1, 0), (7, 1), (50, 1), (999, 0)])
def test_timesteps_are_those_of_diffusers_ddim(kind, spacing, steps, offset):
    config = getattr(diffusers, f"{kind}Scheduler")(
        **BETAS, timestep_spacing=spacing, steps_offset=offset
    ).config
    ddim = diffusers.DDIMScheduler.from_config(config)
    ddim.set_timesteps(steps)
    assert torch.equal(NoiseSchedule.from_config(config).timesteps(steps), ddim.timesteps)


@pytest.mark.parametrize("kind", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "LCM"])
def test_what_the_config_leaves_open_is_as_diffusers_switches_to_ddim(kind):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**BETAS)
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(7)
    noise_schedule = NoiseSchedule.from_config(scheduler.config)
    assert torch.equal(noise_schedule.timesteps(7), ddim.timesteps)
    assert noise_schedule.final_alpha_cumprod == ddim.final_alpha_cumprod


def test_noise_levels_are_the_schedulers_own_even_by_default():
    scheduler = diffusers.LCMScheduler()  # scaled_linear by default, where DDIM is linear
    noise_schedule = NoiseSchedule.from_config(scheduler.config)
    assert torch.equal(noise_schedule.alphas_cumprod, scheduler.alphas_cumprod.double())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_coefficients_make_the_steps_of_diffusers(spacing, one, prediction_type):
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        set_alpha_to_one=one,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    noise_schedule = NoiseSchedule.from_config(scheduler.config)
    scheduler.set_timesteps(7)
    x, output = sample()
    for t, coefficients in zip(noise_schedule.timesteps(7), noise_schedule.ddim_coefficients(7), strict=True):
        alpha, sigma, alpha_prev, sigma_prev = coefficients
        assert torch.equal(torch.stack((alpha, sigma)), torch.stack(noise_schedule.alpha_sigma(t)))
        epsilon, x0 = (convert(output, x, t) for convert in (noise_schedule.to_epsilon, noise_schedule.to_x0))
        expected = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(alpha_prev * x0 + sigma_prev * epsilon, expected, rtol=1e-6, atol=1e-6)


class TestZeroTerminalSnr:
    def test_a_v_model_is_exact_at_pure_noise(self):
        noise_schedule = schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        x0, noise = sample()
        assert noise_schedule.zero_terminal_snr
        v = noise_schedule.target(x0, noise, 999)
        torch.testing.assert_close(noise_schedule.to_x0(v, noise, 999), x0)
        torch.testing.assert_close(noise_schedule.to_epsilon(v, noise, 999), noise)

    @pytest.mark.parametrize("timesteps", [999, torch.tensor([1, 2, 999])])
    def test_an_epsilon_model_is_refused_where_x0_is_not_determined(self, timesteps):
        noise_schedule = schedule(rescale_betas_zero_snr=True, prediction_type="epsilon")
        x0, noise = sample()
        for convert in (noise_schedule.to_x0, noise_schedule.to_v):
            with pytest.raises(ValueError, match=r"timesteps: 999 is pure noise \(alpha = 0\)"):
                convert(noise, x0, timesteps)
        assert noise_schedule.to_x0(noise, x0, 998).isfinite().all()
        assert torch.equal(noise_schedule.to_epsilon(noise, x0, timesteps), noise)

    def test_schedulers_that_avoid_infinities_do_not_change_the_schedule(self):
        euler = diffusers.EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True)
        assert euler.alphas_cumprod[-1] > 0
        assert NoiseSchedule.from_config(euler.config).alphas_cumprod[-1] == 0


class TestBadInput:
    def test_timesteps(self):
        x0, noise = sample()
        with pytest.raises(ValueError, match="timesteps: got values from 0 to 1000, expected 0 to 999"):
            schedule().add_noise(x0, noise, torch.tensor([0, 1000, 1]))
        with pytest.raises(ValueError, match="timesteps: got values from -1 to -1"):
            schedule().alpha_sigma(-1)
        with pytest.raises(ValueError, match=r"timesteps: got shape \(2,\), expected \(\) or \(3,\)"):
            schedule().add_noise(x0, noise, torch.tensor([1, 2]))
        with pytest.raises(TypeError, match=r"timesteps: got torch.float32, expected integers"):
            schedule().alpha_sigma(torch.tensor([0.5]))

    @pytest.mark.parametrize("steps", [0, -1, 1001])
    def test_steps(self, steps):
        with pytest.raises(ValueError, match=f"num_inference_steps: got {steps}, expected 1 to 1000"):
            schedule().timesteps(steps)

    def test_steps_that_leave_the_schedule(self):
        with pytest.raises(ValueError, match="num_inference_steps: 1000 with the model's steps_offset 1"):
            schedule(steps_offset=1).timesteps(1000)

    def test_other_kinds_of_schedules(self):
        with pytest.raises(UnsupportedModelError, match="scheduler: has no beta_schedule"):
            NoiseSchedule.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
        with pytest.raises(UnsupportedModelError, match="prediction_type is 'sample'"):
            schedule(prediction_type="sample")
        with pytest.raises(UnsupportedModelError, match="beta_schedule is 'sigmoid'"):
            NoiseSchedule.from_config(diffusers.DDPMScheduler(beta_schedule="sigmoid").config)
