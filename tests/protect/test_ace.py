from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from pumice import testbed
from pumice.models import DiffusionModel, UnsupportedModelError, load
from pumice.protect.ace import _objective, ace
from pumice.protect.pgd import PGD
from pumice.protect.surrogate import Surrogate
from pumice.protect.targets import text_pattern
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline

EPS, STEP = 8 / 255, 1 / 255
QUICK = {"epochs": 2, "steps": 2, "train_steps": 1, "prior_weight": 0}


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(3)])


def signs_agree(a: Tensor, b: Tensor, clean: Tensor) -> float:
    return ((a - clean).sign() == (b - clean).sign()).double().mean().item()


@pytest.mark.parametrize("mode", ["lunet", "fused"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_gradient_is_that_of_the_formula(family, mode):
    pipe = tiny_pipeline(family).to(torch.float64)
    surrogate = Surrogate(pipe, "lora", lr=1e-2)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pgd = PGD(images, surrogate.model, eps=EPS, random_start=False)
    objective = _objective(surrogate, "a photo", None, mode, pgd)
    t, noise, z_y = objective.inputs([0, 1], 0, (32, 32), pgd.draws, None)
    found = objective.gradient(images.double(), t, noise, z_y)

    model, leaf = load(pipe), images.double().requires_grad_()
    y = model.encode_image(text_pattern(32, 32)[None]).detach()
    z = model.encode_image(leaf)
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in model.schedule.alpha_sigma(t))
    z_t = alpha * z + sigma * noise
    output = pipe.unet(z_t, t, model.encode_prompt("a photo").embeds.expand(2, -1, -1)).sample
    epsilon = output if family == "sd1" else alpha * output + sigma * z_t
    if mode == "lunet":
        loss = (epsilon - y).square().sum()
    else:
        loss = (epsilon * noise).sum() + 100 * (z - y).square().sum()
    (expected,) = torch.autograd.grad(-loss, leaf)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


@torch.no_grad()
def test_predictions_come_nearer_to_the_target(pipe, pictures):
    model = load(pipe)
    target = model.encode_image(text_pattern(64, 64)[None])
    embeds = model.encode_prompt("a photo of sks person")

    def distance(images: Tensor) -> Tensor:
        draw, z, total = torch.Generator().manual_seed(1), model.encode_image(images), 0.0
        for t in range(50, 1000, 100):
            noise = torch.randn(z.shape, generator=draw)
            epsilon = model.predict_noise(model.add_noise(z, noise, t), t, embeds)
            total = total + (epsilon - target).square().mean((1, 2, 3))
        return total

    protected = ace(
        pictures, pipe, epochs=2, steps=10, train_steps=2, eps=EPS, step_size=STEP, prior_weight=0
    )
    assert (distance(protected) < 0.9 * distance(pictures)).all()
    change = (protected - pictures).abs()
    assert EPS / 4 < change.mean() and change.max() <= EPS + 1e-6


@torch.no_grad()
def test_fused_pulls_the_latents_themselves(pipe, pictures):
    model = load(pipe)
    target = model.encode_image(text_pattern(64, 64)[None])
    protected = ace(pictures, pipe, mode="fused", eps=EPS, step_size=STEP, **{**QUICK, "steps": 4})
    before, after = ((model.encode_image(x) - target).square().sum((1, 2, 3)) for x in (pictures, protected))
    assert (after < 0.8 * before).all()


def test_epochs_climb_and_train_in_turn_on_the_pictures_as_they_are(pipe, pictures, monkeypatch):
    calls, ascend, train = [], PGD.ascend, Surrogate.train

    def spy_ascend(self: PGD, objectives: object, steps: int, *args: object, **kwargs: object) -> None:
        ascend(self, objectives, steps, *args, **kwargs)
        calls.append(("ascend", steps, torch.stack(self.images)))

    def spy_train(self: Surrogate, examples: list, steps: int, **kwargs: object) -> None:
        calls.append(("train", steps, torch.stack(list(examples[0]._pictures))))
        assert [each.prompt for each in examples] == ["a photo of sks person", "a photo of person"]
        assert [each.weight for each in examples] == [1, 0.1]
        train(self, examples, steps, **kwargs)

    monkeypatch.setattr(PGD, "ascend", spy_ascend)
    monkeypatch.setattr(Surrogate, "train", spy_train)
    found = ace(pictures, pipe, epochs=3, steps=2, train_steps=2, class_images=pictures)
    assert [call[:2] for call in calls] == [("ascend", 2), ("train", 2)] * 2 + [("ascend", 2)]
    assert torch.equal(calls[0][2], calls[1][2]) and torch.equal(calls[2][2], calls[3][2])
    assert torch.equal(calls[4][2], found)


def test_what_the_lora_learns_reaches_the_pictures(pipe, pictures):
    still = ace(pictures, pipe, **{**QUICK, "train_steps": 0})
    assert not torch.equal(ace(pictures, pipe, lr=1e-2, **QUICK), still)


def test_the_seed_decides_whatever_the_batch(pipe, pictures):
    first, again, other = (
        ace(pictures, pipe, seed=seed, batch_size=rows, **QUICK) for seed, rows in ((3, 3), (3, 2), (30, 3))
    )
    assert signs_agree(first, again, pictures) > 0.999
    assert signs_agree(first, other, pictures) < 0.9


def test_pictures_of_the_class_are_drawn_no_more_than_are_seen(pipe, pictures, monkeypatch):
    given = []

    def spy(*args: object, **kwargs: object) -> list:
        given.append(kwargs)
        return []

    monkeypatch.setattr(sys.modules["pumice.protect.ace"], "class_examples", spy)
    ace(pictures[:1], pipe, epochs=1, steps=1)
    assert (given[0]["count"], given[0]["needed"], given[0]["weight"]) == (50, 10, 0.1)


def test_several_models_and_little_memory():
    pipes = [tiny_pipeline(family) for family in ("sd1", "sd2")]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = ace(images, pipes, **QUICK)
    assert signs_agree(both, ace(images, pipes, recompute=True, **QUICK), images) > 0.999
    assert signs_agree(both, ace(images, pipes[0], **QUICK), images) < 0.99


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was(error, monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    before = {
        name: (weight.clone(), weight.requires_grad)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder)
        for name, weight in part.named_parameters()
    }
    images, predict, calls = torch.rand(1, 3, 32, 32), DiffusionModel.predict, []

    def failing(self: DiffusionModel, *args: object) -> Tensor:
        calls.append(args)
        if error and len(calls) == 5:
            raise error
        return predict(self, *args)

    monkeypatch.setattr(DiffusionModel, "predict", failing)
    if error:
        with pytest.raises(error):
            ace(images, pipe, lr=1e-2, **QUICK)
    else:
        ace(images, pipe, lr=1e-2, **QUICK)
    assert len(calls) == 5  # two steps, a training step, two steps
    after = {
        name: (weight, weight.requires_grad)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder)
        for name, weight in part.named_parameters()
    }
    assert list(after) == list(before)  # no adapters
    for name, (weight, flag) in after.items():
        assert torch.equal(weight, before[name][0]) and flag == before[name][1]
    assert all(module.training and "forward" not in vars(module) for module in pipe.unet.modules())


def test_adapters_are_refused():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UnsupportedModelError, match="LoRA adapter"):
        ace(torch.rand(1, 3, 32, 32), pipe, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "unet"}, ValueError, "mode: got 'unet', expected 'lunet' or 'fused'"),
        ({"epochs": 0}, ValueError, "epochs: got 0, expected at least 1"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"train_steps": -1}, ValueError, "train_steps: got -1"),
        ({"lr": -1.0}, ValueError, "lr: got -1"),
        ({"prior_weight": -1.0}, ValueError, "prior_weight: got -1"),
        ({"num_class_images": 0}, ValueError, "num_class_images: got 0"),
        ({"eps": 4}, ValueError, "eps: got 4"),
        ({"prompt": None}, TypeError, "prompt: got a NoneType"),
        ({"target": torch.zeros(3, 8, 8)}, ValueError, "target: got shape"),
    ],
)
def test_bad_arguments(pipe, pictures, arguments, error, message):
    with pytest.raises(error, match=message):
        ace(pictures, pipe, **arguments)
