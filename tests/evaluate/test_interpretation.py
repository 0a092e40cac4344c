import json

import pytest
import torch

from pumice import testbed
from pumice.evaluate import interpretation
from pumice.models.drawing import draw
from pumice.personalize import Personalized

QUICK = {"drawings": 3, "num_inference_steps": 2, "guidance_scale": 2.0}
JUDGES = {"brightness": lambda images: images.mean((1, 2, 3)), "corner": lambda images: images[:, 0, 0, 0]}


@pytest.fixture(scope="module")
def pipe():
    return testbed.tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def found(pipe):
    return interpretation(pipe, class_noun="creature", judges=JUDGES, seed=5, **QUICK)


def test_both_prompts_are_drawn_from_the_same_noise_and_judged(pipe, found):
    prompts = ["a photo of sks", "a photo of sks creature"]
    assert list(found.pictures) == prompts and [row["prompt"] for row in found.rows] == prompts
    for prompt, row in zip(prompts, found.rows, strict=True):
        alone = draw(pipe, [6], 1, prompt=[prompt], num_inference_steps=2, guidance_scale=2.0)[0, 0]
        assert (found.pictures[prompt][1].int() - alone.int()).abs().max() <= 1
        expected = (found.pictures[prompt] / 255).mean((1, 2, 3))
        torch.testing.assert_close(found.scores[prompt]["brightness"].float(), expected)
        assert row["brightness"] == pytest.approx(float(expected.mean()))
        assert row["brightness_low"] < row["brightness"] < row["brightness_high"] and "corner" in row


def test_a_decoupled_model_is_asked_without_the_noise(pipe, found):
    learned = Personalized(pipe, torch.zeros(1), {}, "xx pattern", lambda folder: None)
    said = interpretation(learned, class_noun="creature", judges=JUDGES, **QUICK)
    assert list(said.pictures) == [f"{prompt}, without xx pattern" for prompt in found.pictures]
    plain = Personalized(pipe, torch.zeros(1), {}, None, lambda folder: None)
    again = interpretation(plain, class_noun="creature", judges=JUDGES, seed=5, **QUICK)
    assert all(torch.equal(again.pictures[prompt], found.pictures[prompt]) for prompt in found.pictures)


def test_batches_change_nothing_and_results_are_plain_data(pipe, found):
    again = interpretation(pipe, class_noun="creature", judges=JUDGES, seed=5, batch_size=2, **QUICK)
    for prompt, pictures in found.pictures.items():
        assert (again.pictures[prompt].int() - pictures.int()).abs().max() <= 1
    assert json.loads(json.dumps(found.to_dict()))["rows"] == [dict(row) for row in found.rows]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"word": 3}, TypeError, "word: got a int"),
        ({"template": "x"}, ValueError, "template: got 'x'"),
        ({"drawings": 0}, ValueError, "drawings: got 0"),
        ({"guidance_scale": -1}, ValueError, "guidance_scale: got -1"),
        ({"judges": {"bad": lambda images: images}}, ValueError, "bad: returned shape"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(pipe, change, error, message):
    with pytest.raises(error, match=message) as caught:
        interpretation(pipe, **({"judges": JUDGES} | QUICK | change))
    assert "\n" not in str(caught.value)
