"""What all erasers have in common: plain settings, texts that fit, models that are refused."""

from __future__ import annotations

import json
import time as clock
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from pumice import erase
from pumice.erase.arguments import checked_preserve, speaks_of
from pumice.models import Edit, UnsupportedModelError
from pumice.testbed import tiny_pipeline

LONG = "word " * 90

METHODS = {
    "uce": lambda pipe, **k: erase.uce(pipe, "cat", guide="dog", **k),
    "rece": lambda pipe, **k: erase.rece(pipe, "cat", guide="dog", **k),
    "mace_refine": lambda pipe, **k: erase.mace_refine(pipe, "cat", "dog", **k),
    "trce": lambda pipe, **k: erase.trce(pipe, "cat", "dog", **{"lamb": 1.0} | k),
    "time": lambda pipe, **k: erase.time(pipe, "a cat", "a dog", **k),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", erase.ErasureWarning)
        yield


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), 1], ids=["numpy", "torch", "int"])
def test_settings_are_plain_data_whatever_numbers_came(pipe, method, number, tmp_path):
    edit = METHODS[method](pipe, lamb=number)
    json.dumps(edit.to_dict(), allow_nan=False)
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").to_dict() == edit.to_dict()


def test_other_numbers_too(pipe, tmp_path):
    for number, edit in enumerate(
        (
            erase.rece(pipe, "cat", epochs=np.int64(1), ridge=np.float32(0.1)),
            erase.speed(pipe, "cat", augmentations=np.int64(2), seed=np.int64(1)),
        )
    ):
        edit.save(tmp_path / f"{number}.safetensors")
    with pytest.raises(TypeError):
        erase.rece(pipe, "cat", epochs=1.5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda pipe: erase.speed(pipe, "cat", retain=[LONG]), "retain"),
        (lambda pipe: erase.speed(pipe, "cat", anchor=LONG), "anchor"),
        (lambda pipe: erase.speed(pipe, "cat", anchor=LONG, tokens="all"), "anchor"),
        (lambda pipe: erase.debias(pipe, "cat", [f"{LONG} a", "red"], measure=len), "attributes"),
        (lambda pipe: erase.rece(pipe, "cat", preserve=LONG), "preserve"),
        (lambda pipe: erase.trce(pipe, "cat", "dog", preserve=LONG), "preserve"),
    ],
)
def test_texts_that_do_not_fit_are_refused(pipe, call, name):
    with pytest.raises(ValueError, match=f"^{name}: 'word .* is longer than the text encoder takes"):
        call(pipe)


def test_a_domain_does_not_hold_the_concept(pipe):
    with pytest.raises(ValueError, match="domain: got the concept 'Cat' itself"):
        erase.mace_refine(pipe, "cat", "dog", domain=["Cat"], preserve_scale=1e-4, domain_scale=8e3)


def test_debiasing_needs_a_pipeline_that_draws_from_text(pipe):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(UnsupportedModelError, match=r"pipe: .* draws from pictures"):
        erase.debias(other, "cat", ["red", "blue"], measure=len)
    assert erase.uce(other, "cat").changes.keys() == erase.uce(pipe, "cat").changes.keys()


def test_rece_takes_texts_that_are_encoded_already(pipe):
    texts = ["a dog", "a house"]
    kept = erase.Preserve(pipe, texts, tokens="all")
    for preset in ("easy_object", "unsafe"):
        once, anew = (erase.rece(pipe, ["cat", "bird"], preset=preset, preserve=t) for t in (kept, texts))
        assert once.details["encoder_calls"] < anew.details["encoder_calls"]
        for name, change in once.changes.items():
            other = anew.changes[name]
            torch.testing.assert_close(change.up @ change.down, other.up @ other.down, rtol=1e-5, atol=1e-5)


def test_layers_share_what_is_the_same_for_all(pipe):
    speed = erase.speed(pipe, "cat", retain=["dog", "house"])
    assert len({id(change.up) for change in speed.changes.values()}) == 1
    tensor = erase.uce(pipe, ["cat", "bird"], technique="tensor", tokens="all")  # more rows than dimensions
    assert len({id(change.down) for change in tensor.changes.values()}) == 1
    assert all(change.rank == 32 for change in tensor.changes.values())


def test_drift_is_of_prompts_that_do_not_speak_of_the_concept(pipe):
    assert speaks_of("A photo of a Dog on the beach", "dog") and not speaks_of("a dogma", "dog")
    edit = erase.uce(pipe, "zzz", guide="dog", lamb=1e9)
    assert edit.report()["drift"] < 1e-3


def test_one_warning_for_many_texts_and_no_time_for_thousands():
    with pytest.warns(erase.ErasureWarning, match=r"\(2 more texts do so\)") as seen:
        checked_preserve(["a cat", "two cat", "cat house", "dog"], ["cat"])
    assert len(seen) == 1
    names = [f"name {number} of many" for number in range(1000)]
    start = clock.process_time()
    checked_preserve([f"artist {number}" for number in range(1700)], names)
    assert clock.process_time() - start < 30, "a search compiled for each pair takes minutes"


def test_no_ridge_where_preserved_and_erased_rows_fill_the_space_together():
    from pumice.erase.closed_form import Preserved, solve

    generator = torch.Generator().manual_seed(0)
    p = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    p = p @ torch.randn(8, 10, generator=generator, dtype=torch.float64)  # rank 8 of 10
    c, g = torch.randn(2, 4, 10, generator=generator, dtype=torch.float64)
    found = solve(c, g, lamb=0.0, preserved=Preserved.of(p))
    a = c.T @ c + p.T @ p
    torch.testing.assert_close(found.dense() - torch.eye(10), (g - c).T @ c @ torch.linalg.inv(a))
