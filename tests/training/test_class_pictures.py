"""Pictures that the model draws: of how many prompts, kept where, and drawn once."""

from __future__ import annotations

import pytest
import torch

from pumice import models
from pumice.testbed import tiny_pipeline
from pumice.training import class_pictures, examples
from pumice.training.class_pictures import drawn_pictures, shared_out


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(examples, "_STEPS", 2)
    return models.load(tiny_pipeline("sd1"))


def test_prompts_share_pictures_each_with_noise_of_its_own():
    assert shared_out(["a", "b", "c"], 5) == {"a": range(2), "b": range(2, 4), "c": range(4, 5)}
    assert shared_out(["a", "b", "a"], 4) == {"a": range(2), "b": range(2, 3)}
    assert shared_out(["a", "b"], 1) == {"a": range(1)}


def test_they_are_what_the_model_draws_in_8_bits(model, tmp_path):
    found = drawn_pictures(model, {"a cat": [0, 1], "a dog": [2]}, 3, None, False)
    (dog,) = examples.class_batches(model, "a dog", [2], 3)
    torch.testing.assert_close(found["a dog"][0], dog[0], rtol=0, atol=0.51 / 255)
    assert len(found["a cat"]) == 2 and not torch.equal(*found["a cat"])
    kept = drawn_pictures(model, {"a cat": [0, 1]}, 3, tmp_path, False)
    assert all(torch.equal(one, two) for one, two in zip(found["a cat"], kept["a cat"], strict=True))


def test_what_is_kept_is_not_drawn_again(model, tmp_path, monkeypatch):
    wanted = {"a cat": range(2), "a dog": range(2, 3)}
    first = drawn_pictures(model, wanted, 0, tmp_path, False)
    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] in ([1, 2], [2, 1])
    drawn = []
    real = class_pictures.class_batches

    def noting(model, prompt, numbers, seed):
        drawn.extend((prompt, number) for number in numbers)
        return real(model, prompt, numbers, seed)

    monkeypatch.setattr(class_pictures, "class_batches", noting)
    again = drawn_pictures(model, {"a cat": range(3), "a dog": range(2, 3)}, 0, tmp_path, False)
    assert drawn == [("a cat", 2)]
    assert torch.equal(torch.stack(first["a cat"]), torch.stack(again["a cat"][:2]))
    assert torch.equal(first["a dog"][0], again["a dog"][0])
