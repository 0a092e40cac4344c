"""EAP: the trained optimum in closed form, what a step computes, and a ball that is forgotten."""

from __future__ import annotations

import pytest
import torch

from erase.toy import MEANS, QUICK, WEIGHT, Toy
from pumice import models, testbed
from pumice.erase.concept_search import denoised, moved
from pumice.erase.eap import eap

FEW = {"num_inference_steps": 3, "allow_unknown": True}


@pytest.mark.parametrize("eta", [1.0, 2.0])
@pytest.mark.parametrize(
    "how", [{}, {"hard": False}, {"rank": 1, "steps": 400}], ids=["hard", "soft", "LoRA"]
)
def test_the_mean_is_turned_around_the_empty_prompts(eta, how):
    model = Toy()
    edit = eap(model, "one", ["two"], negative_guidance=eta, **QUICK | FEW | how)
    assert model.mean("one", edit) == pytest.approx(-eta * MEANS[0], abs=0.02)
    assert model.mean("two", edit) == pytest.approx(MEANS[1], abs=0.02)
    assert edit.details["preserved"] == {"one": {"two": 2 * edit.settings["steps"]}}


def test_erased_and_preserved_pull_by_their_weights():
    # what the toy does not know is half of "one": mu_1' = mu_0 - (mu_1 - mu_0) = 0, but mu_0' = mu_0
    model = Toy(empty=(0.5, 0.0))
    for lamb in (0.0, 4.0):
        edit = eap(model, "one", ["three"], lamb=lamb, **QUICK | FEW)
        # the least of (mu')^2 + lamb (mu' / 2 - mu / 2)^2
        expected = 0.25 * lamb * MEANS[0] / (1 + 0.25 * lamb)
        assert model.mean("one", edit) == pytest.approx(expected, abs=0.03)
        assert (edit.changes[WEIGHT].delta[:, 1] == 0).all()


def test_the_loss_is_of_denoised_latents():
    model = Toy()
    edit = eap(model, "one", ["two"], steps=1, negative_guidance=2.0, **FEW)
    square = model.schedule.alphas_cumprod
    rate = (1 - square) / (square * 0.25 + 1 - square)  # dx0 / dmu, at any z
    of_each_t = (3 * rate * MEANS[0]).square()
    assert float((of_each_t / edit.details["losses"][0] - 1).abs().min()) < 1e-5


@pytest.mark.parametrize(("search", "frozen", "trained"), [("gumbel", 4, 3), ("linear", 3, 2)])
def test_nothing_is_computed_that_nobody_uses(search, frozen, trained):
    model, rows = Toy(), {"original": 0, "graded": 0}

    def count(module, args):
        own = module is model.unet
        rows["original"] += own * len(args[0])
        rows["graded"] += (not own and torch.is_grad_enabled()) * len(args[0])

    hook = model.unet.register_forward_pre_hook(count)
    eap(model, "one", ["two", "three"], search=search, steps=5, batch_size=2, **FEW)
    hook.remove()
    assert rows == {"original": 5 * 2 * frozen, "graded": 5 * 2 * trained}


def test_a_ball_goes_towards_its_target_and_others_stay_behind():
    model, erased = (models.load(testbed.load()) for _ in range(2))
    texts = ["a box", "a tent", "a ring", "at the beach"]
    edit = eap(
        model,
        "a ball",
        texts,
        steps=24,
        pending=12,
        num_inference_steps=5,
        learning_rate=5e-4,
        search_learning_rate=0.1,
    )
    z = torch.randn(8, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), 500)
    with edit.on(erased), torch.no_grad():
        ball, empty = model.encode_prompt("a ball"), model.encode_prompt("")
        x0 = denoised(model, z, t, ball)
        target = 2 * denoised(model, z, t, empty) - x0
        left = (denoised(erased, z, t, ball) - target).square().mean() / (x0 - target).square().mean()
        of_ball, of_box, of_star = moved(
            model, erased, z, t, model.encode_prompt(["a ball", "a box", "a star"]), 64
        )
    assert left < 0.75
    assert of_ball > of_box and of_ball > 2.5 * of_star
    times = edit.details["preserved"]["a ball"]
    assert sum(times.values()) == 24 and set(times) <= set(texts)
    assert edit.method == "eap" and set(edit.settings["candidates"][0]) == set(texts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parameters": "all"}, "parameters: got 'all', expected one of xattn, "),
        ({"search": "all"}, "search: got 'all', expected one of gumbel, exhaustive, linear"),
        ({"search": "linear", "parameters": "noxattn"}, "search: got 'linear' with parameters='noxattn'"),
        ({"search_gradient": "none"}, "search_gradient: got 'none', expected 'paper' or 'code'"),
        ({"lamb": -1}, "lamb: got -1"),
        ({"negative_guidance": float("nan")}, "negative_guidance: got nan"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"search_learning_rate": 0}, "search_learning_rate: got 0"),
        ({"search_every": 0}, "search_every: got 0"),
        ({"vocabulary": []}, "vocabulary: got an empty list"),
        ({"vocabulary": ["ONE"]}, "vocabulary: every candidate is the concept itself"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        eap(Toy(), "one", **{"vocabulary": ["two"], "allow_unknown": True} | wrong)


def test_bad_types():
    with pytest.raises(TypeError, match="hard: got 1, expected a bool"):
        eap(Toy(), "one", ["two"], hard=1, allow_unknown=True)
    with pytest.raises(TypeError, match="lamb: got a str"):
        eap(Toy(), "one", ["two"], lamb="1", allow_unknown=True)
