from __future__ import annotations

import sys

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from pumice import ops, protect, testbed
from pumice.models import DiffusionModel, UnsupportedModelError, load
from pumice.models.draws import Draws
from pumice.models.memory import peak_bytes
from pumice.protect.cost import ChecksPass
from pumice.protect.latent import denoising_gradient
from pumice.protect.pgd import PGD
from pumice.protect.simac import _Search, select_timesteps, simac
from pumice.testbed import world
from pumice.testbed.tiny import tiny_pipeline

EPS, STEP = 8 / 255, 0.0025
PROMPT = "a photo of sks person"


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.stack([torch.from_numpy(world.subject(index, 0)) for index in range(2)])


def one_by_one(pipe, image: Tensor, seed: int, rounds: int, window: int, remaining: int) -> list[int]:
    """The selection of one picture, one candidate after the other, by autograd through the bare networks."""
    model, draws = load(pipe), Draws([f"{seed}/0"], torch.device("cpu"))
    with torch.no_grad():
        embeds = model.encode_prompt(PROMPT)
    allowed, clean, x = list(range(1000)), image[None], image[None]
    for round in range(rounds):
        if len(allowed) <= remaining:
            break
        share = draws.uniform([0], "candidates", round, (5,))[0]
        candidates = [allowed[int(u * len(allowed))] for u in share]
        posterior, noise = (
            draws.normal([0], f"candidate {what}", round, (5, 8, 8, 8))[0] for what in ("posterior", "noise")
        )
        gradients = []
        for k, t in enumerate(candidates):
            leaf = x.clone().requires_grad_()
            z = model.encode_image(leaf, noise=posterior[k : k + 1])
            output = model.predict(model.add_noise(z, noise[k : k + 1], t), t, embeds)
            (output - model.schedule.target(z, noise[k : k + 1], t)).square().sum().backward()
            gradients.append(leaf.grad)
        sums = [float(gradient.abs().sum()) for gradient in gradients]
        worst = candidates[sums.index(min(sums))]
        x = ops.pgd_step(x, gradients[sums.index(max(sums))], clean, step_size=STEP, eps=EPS)
        allowed = [t for t in allowed if not worst - window <= t <= worst + window]
    return allowed


def test_windows_are_those_of_the_serial_search(pipe, pictures):
    found = select_timesteps(pictures, pipe, rounds=4, seed=[4, 9])
    for image, seed, timesteps in zip(pictures, [4, 9], found, strict=True):
        assert timesteps.dtype == torch.int64
        assert timesteps.tolist() == one_by_one(pipe, image, seed, 4, 20, 100)
    assert not torch.equal(*found)


def test_it_ends_when_few_remain(pipe, pictures):
    (found,) = select_timesteps(pictures[:1], pipe, window=60, remaining=600)
    assert 600 - 121 < len(found) <= 600  # the last window takes 121 at most
    assert found.tolist() == one_by_one(pipe, pictures[0], 0, 50, 60, 600)


def test_defaults_leave_at_most_a_hundred():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = select_timesteps(images, tiny_pipeline("sd1"))
    assert 100 - 41 < len(found) <= 100
    assert torch.equal(found, found.unique())


def test_a_batch_is_its_pictures_alone(pipe, pictures):
    how = {"rounds": 3}
    batch = select_timesteps(pictures, pipe, seed=3, **how)
    alone = [select_timesteps(pictures[i : i + 1], pipe, seed=3 + i, **how)[0] for i in range(2)]
    smaller = select_timesteps(pictures, pipe, seed=3, batch_size=1, **how)
    for one, other, third in zip(batch, alone, smaller, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_another_method_draws_only_what_was_selected(pipe, pictures, monkeypatch):
    drawn = []

    def spy(model: DiffusionModel, z: Tensor, t: Tensor, *rest: object) -> Tensor:
        drawn.append(t.clone())
        return denoising_gradient(model, z, t, *rest)

    timesteps = select_timesteps(pictures, pipe, rounds=3, window=150, remaining=400)
    monkeypatch.setattr(sys.modules["pumice.protect.advdm"], "denoising_gradient", spy)
    protect.advdm(pictures, pipe, steps=20, timesteps=timesteps)
    for seen, allowed in zip(torch.stack(drawn).T, timesteps, strict=True):
        assert set(seen.tolist()) <= set(allowed.tolist())
        assert len(seen.unique()) > 10


def test_simac_is_aspl_at_the_timesteps_that_were_selected(pipe, pictures, monkeypatch):
    given, drawn = {}, []

    def select(images: Tensor, pipe: object, prompt: str, **how: object) -> list[Tensor]:
        given.update(how, prompt=prompt)
        return [torch.tensor([40, 50]), torch.tensor([800])]

    def spy(model: DiffusionModel, z: Tensor, t: Tensor, *rest: object) -> Tensor:
        drawn.append(t.clone())
        return denoising_gradient(model, z, t, *rest)

    monkeypatch.setattr(sys.modules["pumice.protect.simac"], "select_timesteps", select)
    monkeypatch.setattr(sys.modules["pumice.protect.learner"], "denoising_gradient", spy)
    how = {"max_train_steps": 2, "max_f_train_steps": 1, "prior_weight": 0, "lr": 1e-4, "seed": 5}
    protected = simac(pictures, pipe, **how)
    assert given == {"prompt": PROMPT, "eps": EPS, "step_size": STEP, "seed": 5}
    first, second = torch.stack(drawn).T
    assert set(first.tolist()) == {40, 50} and set(second.tolist()) == {800}
    assert len(first) == 2 * 6
    change = (protected - pictures).abs()
    assert 12 * STEP / 4 < change.mean() and change.max() <= EPS + 1e-6


@pytest.mark.parametrize("wrong", [{}, {"surrogate": "fp16"}], ids=["LoRA-wrapped", "mode"])
def test_what_cannot_be_trained_is_told_before_timesteps_are_sought(pictures, monkeypatch, wrong):
    pipe = testbed.load()
    if not wrong:
        pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    monkeypatch.setattr(PGD, "ascend", lambda *_, **__: pytest.fail("sought"))
    with pytest.raises((UnsupportedModelError, ValueError), match=r"LoRA adapter|surrogate: got 'fp16'"):
        simac(pictures, pipe, **wrong)


def test_it_begins_with_the_timesteps_that_are_given(pipe, pictures):
    begin = [torch.arange(300, 450), torch.tensor([7, 7, 3])]
    found = select_timesteps(pictures, pipe, rounds=2, timesteps=begin)
    assert set(found[0].tolist()) < set(range(300, 450))
    assert found[1].tolist() == [3, 7]  # few enough already


def test_parts_of_a_picture_have_their_timesteps_in_common(pipe, pictures):
    pgd = PGD(pictures, pipe, eps=EPS, random_start=False)
    pgd.pictures.parts = [(0, 0), (0, 1)]  # two tiles of one picture
    pgd.pictures.given = 1
    search = _Search(pgd, PROMPT, 3)
    search.draw(pgd.draws, 0)
    _, t, *_ = search.inputs([0, 1], 0, (64, 64), pgd.draws, None)
    assert torch.equal(t[0], t[1])
    pgd.ascend([search], 1, STEP)
    first, second = search._sums.clone()
    assert (first != second).all()
    search.forbid([0], 20)
    worst = t[0, (first + second).argmin()]
    assert torch.equal(search.allowed[0], torch.tensor([u for u in range(1000) if abs(u - worst) > 20]))


def test_several_models_add_their_gradients():
    pipes = [tiny_pipeline(family) for family in ("sd1", "sd2")]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for each in (*pipes, pipes):
        pgd = PGD(images, each, eps=EPS, random_start=False)
        search = _Search(pgd, PROMPT, 1)
        search.draw(pgd.draws, 0)
        gradients.append(search.gradient(images, *search.inputs([0], 0, (32, 32), pgd.draws, None)))
    first, second, both = gradients
    torch.testing.assert_close(both, first + second)


def test_the_pipeline_is_left_as_it_was(monkeypatch):
    pipe = tiny_pipeline("sd1")
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    images = torch.rand(1, 3, 32, 32)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    select_timesteps(images, pipe, rounds=1)
    monkeypatch.setattr(sys.modules["pumice.protect.simac"], "denoising_gradient", fail)
    with pytest.raises(KeyboardInterrupt):
        select_timesteps(images, pipe, rounds=1)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    assert all(weight.requires_grad for weight in pipe.unet.parameters())
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds: got 0, expected at least 1"),
        ({"candidates": 0}, ValueError, "candidates: got 0"),
        ({"window": -1}, ValueError, "window: got -1, expected at least 0"),
        ({"remaining": 40}, ValueError, r"remaining: got 40, expected more than 2 \* window = 40"),
        ({"prompt": 3}, TypeError, "prompt: got a int"),
        ({"eps": 8}, ValueError, "eps: got 8"),
        ({"step_size": -STEP}, ValueError, "step_size: got -"),
    ],
)
def test_bad_arguments(pipe, pictures, arguments, error, message):
    with pytest.raises(error, match=message):
        select_timesteps(pictures, pipe, **arguments)


def test_a_pass_reads_nothing_back(pipe, pictures):
    pgd = PGD(pictures, pipe, eps=EPS, random_start=False)
    search = _Search(pgd, PROMPT, 5)
    search.draw(pgd.draws, 0)
    inputs = search.inputs([0, 1], 0, (64, 64), pgd.draws, None)

    def work() -> None:
        with ChecksPass():
            search.gradient(pictures, *inputs)

    with load(pipe).frozen(data_gradient=True):
        assert peak_bytes(work) > pictures.nbytes  # on fake tensors, of which no number can be read
    assert not search._sums.any()
