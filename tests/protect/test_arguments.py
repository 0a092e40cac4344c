"""What is wrong is refused by its own name, before any work; what NumPy gives is taken."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from pumice import protect
from pumice.models import GuidedSampler
from pumice.models.arguments import checked_seeds, first_seed
from pumice.protect.surrogate import Surrogate
from pumice.testbed import tiny_pipeline

METHODS = [
    protect.advdm,
    protect.mist,
    protect.sds,
    protect.sdst,
    protect.photoguard,
    protect.photoguard_diffusion,
    protect.caat,
    protect.ace,
    protect.fsmg,
    protect.aspl,
    protect.easpl,
    protect.metacloak,
    protect.simac,
    protect.select_timesteps,
]
TRAINING = [protect.ace, protect.fsmg, protect.aspl, protect.easpl, protect.metacloak, protect.simac]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def idle(monkeypatch):
    """Nothing is learned or drawn."""
    monkeypatch.setattr(Surrogate, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(GuidedSampler, "step", lambda *_, **__: pytest.fail("drew class pictures"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step_size", [-1 / 255, float("nan"), float("inf")])
def test_a_step_backwards_is_refused_before_anything_is_learned(idle, pipe, images, method, step_size):
    with pytest.raises(ValueError, match=r"^step_size: got (-0.0039\S*|nan|inf), expected"):
        method(images, pipe, step_size=step_size)


@pytest.mark.parametrize("step_size", [0, -0.5, float("nan")])
def test_a_step_of_a_norm_has_a_length(pipe, images, step_size):
    with pytest.raises(ValueError, match=r"^step_size: got .*expected a finite number that is positive"):
        protect.photoguard_diffusion(images, pipe, step_size=step_size)


@pytest.mark.parametrize("method", TRAINING)
def test_without_a_budget_nothing_is_learned(idle, pipe, images, method):
    with pytest.warns(protect.ProtectionWarning, match="eps: got 0, pictures stay as they are"):
        found = method(images, pipe, eps=0)
    assert torch.equal(found, images)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"steps": None}, "steps: got a NoneType, expected a whole number"),
        ({"steps": 2.0}, "steps: got a float, expected a whole number"),
        ({"steps": True}, "steps: got a bool, expected a whole number"),
        ({"batch_size": "2"}, "batch_size: got a str, expected a whole number"),
        ({"batch_size": 1.5}, "batch_size: got a float, expected a whole number"),
        ({"seed": None}, "seed: got a NoneType, expected a whole number, or a list of them"),
        ({"seed": "12"}, "seed: got a str, expected a whole number, or a list of them"),
        ({"seed": [1, 2.5]}, "seed: got a float, expected a whole number, or a list of them"),
        ({"eps": None}, "eps: got a NoneType, expected a number"),
        ({"eps": True}, "eps: got a bool, expected a number"),
        ({"eps": torch.tensor(0.1)}, "eps: got a Tensor, expected a number"),
        ({"step_size": "1/255"}, "step_size: got a str, expected a number"),
        ({"rate": None}, "rate: got a NoneType, expected a number"),
        ({"rate": "5"}, "rate: got a str, expected a number"),
        ({"prompt": None}, "prompt: got a NoneType, expected a string"),
        ({"pipe": None}, "pipe: got a NoneType, expected a diffusers pipeline, a path, a hub id"),
        ({"pipe": [None]}, "pipe: got a NoneType, expected a diffusers pipeline, a path, a hub id"),
    ],
)
def test_kinds(pipe, images, wrong, expected):
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}") as error:
        protect.sdst(images, **({"pipe": pipe, "steps": 1} | wrong))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [protect.ace, protect.fsmg])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"prompt": ["a"]}, "prompt: got a list, expected a string"),
        ({"class_prompt": None, "class_images": "x.png"}, "class_prompt: got a NoneType, expected a string"),
        ({"prior_weight": None}, "prior_weight: got a NoneType, expected a number"),
        ({"seed": None}, "seed: got a NoneType"),
    ],
)
def test_kinds_of_what_a_surrogate_takes(idle, pipe, images, method, wrong, expected):
    with pytest.raises(TypeError, match=f"^{expected}"):
        method(images, pipe, **wrong)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"distance": "lpips"}, "distance: got a str, expected a function"),
        ({"strength": None}, "strength: got a NoneType, expected a number"),
    ],
)
def test_kinds_of_what_glaze_takes(pipe, images, wrong, expected):
    with pytest.raises(TypeError, match=f"^{expected}"):
        protect.glaze(images, pipe, style="oil", steps=1, **wrong)


@pytest.mark.parametrize("name", ["strength", "eta"])
def test_kinds_of_what_the_sampler_takes(pipe, images, name):
    with pytest.raises(TypeError, match=f"^{name}: got a str, expected a number"):
        protect.photoguard_diffusion(images, pipe, **{name: "0.5"})


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (torch.rand(1, 3, 30, 31), "{}: got 30 x 31, expected a positive multiple of 2"),
        (torch.rand(1, 3, 32, 32) + 1, "{}: got 1.* expected values in"),
        ([], "{}: got an empty list"),
        ("missing.png", "{}: .*missing.png"),
        (["missing.png"], r"{}\[0\]: .*missing.png"),
    ],
    ids=["size", "values", "empty", "path", "list"],
)
@pytest.mark.parametrize("name", ["clean_images", "class_images"])
def test_pictures_are_named_as_the_argument_that_they_were(idle, pipe, images, name, pictures, expected):
    with pytest.raises(ValueError, match=f"^{expected.format(name)}"):
        protect.fsmg(images, pipe, **{"prior_weight": 1} | {name: pictures})


def test_what_the_names_of_pictures_hold_stays_in_the_message(pipe, images):
    with pytest.raises(ValueError, match=r"^target: .*my-images\.png"):
        protect.glaze(images, pipe, target="my-images.png")


def test_numbers_of_numpy_are_numbers(pipe, images):
    budget = {"eps": 8 / 255, "step_size": 1 / 255, "steps": 2, "seed": 3}
    kinds = {"eps": np.float64, "step_size": np.float64, "steps": np.int64, "seed": np.int32}
    numpys = {name: kinds[name](value) for name, value in budget.items()}
    assert torch.equal(protect.advdm(images, pipe, **numpys), protect.advdm(images, pipe, **budget))


def test_seeds():
    assert checked_seeds(4, 3) == checked_seeds([4, 5, 6], 3) == [4, 5, 6]
    assert first_seed(4) == first_seed((4, 9)) == 4
    with pytest.raises(ValueError, match=r"^seed: got 2, expected one, or one for each of 3 pictures"):
        checked_seeds([1, 2], 3)
