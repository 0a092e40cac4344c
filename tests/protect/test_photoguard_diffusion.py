"""The attack through the sampler, against a sampler of diffusers' own taken apart by autograd."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

from pumice import testbed
from pumice.models import DiffusionModel, load
from pumice.models.draws import Draws
from pumice.models.memory import _Live
from pumice.protect.photoguard_diffusion import Img2Img, ddim_steps, photoguard_diffusion
from pumice.protect.random_noise import random_noise
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline

module = sys.modules["pumice.protect.photoguard_diffusion"]
SHORT = {"num_inference_steps": 2, "grad_reps": 3, "steps": 2}  # one call of the denoiser a step
FAMILIES = ["sd1", "sd2", "sdxl"]


def images(count: int, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(2)])


def published(model: DiffusionModel, image: Tensor, noise: Tensor, y: Tensor, steps: int) -> Tensor:
    """The loss of one repetition as the authors compute it: both branches, one draw, no rewriting."""
    strength, guidance = 0.5, 7.5
    pipe, scheduler = model.pipe, DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[steps - int(steps * strength) :]
    posterior = pipe.vae.encode(image[None] * 2 - 1).latent_dist
    z = (posterior.mean + posterior.std * noise[:1]) * pipe.vae.config.scaling_factor
    x = scheduler.add_noise(z, noise[1:2], timesteps[:1])
    empty = model.encode_prompt(["", ""])
    for index, t in enumerate(timesteps):
        uncond, cond = model.predict(torch.cat([x, x]), t, empty).chunk(2)
        guided = uncond + guidance * (cond - uncond)
        added = noise[2 + index : 3 + index]
        x = scheduler.step(guided, t, x, eta=1.0, variance_noise=added).prev_sample
    drawn = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (drawn - (2 * y - 1)).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_published_loop(family):
    model = load(tiny_pipeline(family))
    clean, reps, steps = images(2), 2, 6
    targets = list(images(2, seed=1))
    objective = Img2Img(model, ddim_steps(model.schedule, 0.5, steps, 1.0), targets, reps, reps)
    inputs = objective.inputs([0, 1], 0, (32, 32), Draws(["0", "1"], model.device), None)
    assert inputs[0].shape == (2, reps, 2 + 3, *model.latent_shape(32, 32))
    with model.frozen(data_gradient=True):
        found = objective.gradient(clean, *inputs)
    for image, noise, y, mine in zip(clean, inputs[0], targets, found, strict=True):
        leaf = image.clone().requires_grad_()
        for rep in noise:
            published(model, leaf, rep, y, steps).backward()
        # their loss is of pictures in [-1, 1], ours is scaled by the root of the number of values
        expected = -leaf.grad / 2 * image.numel() ** 0.5
        assert (mine - expected).norm() < 1e-3 * expected.norm()
        assert torch.nn.functional.cosine_similarity(mine.flatten(), expected.flatten(), dim=0) > 1 - 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_steps_are_those_of_diffusers_ddim(family, eta):
    schedule = load(tiny_pipeline(family)).schedule
    scheduler = DDIMScheduler.from_config(tiny_pipeline(family).scheduler.config)
    steps = ddim_steps(schedule, 0.6, 10, eta)
    scheduler.set_timesteps(10)
    assert [step.t for step in steps] == scheduler.timesteps[4:].tolist()
    x, output, noise = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for step in steps:
        expected = scheduler.step(output, step.t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(
            step.x * x + step.output * output + step.noise * noise, expected, rtol=1e-4, atol=1e-5
        )
        assert (step.noise == 0) == (eta == 0)


@pytest.mark.parametrize(
    ("norm", "how"),
    [
        ("l2", {"recompute": True}),
        ("linf", {"reps_per_pass": 2}),
        ("l2", {"batch_size": 1}),
        ("linf", {"reps_per_pass": 1, "eta": 0.5, "recompute": True}),
    ],
)
def test_every_way_to_the_gradient_is_the_same(norm, how):
    pipe, clean = tiny_pipeline("sd1"), images(2)
    settings = SHORT | {"norm": norm, "num_inference_steps": 4, "eta": how.get("eta", 1.0)}
    found = photoguard_diffusion(clean, pipe, **settings | how)
    expected = photoguard_diffusion(clean, pipe, **settings)
    assert (found - expected).abs().gt(1e-5).double().mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_pictures_alone(family):
    pipe, clean = tiny_pipeline(family), images(2)
    batch = photoguard_diffusion(clean, pipe, seed=4, **SHORT)
    alone = [photoguard_diffusion(clean[i : i + 1], pipe, seed=4 + i, **SHORT) for i in range(2)]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=0, atol=1e-5)
    assert not torch.equal(batch, photoguard_diffusion(clean, pipe, seed=40, **SHORT))


def test_budgets_and_the_mask_hold():
    pipe, clean = tiny_pipeline("sd1"), images(2)
    mask = torch.zeros(32, 32)
    mask[8:24] = 1
    how = SHORT | {"steps": 3, "mask": mask}
    within = photoguard_diffusion(clean, pipe, eps=0.6, step_size=0.5, **how) - clean
    assert within.flatten(1).norm(dim=1).max() <= 0.6 + 1e-5
    assert within.flatten(1).norm(dim=1).min() > 0.4
    assert within.abs().max() > 0.02  # not a budget for each value
    bounded = photoguard_diffusion(clean, pipe, norm="linf", eps=0.005, **how) - clean
    assert bounded.abs().max() <= 0.005 + 1e-6
    for change in (within, bounded):
        assert not change[..., mask == 0].any() and change[..., mask == 1].any()


def test_the_first_step_is_as_long_as_it_says():
    pipe, clean = tiny_pipeline("sd1"), 0.3 + 0.4 * images(2)
    change = photoguard_diffusion(clean, pipe, **SHORT | {"steps": 1}) - clean
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.tensor([0.5, 0.5]), rtol=1e-4, atol=0)


def drawn(pipe: object, pictures: Tensor, num_inference_steps: int) -> Tensor:
    """What diffusers' img2img makes of pictures, from noises that the attack does not know."""
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    img2img = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(pictures))]
    how = {"strength": 0.5, "num_inference_steps": num_inference_steps, "output_type": "pt"}
    return img2img([""] * len(pictures), pictures, generator=generators, **how).images


def test_img2img_draws_what_is_nearer_to_the_target(pipe, pictures):
    how = {"norm": "linf", "eps": 16 / 255, "step_size": 4 / 255, "steps": 8, "grad_reps": 2}
    protected = photoguard_diffusion(pictures, pipe, num_inference_steps=4, **how)
    noisy = random_noise(pictures, eps=16 / 255)

    clean, attacked, control = (
        (drawn(pipe, images, 12) - 0.5).flatten(1).norm(dim=1)  # more steps than the attack's two of four
        for images in (pictures, protected, noisy)
    )
    assert (attacked < 0.93 * clean).all() and (attacked < 0.93 * control).all()


def test_a_target_is_a_picture_for_all_or_one_for_each(tmp_path):
    pipe, clean = tiny_pipeline("sd1"), images(2)
    each = images(2, seed=1)
    found = photoguard_diffusion(clean, pipe, each, **SHORT)
    for number in range(2):
        alone = photoguard_diffusion(clean[number : number + 1], pipe, each[number], seed=number, **SHORT)
        torch.testing.assert_close(found[number], alone[0], rtol=0, atol=1e-5)
    grey = photoguard_diffusion(clean, pipe, torch.full((3, 32, 32), 0.5), **SHORT)
    assert torch.equal(grey, photoguard_diffusion(clean, pipe, **SHORT))


def test_several_models_add_their_gradients():
    both = [tiny_pipeline("sd1"), tiny_pipeline("sd2")]
    clean = images(1)
    how = SHORT | {"steps": 1, "step_size": 0.1}
    together, *each = (photoguard_diffusion(clean, pipe, **how) - clean for pipe in (both, *both))
    overlaps = [(together * one).sum() / (together.norm() * one.norm()) for one in each]
    assert min(overlaps) > 0.1 and max(overlaps) < 0.999


def test_half_precision_networks_give_the_direction():
    clean = 0.2 + 0.6 * images(1)
    how = SHORT | {"steps": 1}
    exact = photoguard_diffusion(clean, tiny_pipeline("sd1"), **how) - clean
    found = photoguard_diffusion(clean, tiny_pipeline("sd1").to(torch.bfloat16), **how) - clean
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.95


def test_the_denoiser_is_called_once_for_all_repetitions_of_a_step(monkeypatch):
    pipe = tiny_pipeline("sd1")
    calls: dict[str, list[int]] = {"predict": [], "encode_image": [], "encode_prompt": []}
    for name, log in calls.items():
        real = getattr(DiffusionModel, name)

        def spy(self: DiffusionModel, x: object, *rest: object, real=real, log=log, **more: object) -> object:
            log.append(len(x))
            return real(self, x, *rest, **more)

        monkeypatch.setattr(DiffusionModel, name, spy)
    photoguard_diffusion(images(2), pipe, steps=2, grad_reps=5, num_inference_steps=8, batch_size=2)
    assert calls["predict"] == [2 * 5] * 4 * 2  # no second branch, four steps of the sampler
    assert calls["encode_image"][-2:] == [2] * 2  # once a step, not once a repetition
    assert calls["encode_prompt"] == [len("")]


def test_recompute_keeps_one_call_of_the_denoiser_at_a_time():
    model, clean = load(tiny_pipeline("sd1")), images(1)

    def peak(steps: int, recompute: bool) -> int:
        taken = ddim_steps(model.schedule, 0.5, steps, 0.0)
        objective = Img2Img(model, taken, [clean[0]], 2, 2)
        inputs = objective.inputs([0], 0, (32, 32), Draws(["0"], model.device), None)
        with model.frozen(data_gradient=True), _Live() as memory:
            objective.gradient(clean, *inputs, recompute=recompute)
        return memory.peak

    assert peak(8, False) > 1.5 * peak(2, False)
    assert peak(8, True) < 1.1 * peak(2, True) < peak(8, False)


def state(pipe: object) -> list[object]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return [pipe.scheduler.timesteps.tolist()] + [
        (
            name,
            module.training,
            "forward" in vars(module),
            [(p.requires_grad, p.sum().item()) for p in module.parameters(recurse=False)],
        )
        for part in parts.values()
        for name, module in part.named_modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was(error, monkeypatch):
    pipe = tiny_pipeline("sdxl")
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    before = state(pipe)
    if error:

        def fail(*_: object, **__: object) -> None:
            raise error("on the way")

        monkeypatch.setattr(module.vae, "decode", fail)
        with pytest.raises(error, match="on the way"):
            photoguard_diffusion(images(1), pipe, **SHORT)
    else:
        photoguard_diffusion(images(1), pipe, **SHORT)
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": "l1"}, ValueError, "norm: got 'l1'"),
        ({"eps": -1.0}, ValueError, "eps: got -1"),
        ({"eps": 8, "norm": "linf"}, ValueError, "eps: got 8, expected 0 to 1"),
        ({"eta": 1.5}, ValueError, "eta: got 1.5, expected 0 to 1"),
        ({"strength": 0.1}, ValueError, "strength: got 0.1, expected 0.125, one step, to 1"),
        ({"strength": 1.1}, ValueError, "strength: got 1.1"),
        ({"strength": float("nan")}, ValueError, "strength: got nan"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
        ({"grad_reps": 0}, ValueError, "grad_reps: got 0"),
        ({"reps_per_pass": 0}, ValueError, "reps_per_pass: got 0"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"target": torch.zeros(3, 16, 16)}, ValueError, r"target: got shape \(3, 16, 16\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        photoguard_diffusion(images(1), tiny_pipeline("sd1"), **arguments)
