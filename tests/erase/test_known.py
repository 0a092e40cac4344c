"""Whether a model knows a concept: by what its answer is where that is a formula, and in the testbed."""

from __future__ import annotations

import re

import pytest

from erase.toy import S, Toy
from pumice import models, testbed
from pumice.erase import known
from pumice.erase.known import answers, check_known, nonsense


def test_the_answer_is_the_norm_of_the_guidance():
    toy = Toy(empty=(0.2, 0.0))
    square = float(toy.schedule.alphas_cumprod[500])
    scale = (1 - square) ** 0.5 * square**0.5 / (square * S**2 + 1 - square)
    means = [toy.mean(text) for text in ("one", "two", "other", "")]
    expected = [2 * scale * abs(mean - 0.3) for mean in means]  # of four elements
    assert answers(toy, ["one", "two", "other", ""]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert answers(toy, ["one"], rows=1) == answers(toy, ["one"])


def test_what_it_answers_no_more_than_nonsense_is_refused():
    toy = Toy()
    check_known(toy, ["one", "two"])
    with pytest.raises(
        ValueError, match="concepts: the model does not know 'three', which it answers by 0, "
    ):
        check_known(toy, ["one", "three"])


def test_the_testbed_knows_a_ball_as_its_captions_word_it():
    model = models.load(testbed.load())
    check_known(model, ["a ball"])
    with pytest.raises(ValueError, match="anchors: the model does not know 'blorf'"):
        check_known(model, ["blorf"], "anchors")


def test_an_error_names_the_wording_that_the_model_knows():
    model = models.load(testbed.load())
    with pytest.raises(ValueError, match=r"does not know 'ball', .*; it knows 'a ball', or go on with"):
        check_known(model, ["ball"])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a TV", "a [b-df-hj-np-tv-z]{2}"),
        ("the ox", "the [aeiou][b-df-hj-np-tv-z]"),
        ("R2 D2", "[b-df-hj-np-tv-z][0-9] [b-df-hj-np-tv-z][0-9]"),
        ("猫", "[a-z]"),
        ("the", "[b-df-hj-np-tv-z]{2}[aeiou]"),
        ("R2-D2, of Çelik", "[b-z][0-9]-[b-z][0-9], of [b-z][aeiou][b-z][aeiou][b-z]"),
    ],
)
def test_short_words_and_other_scripts_have_nonsense_like_them(text, pattern):
    found = {nonsense(text, number) for number in range(20)}
    assert len(found) > 8 and all(re.fullmatch(pattern, each) for each in found)


def test_nonsense_that_is_the_text_is_no_rival(monkeypatch):
    toy, seen = Toy(), []
    monkeypatch.setattr(known, "nonsense", lambda text, number: "one" if number % 2 else "other")
    real = known.answers
    monkeypatch.setattr(
        known, "answers", lambda model, texts, **how: seen.append(texts) or real(model, texts)
    )
    check_known(toy, ["one"])
    assert seen == [["one", "other"]]


def test_nonsense_has_the_form_of_the_text():
    found = {nonsense("a red heart", number) for number in range(20)}
    assert len(found) == 20 and nonsense("a red heart", 3) in found
    for text in found:
        article, color, thing = text.split()
        assert article == "a" and len(color) == 3 and len(thing) == 5
        assert [letter in "aeiou" for letter in thing] == [False, True, True, False, False]
