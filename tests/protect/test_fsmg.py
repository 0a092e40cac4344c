"""FSMG: AdvDM against a model that learned the subject, and the targeted term against diffusers' own step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from pumice import protect, testbed
from pumice.models import load
from pumice.protect.aspl import aspl
from pumice.protect.fsmg import fsmg
from pumice.protect.learner import Learner, learners
from pumice.protect.metacloak import metacloak
from pumice.protect.pgd import PGD
from pumice.protect.surrogate import Surrogate
from pumice.testbed import tiny_pipeline, world
from pumice.training.examples import Examples
from pumice.training.student import Student

PROMPT = "a photo of sks person"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


QUICK = {"train_steps": 2, "train_batch_size": 1, "steps": 2, "lr": 1e-3, "prior_weight": 0.0}


def test_against_an_untrained_surrogate_it_is_advdm(pipe, images):
    how = {"eps": 0.025, "step_size": 0.0025, "steps": 4, "seed": 7}
    found = fsmg(images, pipe, PROMPT, train_steps=0, **how)
    assert torch.equal(found, protect.advdm(images, pipe, PROMPT, random_start=False, **how))


def test_it_climbs_the_loss_of_what_dreambooth_made_of_the_model(pipe, images):
    """The surrogate, trained by hand and put into AdvDM, gives the same pictures."""
    clean, of_class = torch.rand(2, 2, 3, 32, 32)
    how = QUICK | {"prior_weight": 0.5}
    found = fsmg(images, pipe, PROMPT, "a person", clean_images=clean, class_images=of_class, **how)
    surrogate = Surrogate(pipe, lr=1e-3)
    subject = Examples(surrogate.model, list(clean), PROMPT)
    surrogate.train([subject, Examples(surrogate.model, list(of_class), "a person", weight=0.5)], 2)
    how = {"eps": 0.025, "step_size": 0.0025, "steps": 2, "random_start": False}
    assert torch.equal(found, protect.advdm(images, surrogate.model, PROMPT, **how))
    assert not torch.equal(found, fsmg(images, pipe, PROMPT, **QUICK))


@pytest.mark.parametrize("mode", ["fp32_master", "bf16_faithful", "lora"])
def test_budget_and_range_and_the_model_stays(images, mode):
    pipe = tiny_pipeline("sd1")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    grads = [weight.requires_grad for weight in pipe.unet.parameters()]
    found = fsmg(images, pipe, surrogate=mode, random_start=True, **QUICK | {"steps": 4, "step_size": 0.01})
    assert 0 <= found.min() and found.max() <= 1
    assert 0.02 < (found - images).abs().max() <= 0.025 + 1e-6
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert grads == [weight.requires_grad for weight in pipe.unet.parameters()]


@pytest.mark.parametrize("mode", ["fp32_master", "lora"])
@pytest.mark.parametrize(("owner", "where"), [(PGD, "_stepped"), (Student, "gather")])
def test_an_interrupt_leaves_the_model_as_it_was(images, mode, owner, where, monkeypatch):
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    pipe = tiny_pipeline("sd1")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    flags = [(module.training, "forward" in vars(module)) for module in pipe.unet.modules()]
    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fsmg(images, pipe, surrogate=mode, **QUICK)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert flags == [(module.training, "forward" in vars(module)) for module in pipe.unet.modules()]
    assert all(weight.grad is None and weight.requires_grad for weight in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("method", "how"),
    [
        (fsmg, QUICK),
        (aspl, {"max_train_steps": 1, "prior_weight": 0.0}),
        (metacloak, {"train_steps": 0, "trials": 1, "rounds": 1, "prior_weight": 0.0}),
    ],
)
def test_a_callers_inference_mode_is_left(pipe, images, method, how):
    expected = method(images, pipe, **how)
    with torch.inference_mode():
        assert torch.equal(method(images, pipe, **how), expected)


def test_several_models_have_a_surrogate_each(images):
    pipes = [tiny_pipeline("sd1"), tiny_pipeline("sd2")]
    together = fsmg(images, pipes, **QUICK)
    for one in pipes:
        assert not torch.equal(together, fsmg(images, one, **QUICK))


def test_the_seed_decides_and_the_batch_does_not(pipe, images):
    first, again, other, by_one = (
        fsmg(images, pipe, seed=seed, batch_size=rows, **QUICK)
        for seed, rows in ((1, None), (1, None), (5, None), (1, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((first - images).sign() == (by_one - images).sign()).double().mean() > 0.999


def test_only_the_class_pictures_that_training_meets_are_drawn(pipe, images, monkeypatch):
    sizes = []
    real = Learner.__init__
    monkeypatch.setattr(
        Learner, "__init__", lambda self, *a: sizes.append([len(each) for each in a[3]]) or real(self, *a)
    )
    fsmg(images, pipe, train_steps=1, train_batch_size=2, steps=1)
    assert sizes == [[2]]


# --- The targeted term


def targeted_loss(pipe, image: Tensor, target: Tensor, draws, t: int, patch) -> Tensor:
    """Of one picture, with the step of diffusers' own scheduler."""
    model = load(pipe)
    posterior, noise, of_step = (
        draws.normal([0], what, 0, (4, 16, 16)) for what in ("posterior", "noise", "ddpm")
    )
    z, embeds = model.encode_image(image[None], noise=posterior), model.encode_prompt(PROMPT)
    z_y = model.encode_image(target[None]).detach()
    z_t = model.add_noise(z, noise, t)
    output = model.predict(z_t, t, embeds)
    patch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **how: of_step)
    stepped = DDPMScheduler.from_config(pipe.scheduler.config).step(output, t, z_t).prev_sample
    wanted = model.add_noise(z_y, noise, t - 1) if t > 0 else z_y
    return (output - model.schedule.target(z, noise, t)).square().sum() - (stepped - wanted).square().sum()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("t", [0, 1, 300, 999])
def test_the_targeted_term_is_the_distance_of_a_ddpm_step_from_the_noised_target(family, t, monkeypatch):
    pipe = tiny_pipeline(family).to(torch.float64)
    image, target = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pgd, (learner,) = learners(
        image[None],
        pipe,
        PROMPT,
        "a person",
        target=target,
        needed=0,
        eps=0.1,
        random_start=False,
        timesteps=[torch.tensor([t])],
    )
    inputs = learner.objective.inputs([0], 0, (32, 32), pgd.draws, pgd.timesteps)
    found = learner.objective.gradient(image[None].double(), *inputs)
    leaf = image.double().requires_grad_()
    targeted_loss(pipe, leaf, target.double(), pgd.draws, t, monkeypatch).backward()
    # diffusers' schedule is float32
    assert (found[0] - leaf.grad).norm() < 1e-4 * leaf.grad.norm()


@torch.no_grad()
def test_a_target_pulls_denoised_latents_to_it():
    pipe = testbed.load()
    images = torch.stack([torch.from_numpy(world.subject(0, picture)) for picture in range(2)])
    target = protect.text_pattern(64, 64)
    model = load(pipe)
    z_y = model.encode_image(target[None])

    def away(pictures: Tensor) -> float:
        """How far the x0 that the model sees in noised latents is from the target's."""
        draw, total = torch.Generator().manual_seed(3), 0.0
        z, embeds = model.encode_image(pictures), model.encode_prompt(PROMPT)
        for t in (100, 300, 500):
            noise = torch.randn(z.shape, generator=draw)
            z_t = model.add_noise(z, noise, t)
            x0 = model.schedule.to_x0(model.predict(z_t, t, embeds), z_t, t)
            total += float((x0 - z_y).square().mean())
        return total

    how = {"train_steps": 0, "steps": 15, "eps": 16 / 255, "step_size": 2 / 255}
    untargeted, targeted = (away(fsmg(images, pipe, PROMPT, target=y, **how)) for y in (None, target))
    assert targeted < untargeted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_steps": -1}, "train_steps: got -1, expected at least 0"),
        ({"train_batch_size": 0}, "train_batch_size: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"eps": 8}, "eps: got 8, expected 0 to 1"),
        ({"prior_weight": -1.0}, "prior_weight: got -1"),
        ({"num_class_images": 0}, "num_class_images: got 0"),
        ({"surrogate": "full"}, "surrogate: got 'full'"),
        ({"lr": float("nan")}, "lr: got nan"),
    ],
)
def test_what_is_out_of_range_is_named(pipe, images, wrong, message):
    with pytest.raises(ValueError, match=message):
        fsmg(images, pipe, **wrong)


@pytest.mark.parametrize("seed", [0, 5])
def test_one_seed_is_that_of_the_first_picture_and_so_on(pipe, images, seed):
    how = QUICK | {"prior_weight": 1.0, "num_class_images": 1}
    first = fsmg(images, pipe, seed=seed, **how)
    assert torch.equal(first, fsmg(images, pipe, seed=[seed, seed + 1], **how))
    assert not torch.equal(first, fsmg(images, pipe, seed=seed + 1, **how))
