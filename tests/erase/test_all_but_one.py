"""All but One: the guidance of a concept becomes that of another, and the empty prompt stays."""

from __future__ import annotations

import pytest

from erase.toy import QUICK, Toy
from pumice.erase.all_but_one import all_but_one

HOW = {"num_inference_steps": 4, **QUICK, "steps": 400}


def test_the_concept_gets_the_mean_of_the_empty_prompt_or_of_its_alternative():
    toy = Toy()
    assert toy.mean("one", all_but_one(toy, "one", **HOW)) == pytest.approx(0, abs=1e-2)
    edit = all_but_one(toy, "one", alternative="two", **HOW)
    assert toy.mean("one", edit) == pytest.approx(-1, abs=1e-2) and toy.mean("two", edit) == -1


def test_what_is_predicted_without_a_prompt_stays():
    """d' = 0 alone needs  w (e_c - e_0) = 0; the second term decides which of its solutions."""
    toy = Toy(empty=(0.25, 0.5))
    held, loose = (all_but_one(toy, "one", preserve_scale=scale, **HOW) for scale in (1.0, 0.0))
    for edit in (held, loose):
        assert toy.mean("one", edit) == pytest.approx(toy.mean("", edit), abs=2e-2)
    assert toy.mean("", held) == pytest.approx(toy.mean(""), abs=2e-2)
    assert abs(toy.mean("", loose) - toy.mean("")) > 0.1


def test_each_concept_has_its_alternative():
    toy = Toy()
    edit = all_but_one(toy, ["one", "two"], alternative=["two", "one"], **HOW | {"steps": 800})
    assert [toy.mean(text, edit) for text in ("one", "two")] == pytest.approx([-1, 1.5], abs=2e-2)
    assert edit.settings["alternative"] == ["two", "one"]


def test_what_is_not_an_argument_is_refused():
    toy = Toy()
    for name, value in (("alternative", "One"), ("alternative", ["two", ""]), ("preserve_scale", -1)):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            all_but_one(toy, "one", **{name: value})
    with pytest.raises(TypeError, match=r"^alternative: got"):
        all_but_one(toy, "one", alternative=[1])
