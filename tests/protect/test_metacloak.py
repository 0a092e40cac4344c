"""MetaCloak: its pool, its totals, and what it comes to without them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from pumice.protect.fsmg import fsmg
from pumice.protect.metacloak import metacloak
from pumice.protect.pgd import PGD
from pumice.protect.surrogate import Surrogate
from pumice.protect.transforms import Blur, Flip
from pumice.testbed import tiny_pipeline
from pumice.training.examples import Examples

HOW = {"eps": 11 / 255, "step_size": 1.1 / 255}
QUICK = {
    "train_steps": 5, "interval": 2, "trials": 2, "rounds": 2, "steps": 1, "lr": 1e-3, "prior_weight": 0.0
} | HOW  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_with_one_model_that_does_not_train_and_no_transforms_it_is_fsmg(pipe, images):
    found = metacloak(
        images, pipe, train_steps=0, trials=1, rounds=2, advance_steps=0, steps=3, transforms=(), **HOW
    )
    assert torch.equal(found, fsmg(images, pipe, train_steps=0, steps=6, **HOW))


def test_every_member_of_the_pool_starts_from_what_it_was(pipe, images, monkeypatch):
    log: list[object] = []
    states: list[list[Tensor]] = []
    real = {name: getattr(Surrogate, name) for name in ("train", "snapshot", "restore")}
    ascend = PGD.ascend

    def snapshot(self):
        log.append("snapshot")
        states.append(real["snapshot"](self))
        return states[-1]

    def restore(self, found):
        log.append(next(number for number, state in enumerate(states) if state is found))
        real["restore"](self, found)
        now = real["snapshot"](self)
        assert all(torch.equal(a, b) for a, b in zip(now, states[log[-1]], strict=True))

    def train(self, examples, steps, **how):
        log.append(f"train {steps}")
        real["train"](self, examples, steps, **how)

    def spied_ascend(self, objectives, steps, *args, **how):
        log.append(f"pgd {steps}")
        ascend(self, objectives, steps, *args, **how)

    for name, spy in (("snapshot", snapshot), ("restore", restore), ("train", train)):
        monkeypatch.setattr(Surrogate, name, spy)
    monkeypatch.setattr(PGD, "ascend", spied_ascend)
    metacloak(images, pipe, **QUICK)
    assert log[:4] == ["snapshot", "train 5", "snapshot", "snapshot"]  # after 0, 2 and 4 steps
    rounds = ["pgd 1", "train 2", "pgd 1", "train 2"]
    assert log[4:] == 2 * [0, *rounds, 1, *rounds, 2, *rounds]
    assert all(not torch.equal(states[0][0], later[0]) for later in states[1:])


def test_it_trains_on_the_pictures_as_they_are_by_then(pipe, images, monkeypatch):
    learned = []
    latents = Examples.latents

    def spied(self, index, *args):
        learned.append((index, torch.stack(list(self._pictures))))
        return latents(self, index, *args)

    monkeypatch.setattr(Examples, "latents", spied)
    found = metacloak(images, pipe, **QUICK | {"train_steps": 1, "trials": 1})
    assert [index for index, _ in learned] == [0] + 2 * [0, 1]
    assert torch.equal(learned[0][1], images) and torch.equal(learned[-1][1], found)
    assert not torch.equal(learned[1][1], images) and not torch.equal(learned[1][1], learned[-1][1])


def test_pictures_are_climbed_through_blur_and_flip(pipe, images, monkeypatch):
    seen = []
    for kind in (Blur, Flip):
        real = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, *a, real=real, kind=kind: seen.append(self) or real(self, *a)
        )
    how = {"train_steps": 0, "trials": 1, "rounds": 1, "advance_steps": 0, "steps": 2} | HOW
    first, again = (metacloak(images, pipe, seed=3, **how) for _ in range(2))
    assert seen[:2] == [Blur(7, (0.1, 2.0)), Flip(0.5)] and len(seen) == 8
    assert torch.equal(first, again)
    by_one = metacloak(images, pipe, seed=3, batch_size=1, **how)
    assert ((first - images).sign() == (by_one - images).sign()).double().mean() > 0.999
    assert not torch.equal(first, metacloak(images, pipe, seed=3, transforms=(), **how))


@pytest.mark.parametrize("mode", ["fp32_master", "bf16_faithful", "lora"])
def test_budget_and_range_and_the_model_stays(images, mode):
    pipes = [tiny_pipeline("sd1"), tiny_pipeline("sd2")]
    before = [{key: value.clone() for key, value in pipe.unet.state_dict().items()} for pipe in pipes]
    how = QUICK | {"rounds": 1, "trials": 1, "step_size": 8 / 255}
    found = metacloak(images, pipes, surrogate=mode, **how)
    assert 0 <= found.min() and found.max() <= 1
    assert 10 / 255 < (found - images).abs().max() <= 11 / 255 + 1e-6
    for pipe, was in zip(pipes, before, strict=True):
        after = pipe.unet.state_dict()
        assert after.keys() == was.keys() and all(torch.equal(after[key], was[key]) for key in was)


def test_the_published_totals():
    given = {name: each.default for name, each in inspect.signature(metacloak).parameters.items()}
    pool = 1 + given["train_steps"] // given["interval"]
    rounds = given["trials"] * pool * given["rounds"]
    assert pool == 6
    assert rounds * given["steps"] == 14_400
    assert given["train_steps"] + rounds * given["advance_steps"] == 5_800


@pytest.mark.parametrize("name", ["train_steps", "interval", "trials", "rounds", "advance_steps", "steps"])
def test_what_is_out_of_range_is_named(pipe, images, name):
    with pytest.raises(ValueError, match=f"{name}: got -1"):
        metacloak(images, pipe, **QUICK | {name: -1})
