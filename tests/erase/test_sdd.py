"""SDD: a concept's mean becomes that of the empty prompt, and the edit is the mean of the weights so far."""

from __future__ import annotations

import pytest
import torch

from erase.toy import QUICK, WEIGHT, Toy
from pumice.erase.all_but_one import all_but_one
from pumice.erase.arguments import ErasureWarning
from pumice.erase.sdd import sdd
from pumice.erase.trainer import Trainer
from pumice.erase.trajectory import Trajectories
from pumice.testbed import tiny_pipeline

HOW = {"num_inference_steps": 4, **QUICK}


def test_every_concept_gets_the_mean_of_the_empty_prompt():
    toy = Toy()
    edit = sdd(toy, ["one", "two"], ema_decay=0.9, **HOW | {"steps": 400})
    assert [toy.mean(text, edit) for text in ("one", "two")] == pytest.approx([0, 0], abs=1e-2)
    edit = sdd(toy, "one", ema_decay=0.9, **HOW)
    assert toy.mean("one", edit) == pytest.approx(0, abs=1e-2)
    # no loss reads it, but weight decay does: 1 - rate x decay each step
    assert toy.mean("two", edit) == pytest.approx(-1, abs=3e-3)


def test_the_target_is_the_own_prediction_at_that_moment():
    toy = Toy(empty=(0.5, 0.0))  # the empty prompt reads the weight that "one" trains
    edit = sdd(toy, "one", ema_decay=0.9, **HOW)
    # w -> w / 2 has no fixed point but 0, where both means meet; that of the original's prediction is 0.75
    assert toy.mean("one", edit) == pytest.approx(0, abs=2e-2)


def test_the_edit_is_the_mean_of_the_weights(monkeypatch):
    toy, weights = Toy(), []
    real = Trainer.train

    def spied(self, loss, *, after, **how):
        weight = self.part.weights[WEIGHT]

        def each(step):
            weights.append(weight.detach().clone())
            after(step)

        return real(self, loss, after=each, **how)

    monkeypatch.setattr(Trainer, "train", spied)
    edit = sdd(toy, "one", ema_decay=0.75, **HOW | {"steps": 6})
    expected = toy.unet.get_parameter(WEIGHT).detach().double()
    for weight in weights:
        expected = 0.75 * expected + 0.25 * weight.double()
    with edit.on(toy):
        assert torch.allclose(toy.unet.get_parameter(WEIGHT).double(), expected, atol=1e-6)


def test_latents_are_drawn_by_the_mean_from_all_concepts_together(monkeypatch):
    toy, seen = Toy(), []
    real = Trajectories._drawn

    def spied(self, steps):
        weight = self._model.unet.get_parameter(WEIGHT).detach().clone()
        seen.append((weight, [text.prompt for text in self._prompts(steps[0]).tokens]))
        return real(self, steps)

    monkeypatch.setattr(Trajectories, "_drawn", spied)
    one = sdd(toy, ["one", "two"], ema_decay=0.5, **HOW | {"steps": 1, "pending": 1})
    sdd(toy, ["one", "two"], ema_decay=0.5, **HOW | {"steps": 2, "pending": 1})
    assert all(prompts == ["one, two"] * 2 for _, prompts in seen)
    assert torch.equal(seen[1][0], toy.unet.get_parameter(WEIGHT))
    with one.on(toy):  # after one step, what that step's edit has
        assert torch.allclose(seen[2][0], toy.unet.get_parameter(WEIGHT), atol=1e-6)


def test_a_mean_in_bfloat16_is_kept_in_float32():
    toy = Toy()
    toy.unet.bfloat16()
    how = HOW | {"steps": 40, "learning_rate": 1e-2}
    edit = sdd(toy, "one", ema_decay=0.99, **how)
    assert edit.changes[WEIGHT].delta.dtype == torch.float32
    # forty steps of a hundredth of it: too small each for bfloat16, whose numbers at 1.5 are 2^-7 apart
    assert 2**-7 < -float(edit.changes[WEIGHT].delta[0, 0]) < 0.2


def test_all_concepts_do_not_fit_into_one_prompt():
    concepts = [f"cat {number} of many" for number in range(40)]
    with pytest.warns(ErasureWarning, match="concepts: no latents are drawn of '.*39 of many'"):
        sdd(tiny_pipeline("sd1"), concepts, steps=1, num_inference_steps=1, allow_unknown=True)


@pytest.mark.parametrize("method", [sdd, all_but_one])
def test_another_set_of_weights_trains(method):
    how = {"steps": 1, "num_inference_steps": 1, "learning_rate": 1e-2, "allow_unknown": True}
    edit = method(tiny_pipeline("sd1"), "cat", parameters="selfattn", **how)
    assert edit.changes and all(".attn1." in name for name in edit.changes)
    assert edit.settings["parameters"] == "selfattn"


def test_what_is_not_an_argument_is_refused():
    for name, value in (("ema_decay", 1), ("ema_decay", -0.1), ("start_guidance", -1), ("steps", 0)):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            sdd(Toy(), "one", **{name: value})
