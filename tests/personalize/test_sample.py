"""Quality-enhanced sampling: the very words, and each picture from its own seed."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from pumice.personalize import Personalized, sample
from pumice.testbed import tiny_pipeline

drawing = import_module("pumice.personalize.sample")  # whose name the function has, too
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture
def said(monkeypatch):
    """What the pipeline is asked to draw."""
    calls = []

    def draw(pipe, seeds, copies, **inputs):
        calls.append({"seeds": list(seeds), **inputs})
        return torch.zeros(copies, len(seeds), 3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(drawing, "draw", draw)
    return calls


def test_the_prompt_says_without_and_the_negative_one_what_to_avoid(pipe, said):
    learned = Personalized(pipe, torch.zeros(1), {}, "bhj noisy pattern", lambda folder: None)
    assert sample(learned, [PROMPT, "dog"], num_images=2, seed=3).shape == (2, 2, 3, 4, 4)
    assert said == [
        {
            "seeds": [6, 7, 6, 7],
            "prompt": [f"{PROMPT}, without bhj noisy pattern"] * 2 + ["dog, without bhj noisy pattern"] * 2,
            "negative_prompt": ["noisy, lowres, artifact, pattern"] * 4,
            "num_inference_steps": 100,
            "guidance_scale": 7.5,
        }
    ]


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_plain_drawing(pipe, said, nothing):
    learned = Personalized(pipe, torch.zeros(1), {}, "bhj noisy pattern", lambda folder: None)
    sample(learned, PROMPT, noise_phrase="", negative_prompt=nothing, rows=10)
    sample(pipe, PROMPT, negative_prompt=nothing)  # of which nobody knows a noise phrase
    assert [len(call["seeds"]) for call in said] == [10, 6, 16]
    for call in said:
        assert set(call["prompt"]) == {PROMPT} and call["negative_prompt"] is None


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_picture_does_not_depend_on_its_batch_and_is_diffusers_own(family):
    pipe = tiny_pipeline(family)
    how = {"num_images": 3, "num_inference_steps": 2, "noise_phrase": "xx noise", "seed": 2}
    whole, single = (sample(pipe, [PROMPT, "a cat"], rows=rows, **how) for rows in (16, 1))
    assert whole.shape == (2, 3, 3, 32, 32) and whole.dtype == torch.uint8
    assert int((whole.int() - single.int()).abs().max()) <= 1
    expected = pipe(
        f"{PROMPT}, without xx noise",
        negative_prompt="noisy, lowres, artifact, pattern",
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(2 * 3 + 1),
        output_type="pt",
    ).images[0]
    assert int((whole[0, 1].int() - (expected * 255).round().int()).abs().max()) <= 1


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "prompts: got an empty list", {"prompts": []}),
        (TypeError, "prompts: got a int", {"prompts": [3]}),
        (TypeError, "noise_phrase: got a int", {"noise_phrase": 3}),
        (TypeError, "negative_prompt: got a list", {"negative_prompt": ["noisy"]}),
        (ValueError, "num_images: got 0", {"num_images": 0}),
        (ValueError, "guidance_scale: got inf", {"guidance_scale": float("inf")}),
        (TypeError, "seed: got a float", {"seed": 0.5}),
    ],
)
def test_what_cannot_be_drawn_is_said(pipe, error, message, given):
    with pytest.raises(error, match=message):
        sample(pipe, **{"prompts": PROMPT, **given})
