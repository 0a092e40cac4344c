"""AGE: the trained optimum in closed form, which way its search goes, a ball that becomes a box."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from erase.toy import MEANS, QUICK, Toy
from pumice import models, testbed
from pumice.erase.age import age
from pumice.erase.concept_search import denoised, moved

FEW = {"num_inference_steps": 3, "allow_unknown": True}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "how", [{}, {"hard": True}, {"search_gradient": "code"}], ids=["soft", "hard", "code"]
)
def test_the_mean_is_turned_around_the_targets(eta, how):
    model = Toy()
    edit = age(model, "one", ["two"], negative_guidance=eta, **QUICK | FEW | how)
    assert model.mean("one", edit) == pytest.approx(MEANS[1] - eta * (MEANS[0] - MEANS[1]), abs=0.02)
    assert model.mean("two", edit) == pytest.approx(MEANS[1], abs=0.02)
    assert edit.details["targets"] == {"one": {"two": 400}}


def logits(path, **options) -> torch.Tensor:
    """Those of "three" and "two", after steps that hardly move the weights."""
    how = {"steps": 40, "learning_rate": 1e-6, "search_learning_rate": 0.05, "checkpoint": path} | options
    age(Toy(), "one", ["two", "three"], **FEW, **how)
    (file,) = path.glob("*.safetensors")
    return load_file(file)["kept.search.0.logits"]


@pytest.mark.parametrize("how", [{"hard": True}, {"hard": False, "top_k": 2}], ids=["hard", "soft"])
def test_the_search_goes_to_the_target_that_is_farthest(how, tmp_path):
    # of the means 1.5 of "one", 0 of "three" and -1 of "two"
    three, two = logits(tmp_path, lamb=0.0, **how).tolist()
    assert two > three + 0.5


def test_in_the_released_code_that_has_no_gradient(tmp_path):
    assert logits(tmp_path, lamb=0.0, search_gradient="code").tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("gradient", "frozen", "graded"), [("paper", 5, 3), ("code", 4, 3)])
def test_nothing_is_computed_that_nobody_uses(gradient, frozen, graded):
    model, rows = Toy(), {"original": 0, "graded": 0}

    def count(module, args):
        own = module is model.unet
        rows["original"] += own * len(args[0])
        rows["graded"] += (not own and torch.is_grad_enabled()) * len(args[0])

    hook = model.unet.register_forward_pre_hook(count)
    age(model, "one", ["two", "three"], search_gradient=gradient, steps=5, batch_size=2, **FEW)
    hook.remove()
    assert rows == {"original": 5 * 2 * frozen, "graded": 5 * 2 * graded}


def test_a_ball_goes_towards_a_box_and_others_stay_behind():
    model, erased = (models.load(testbed.load()) for _ in range(2))
    edit = age(
        model,
        "a ball",
        ["a box"],
        negative_guidance=0.0,
        steps=24,
        pending=12,
        num_inference_steps=5,
        learning_rate=5e-4,
    )
    z = torch.randn(8, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), 500)
    with edit.on(erased), torch.no_grad():
        ball, box = model.encode_prompt("a ball"), model.encode_prompt("a box")
        x0, target = denoised(model, z, t, ball), denoised(model, z, t, box)
        left = (denoised(erased, z, t, ball) - target).square().mean() / (x0 - target).square().mean()
        of_ball, of_star = moved(model, erased, z, t, model.encode_prompt(["a ball", "a star"]), 64)
    assert left < 0.4
    assert of_ball > 4 * of_star


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parameters": "all"}, "parameters: got 'all', expected one of xattn, "),
        ({"search_gradient": "none"}, "search_gradient: got 'none', expected 'paper' or 'code'"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"lamb": -1}, "lamb: got -1"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"vocabulary": []}, "vocabulary: got an empty list"),
        ({"vocabulary": ["ONE"]}, "vocabulary: every candidate is the concept itself"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        age(Toy(), "one", **{"vocabulary": ["two"], "allow_unknown": True} | wrong)
