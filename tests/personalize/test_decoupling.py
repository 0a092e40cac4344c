"""The words of contrastive decoupling."""

from __future__ import annotations

import pytest

from pumice.personalize import NEGATIVE_PROMPT, NOISE_PHRASE
from pumice.personalize.decoupling import check_prompts, with_noise, without_noise


def test_the_strings_are_those_of_the_papers_code():
    assert NOISE_PHRASE == "bhj noisy pattern"
    assert NEGATIVE_PROMPT == "noisy, lowres, artifact, pattern"
    assert with_noise("a photo of sks person", NOISE_PHRASE) == "a photo of sks person, bhj noisy pattern"
    without = without_noise("a photo of person", NOISE_PHRASE)
    assert without == "a photo of person, without bhj noisy pattern"
    for nothing in (None, ""):
        assert with_noise("a", nothing) == without_noise("a", nothing) == "a"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("", None, None), "prompt: got ''"),
        (("a photo of person", "a photo of a person", None), "prompt: .* which names no subject"),
        (("A photo of Person", "a photo of person", None), "prompt: .* which names no subject"),
        (("sks person", "person", "sks noise"), "noise_phrase: .* has 'sks' in common"),
        (("sks person", None, "noisy Person"), "noise_phrase: .* has 'person' in common"),
        (("sks person", None, NOISE_PHRASE), "class_prompt: got none, expected one with a noise_phrase"),
        (("sks person", "", None), "class_prompt: got '', expected words, or None"),
        (("sks person", "person", " ,"), "noise_phrase: got ' ,', expected words, or None"),
    ],
)
def test_prompts_that_teach_something_else(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(*prompts)


def test_prompts_that_are_fine():
    check_prompts("a photo of sks person", "a photo of person", NOISE_PHRASE)
    check_prompts(
        "a photo of sks person", "a photo of person", "a noisy person"
    )  # of the class, not the subject
    with pytest.raises(TypeError, match="class_prompt: got a int"):
        check_prompts("sks", 3, None)
