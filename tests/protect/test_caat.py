from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from pumice import ops, protect, testbed
from pumice.models import DiffusionModel, UnsupportedModelError, load
from pumice.models.draws import Draws
from pumice.models.memory import peak_bytes
from pumice.protect.caat import _Adversaries, caat
from pumice.protect.cost import ChecksPass
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline

EPS, STEP = 8 / 255, 1 / 255
PROMPT = "a photo of a person"


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(3)])


def weights(pipe) -> list[Tensor]:
    layers = load(pipe).cross_attention.values()
    return [linear.weight for layer in layers for linear in (layer.to_k, layer.to_v)]


def signs_agree(a: Tensor, b: Tensor, clean: Tensor) -> float:
    return ((a - clean).sign() == (b - clean).sign()).double().mean().item()


@pytest.fixture
def seen(monkeypatch) -> list[list[Tensor]]:
    """What to_k and to_v are at each pass."""
    found, predict = [], DiffusionModel.predict

    def spy(self: DiffusionModel, *args: object) -> Tensor:
        found.append([weight.detach().clone() for weight in weights(self)])
        return predict(self, *args)

    monkeypatch.setattr(DiffusionModel, "predict", spy)
    return found


def plainly(pipe, pictures: Tensor, steps: int, lr: float) -> tuple[Tensor, list[Tensor]]:
    """CAAT by autograd and AdamW on a copy of the pipeline; the pictures, and K and V of the last step."""
    model, count = load(copy.deepcopy(pipe)), len(pictures)
    draws = Draws([f"{seed}/0" for seed in range(count)], torch.device("cpu"))
    trained, everyone = weights(model.pipe), range(count)
    optimizer = torch.optim.AdamW(trained, lr=lr)
    with torch.no_grad():
        embeds = model.encode_prompt(PROMPT)
    x = pictures
    for step in range(steps):
        last = [weight.detach().clone() for weight in trained]
        leaf = x.clone().requires_grad_()
        t = draws.integers(everyone, "timestep", step, 1000)
        posterior, noise = (draws.normal(everyone, what, step, (8, 8, 8)) for what in ("posterior", "noise"))
        z = model.encode_image(leaf, noise=posterior)
        output = model.predict(model.add_noise(z, noise, t), t, embeds)
        optimizer.zero_grad()
        (output - model.schedule.target(z, noise, t)).square().mean().backward()
        x = ops.pgd_step(x, leaf.grad, pictures, step_size=STEP, eps=EPS)
        optimizer.step()
    return x, last


@pytest.mark.parametrize("batch_size", [3, 2])
def test_it_is_the_plain_loop_whatever_the_batch(pipe, pictures, seen, batch_size):
    steps, lr = 4, 1e-3
    expected, kv = plainly(pipe, pictures, steps, lr)
    seen.clear()
    found = caat(pictures, pipe, lr=lr, eps=EPS, step_size=STEP, steps=steps, batch_size=batch_size)
    assert signs_agree(found, expected, pictures) > 0.999
    moved = torch.cat([(a - b).flatten() for a, b in zip(kv, weights(pipe), strict=True)])
    error = torch.cat([(a - b).flatten() for a, b in zip(kv, seen[-1], strict=True)])
    assert moved.abs().median() > lr
    assert error.norm() < 0.01 * moved.norm()


def test_pictures_of_several_sizes_train_it_together(monkeypatch):
    pipe, generator = tiny_pipeline("sd1"), torch.Generator().manual_seed(0)
    model = load(pipe)
    objective = _Adversaries(model, PROMPT, weights(pipe), 1e-3, 3)
    images = [torch.rand(count, 3, 32, width, generator=generator) for count, width in ((2, 32), (1, 48))]
    draws = Draws(["0/0", "1/0", "2/0"], torch.device("cpu"))
    losses = []
    for numbers, stack in zip(([0, 1], [2]), images, strict=True):
        inputs = objective.inputs(numbers, 0, tuple(stack.shape[2:]), draws, None)
        objective.gradient(stack, *inputs)
        noise, t, epsilon = inputs
        with torch.no_grad():
            z = model.encode_image(stack, noise=noise)
        output = model.predict(model.add_noise(z, epsilon, t), t, objective._embeds)
        losses += list((output - epsilon).square().mean((1, 2, 3)))
    objective._add((32, 48))
    objective._learn()
    expected = torch.autograd.grad(sum(losses) / 3, weights(pipe))
    for master, gradient in zip(objective._masters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient, rtol=1e-4, atol=1e-8)


def test_a_pass_that_runs_out_of_memory_counts_once(pipe, pictures, seen, monkeypatch):
    how = {"lr": 1e-3, "eps": EPS, "step_size": STEP, "steps": 3}
    expected = caat(pictures, pipe, batch_size=1, **how)
    kv = seen[-1]
    vjp, passes = DiffusionModel.vjp, []

    def limited(self: DiffusionModel, images: Tensor, *args: object, **kwargs: object) -> Tensor:
        passes.append(len(images))
        if len(images) == 1 and len(passes) < 3:  # the second pass of the first step
            vjp(self, images, *args, **kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return vjp(self, images, *args, **kwargs)

    monkeypatch.setattr(DiffusionModel, "vjp", limited)
    found = caat(pictures, pipe, batch_size=2, **how)
    assert passes[:5] == [2, 1, 1, 1, 1]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], kv, strict=True))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_without_learning_it_is_advdm(family):
    pipe = tiny_pipeline(family)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    how = {"eps": EPS, "step_size": STEP, "random_start": False}
    # the first step sees the model as it is
    assert torch.equal(
        caat(images, pipe, steps=1, **how), protect.advdm(images, pipe, PROMPT, steps=1, **how)
    )
    still = caat(images, pipe, lr=0, steps=3, **how)
    assert torch.equal(still, protect.advdm(images, pipe, PROMPT, steps=3, **how))
    assert not torch.equal(still, caat(images, pipe, lr=1e-2, steps=3, **how))


@torch.no_grad()
def test_cross_attention_learns_the_pictures(pipe, pictures, seen):
    model, subject = load(copy.deepcopy(pipe)), pictures[:1]

    def loss() -> float:
        draw, total = torch.Generator().manual_seed(1), 0.0
        z, embeds = model.encode_image(subject), model.encode_prompt(PROMPT)
        for t in range(50, 1000, 50):
            noise = torch.randn(z.shape, generator=draw)
            output = model.predict(model.add_noise(z, noise, t), t, embeds)
            total += float((output - model.schedule.target(z, noise, t)).square().mean())
        return total

    before = loss()
    caat(subject, pipe, lr=1e-3, eps=1 / 255, step_size=1e-4, steps=30)
    for weight, learned in zip(weights(model), seen[-1], strict=True):
        weight.copy_(learned)
    assert loss() < 0.9 * before


def test_half_precision_networks_learn_in_single_precision(pictures, seen):
    lr = 5e-5
    caat(pictures[:1], testbed.load(dtype=torch.bfloat16), lr=lr, eps=EPS, step_size=STEP, steps=12)
    first, last = (torch.cat([weight.flatten() for weight in each]) for each in (seen[0], seen[-1]))
    assert first.dtype == torch.bfloat16
    # beside these a step would be lost
    coarse = (first + 2 * lr == first) & (first - 2 * lr == first)
    assert coarse.double().mean() > 0.3
    assert (last != first)[coarse].double().mean() > 0.2


def test_what_overflows_moves_nothing(pictures, seen, monkeypatch):
    denoise = _Adversaries._denoise

    def overflowing(self: _Adversaries, *args: Tensor) -> Tensor:
        found = denoise(self, *args)
        self._gradients[0][0] = torch.inf
        self._gradients[1][0] = torch.nan
        return found

    monkeypatch.setattr(_Adversaries, "_denoise", overflowing)
    caat(pictures[:1, :, :32, :32], tiny_pipeline("sd1"), lr=1e-2, steps=4)
    assert all(weight.isfinite().all() for weight in seen[-1])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_pipeline_is_left_as_it_was(error, seen, monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    weights(pipe)[1].requires_grad_(False)
    before = [
        (name, weight, weight.clone(), weight.requires_grad) for name, weight in pipe.unet.named_parameters()
    ]
    images = torch.rand(1, 3, 32, 32)
    if error:
        step = ops.pgd_step

        def fail(*args: object, **kwargs: object) -> Tensor:
            if len(seen) == 3:
                raise error
            return step(*args, **kwargs)

        monkeypatch.setattr(sys.modules["pumice.protect.pgd"].ops, "pgd_step", fail)
        with pytest.raises(error):
            caat(images, pipe, lr=1e-2, steps=9)
    else:
        caat(images, pipe, lr=1e-2, steps=3)
    assert all((a != b).any() for a, b in zip(seen[0], seen[-1], strict=True))  # it learned on the way
    for (name, weight, value, flag), (name_now, weight_now) in zip(
        before, pipe.unet.named_parameters(), strict=True
    ):
        assert name == name_now and weight is weight_now and weight.requires_grad == flag
        assert torch.equal(weight, value)
    assert all(module.training and "forward" not in vars(module) for module in pipe.unet.modules())


def test_projections_that_are_not_read_are_refused():
    pipe = tiny_pipeline("sd1")
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        caat(torch.rand(1, 3, 32, 32), pipe, steps=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1e-5}, ValueError, "lr: got -1e-05"),
        ({"steps": 0}, ValueError, "steps: got 0, expected at least 1"),
        ({"eps": 13}, ValueError, "eps: got 13"),
        ({"prompt": None}, TypeError, "prompt: got a NoneType"),
    ],
)
def test_bad_arguments(pipe, pictures, arguments, error, message):
    with pytest.raises(error, match=message):
        caat(pictures, pipe, **arguments)


def test_a_pass_reads_nothing_back(pipe, pictures):
    model = load(pipe)
    objective = _Adversaries(model, PROMPT, weights(pipe), 1e-3, 3)
    draws = Draws(["0/0", "1/0", "2/0"], torch.device("cpu"))
    inputs = objective.inputs([0, 1, 2], 0, (64, 64), draws, None)

    def work() -> None:
        with ChecksPass():
            objective.gradient(pictures, *inputs)

    with model.frozen(data_gradient=True):
        assert peak_bytes(work) > pictures.nbytes  # on fake tensors, of which no number can be read
    assert not any(gradient.any() for gradient in objective._gradients)
