"""ASPL and E-ASPL: the order of the rounds, and what they start from."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pumice.protect.aspl import aspl, easpl
from pumice.protect.fsmg import fsmg
from pumice.protect.pgd import PGD
from pumice.protect.surrogate import Surrogate
from pumice.testbed import tiny_pipeline
from pumice.training.examples import Examples

HOW = {"lr": 1e-3, "prior_weight": 0.0, "eps": 8 / 255, "step_size": 1 / 255}
QUICK = {"max_train_steps": 2, "max_f_train_steps": 1, "max_adv_train_steps": 2} | HOW


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def log(monkeypatch) -> list[object]:
    """What a run does, in order: names, and the pictures that steps begin with."""
    found: list[object] = []
    scratch, train, ascend, latents = Surrogate.scratch, Surrogate.train, PGD.ascend, Examples.latents

    @contextmanager
    def spied_scratch(self):
        found.append("copy")
        with scratch(self):
            yield
        found.append("back")

    def spied_train(self, examples, steps, **how):
        found.append(f"train {steps}")
        train(self, examples, steps, **how)

    def spied_ascend(self, objectives, steps, *args, **how):
        found.append(f"pgd {steps}")
        found.append(torch.stack(self.images))
        ascend(self, objectives, steps, *args, **how)
        found.append(torch.stack(self.images))

    def spied_latents(self, index, *args):
        found.append((index, torch.stack(list(self._pictures))))
        return latents(self, index, *args)

    for owner, name, spy in (
        (Surrogate, "scratch", spied_scratch),
        (Surrogate, "train", spied_train),
        (PGD, "ascend", spied_ascend),
        (Examples, "latents", spied_latents),
    ):
        monkeypatch.setattr(owner, name, spy)
    return found


def test_a_round_is_a_copy_three_clean_trainings_six_steps_and_three_perturbed_trainings(pipe, images, log):
    clean = torch.rand(5, 3, 32, 32)
    found = aspl(images, pipe, clean_images=clean, max_train_steps=2, **HOW)
    assert [each for each in log if isinstance(each, str)] == 2 * [
        "copy", "train 3", "pgd 6", "back", "train 3"
    ]  # fmt: skip
    seen = [each for each in log if isinstance(each, tuple)]
    assert [index for index, _ in seen] == 4 * [0, 1, 2]
    starts, ends = [[each for each in log if isinstance(each, Tensor)][first::2] for first in (0, 1)]
    assert torch.equal(starts[0], images) and torch.equal(starts[1], ends[0]) and torch.equal(found, ends[1])
    for number, end in enumerate(ends):
        of_clean, of_perturbed = seen[6 * number : 6 * number + 3], seen[6 * number + 3 : 6 * number + 6]
        assert all(torch.equal(learned, clean) for _, learned in of_clean)
        assert all(torch.equal(learned, end) for _, learned in of_perturbed)


def test_pictures_climb_the_loss_of_a_copy_that_learned_the_clean_ones(pipe, images):
    """The copy, trained by hand and put into FSMG, gives the same pictures."""
    found = aspl(images, pipe, "a photo of sks person", **QUICK | {"max_train_steps": 1})
    surrogate = Surrogate(pipe, lr=1e-3)
    surrogate.train([Examples(surrogate.model, list(images), "a photo of sks person")], 1)
    how = {"train_steps": 0, "steps": 2, "eps": 8 / 255, "step_size": 1 / 255}
    assert torch.equal(found, fsmg(images, surrogate.model, "a photo of sks person", **how))


def test_without_training_it_is_fsmg_on_the_model(pipe, images):
    found = aspl(images, pipe, **QUICK | {"max_f_train_steps": 0})
    how = {"train_steps": 0, "steps": 4, "eps": 8 / 255, "step_size": 1 / 255}
    assert torch.equal(found, fsmg(images, pipe, **how))


def test_an_ensemble_goes_on_with_the_mean_of_rounds_from_the_same_pictures(images, log):
    pipes = [tiny_pipeline("sd1", seed) for seed in (0, 1)] + [tiny_pipeline("sd2")]
    found = easpl(images, pipes, **QUICK)
    starts, ends = [[each for each in log if isinstance(each, Tensor)][first::2] for first in (0, 1)]
    assert all(torch.equal(start, images) for start in starts[:3])
    first, second = (torch.stack(ends[begin : begin + 3]).mean(0) for begin in (0, 3))
    assert all(torch.equal(start, first) for start in starts[3:])
    assert torch.equal(found, second)
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    assert (found - images).abs().max() <= 8 / 255 + 1e-6 and 0 <= found.min() and found.max() <= 1


def test_an_ensemble_of_one_is_that_one_and_one_is_no_ensemble(pipe, images):
    assert torch.equal(easpl(images, [pipe], **QUICK), aspl(images, pipe, **QUICK))
    with pytest.raises(ValueError, match="pipe: got 2 models, expected one; `easpl` is for several"):
        aspl(images, [pipe, tiny_pipeline("sd2")], **QUICK)


def test_the_seed_decides_and_the_batch_does_not(pipe, images):
    first, again, other, by_one = (
        aspl(images, pipe, seed=seed, batch_size=rows, **QUICK)
        for seed, rows in ((1, 3), (1, 3), (5, 3), (1, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((first - images).sign() == (by_one - images).sign()).double().mean() > 0.999


@pytest.mark.parametrize("mode", ["fp32_master", "bf16_faithful", "lora"])
def test_the_model_stays(images, mode):
    pipe = tiny_pipeline("sd2")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    found = aspl(images, pipe, surrogate=mode, **QUICK)
    assert 3 / 255 < (found - images).abs().max() <= 4 / 255 + 1e-6  # four steps of 1/255
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_class_pictures_of_the_caller_and_timesteps(pipe, images, monkeypatch):
    of_class, drawn = torch.rand(2, 3, 32, 32), []
    predict = type(Surrogate(pipe).model).predict

    def spied(self, latents, t, embeds):
        if torch.is_grad_enabled() and not any(weight.requires_grad for weight in self.unet.parameters()):
            drawn.extend(t.tolist())
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(type(Surrogate(pipe).model), "predict", spied)
    allowed = [torch.tensor([100 * number, 100 * number + 1]) for number in range(3)]
    aspl(images, pipe, class_images=of_class, timesteps=allowed, **QUICK | {"prior_weight": 1.0})
    assert set(drawn) == {int(t) for each in allowed for t in each}


@pytest.mark.parametrize(
    "wrong", [{"max_train_steps": 0}, {"max_f_train_steps": -1}, {"max_adv_train_steps": 0}, {"step_size": 2}]
)
def test_what_is_out_of_range_is_named(pipe, images, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        aspl(images, pipe, **QUICK | wrong)
