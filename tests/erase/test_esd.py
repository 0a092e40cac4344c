"""ESD: the optimum that its objective prescribes, what trains, and a concept that is gone."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from erase.toy import QUICK, WEIGHT, Toy
from pumice import evaluate, testbed
from pumice.erase.esd import esd
from pumice.erase.trajectory import Trajectories
from pumice.models import Shifted
from pumice.testbed import tiny_pipeline

HOW = {"num_inference_steps": 4, **QUICK}


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_the_mean_is_as_far_on_the_other_side(eta):
    toy = Toy()
    edit = esd(toy, "one", negative_guidance=eta, **HOW)
    assert toy.mean("one", edit) == pytest.approx(-eta * 1.5, abs=1e-2)
    assert toy.mean("two", edit) == -1.0 and edit.details["losses"][-1] < 1e-5


def test_guidance_is_measured_from_the_empty_prompt():
    toy = Toy(empty=(0.3, 0.2))  # mean 0.25
    edit = esd(toy, "one", **HOW)
    assert toy.mean("one", edit) == pytest.approx(0.25 - (1.5 - 0.25), abs=1e-2)


def test_the_later_code_is_the_paper_with_an_eta_of_one_less():
    toy = Toy()
    how = {**HOW, "sample_from": "edited"}
    for eta in (1.0, 2.0):
        later = esd(toy, "one", target="diffusers", negative_guidance=eta, **how)
        paper = esd(toy, "one", negative_guidance=eta - 1, **how)
        assert toy.mean("one", later) == pytest.approx(toy.mean("one", paper), abs=1e-5)
    assert toy.mean("one", esd(toy, "one", target="diffusers", **how)) == pytest.approx(-1.5, abs=1e-2)


def test_erased_from_a_text_the_rest_of_it_stays():
    toy = Toy()
    edit = esd(toy, "one", erase_from="one, two", target="diffusers", negative_guidance=1, **HOW)
    assert toy.mean("one, two", edit) == pytest.approx(1.5 - 1.0 - 1.5, abs=1e-2)


def test_several_concepts_take_turns():
    toy = Toy()
    edit = esd(toy, ["one", "two"], **HOW | {"steps": 400})
    found = [toy.mean(text, edit) for text in ("one", "two")]
    assert found == pytest.approx([-1.5, 1.0], abs=1e-2) and edit.targets == ("one", "two")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_first_loss_is_that_of_the_formula(family, monkeypatch):
    pipe, met = tiny_pipeline(family), []
    real = Trajectories.at
    monkeypatch.setattr(Trajectories, "at", lambda self, step: met.append(real(self, step)) or met[-1])
    edit = esd(pipe, "cat", negative_guidance=0.5, steps=1, num_inference_steps=3, allow_unknown=True)
    z, t = met[-1].z[:, 0], met[-1].t
    texts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("cat", "")]
    with torch.no_grad():
        cat, empty = (pipe.unet(z, t, encoder_hidden_states=text).sample for text in texts)
    error = 1.5 * (cat - empty)
    if family == "sd2":  # epsilon = alpha v + sigma z
        error = error * pipe.scheduler.alphas_cumprod[t].sqrt()
    assert edit.details["losses"] == pytest.approx([float(error.square().mean())], rel=1e-4)


BLOCK = "mid_block.attentions.0.transformer_blocks.0"
CROSS = {f"{BLOCK}.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
OTHERS = {
    "conv_in",
    "mid_block.attentions.0.norm",
    "mid_block.attentions.0.proj_in",
    "mid_block.attentions.0.proj_out",
    *(f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{BLOCK}.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")),
    *(
        f"mid_block.resnets.{number}.{name}"
        for number in (0, 1)
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
    ),
}
TIME_AND_OUTPUT = {"time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out"}


@pytest.mark.parametrize(
    ("train_method", "layers"),
    [
        ("esd-x", CROSS),
        ("esd-x-strict", {f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"}),
        ("esd-u", OTHERS),
        ("esd-all", CROSS | OTHERS | TIME_AND_OUTPUT),
    ],
)
def test_what_trains_is_what_the_method_names(train_method, layers):
    pipe = tiny_pipeline("sd1")
    how = {"steps": 1, "num_inference_steps": 2, "learning_rate": 1e-2, "allow_unknown": True}
    edit = esd(pipe, "cat", train_method=train_method, **how)
    once = ("conv", "time", "mid_block")  # in the other blocks names repeat themselves
    assert {name.rpartition(".")[0] for name in edit.changes if name.startswith(once)} == layers
    assert any(name.startswith("up_blocks.1.") for name in edit.changes)
    assert all(isinstance(change, Shifted) for change in edit.changes.values())


@pytest.mark.parametrize(
    ("family", "how", "expected"),
    [
        ("sd1", {}, (1.0, 3.0, 1000, 1e-5)),
        ("sdxl", {"train_method": "esd-u"}, (1.0, 3.0, 1000, 1e-5)),
        ("sd1", {"target": "diffusers", "train_method": "esd-u"}, (2.0, 3.0, 200, 5e-5)),
        ("sd2", {"target": "diffusers"}, (2.0, 3.0, 200, 5e-5)),
        ("sdxl", {"target": "diffusers"}, (1.0, 2.0, 200, 2e-4)),
        ("sdxl", {"target": "diffusers", "train_method": "esd-u"}, (1.0, 2.0, 200, 1e-5)),
        ("sdxl", {"target": "diffusers", "negative_guidance": 0.5, "steps": 7}, (0.5, 2.0, 7, 2e-4)),
    ],
)
def test_defaults_of_the_paper_and_of_the_later_code(family, how, expected, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args, settings, steps, learning_rate, **options):
        raise Stopped(settings["negative_guidance"], settings["start_guidance"], steps, learning_rate)

    monkeypatch.setattr(import_module("pumice.erase.esd"), "Trainer", stop)
    with pytest.raises(Stopped) as found:
        esd(tiny_pipeline(family), "cat", **how)
    assert found.value.args == expected


def test_a_ball_is_forgotten_and_the_rest_is_not():
    model, trial = testbed.load(), testbed.trial("ball", 6)
    quick = {"steps": 32, "pending": 16, "num_inference_steps": 8, "learning_rate": 1e-3}
    edit = esd(model, "a ball", negative_guidance=2, **quick)
    how = {"seeds": 1, "classify": trial.classify, "k": 1, "num_inference_steps": 10, "guidance_scale": 5}
    before, after = evaluate.erasure(model, {"esd": edit}, trial.erased, trial.preserved, **how).rows
    assert before["esr_1"] < 20 and after["esr_1"] > 60
    assert before["psr_1"] > 80 and after["psr_1"] > 60


def test_what_is_not_an_argument_is_refused():
    toy = Toy()
    for name, value, expected in (
        ("train_method", "xattn", "expected one of esd-x, esd-u, esd-all, esd-x-strict"),
        ("target", "code", "expected 'paper' or 'diffusers'"),
        ("erase_from", "two", "expected target='diffusers'"),
        ("erase_from", " ", "expected texts that are not empty"),
        ("sample_from", "both", "expected 'edited' or 'original'"),
        ("negative_guidance", -1, "expected a non-negative number"),
        ("start_guidance", math.nan, "expected a non-negative number"),
        ("num_inference_steps", 0, "expected at least 1"),
        ("learning_rate", 0, "expected a finite number that is positive"),
        ("steps", 0, "expected"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*{expected}"):
            esd(toy, "one", **{name: value})
    assert toy.mean("one") == 1.5 and not toy.unet.get_parameter(WEIGHT).requires_grad
    with pytest.raises(TypeError, match=r"^erase_from: got a int, expected strings"):
        esd("no such model", "one", erase_from=3, target="diffusers")
