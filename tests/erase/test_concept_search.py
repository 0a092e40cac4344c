"""The search over candidates: its samples, its gradient, and whether it finds what suffers most."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from erase.toy import WEIGHT, Toy
from pumice import models, testbed
from pumice.erase.concept_search import denoised, gumbel_softmax, moved, read_differently
from pumice.erase.eap import eap
from pumice.erase.trainer import Trainer
from pumice.testbed import tiny_pipeline

LOGITS = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
SEARCHED = {"steps": 60, "learning_rate": 0.02, "pending": 1, "num_inference_steps": 2, "allow_unknown": True}


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_what_is_drawn_follows_the_softmax_of_the_logits_whatever_the_temperature(temperature):
    count = 4_000
    drawn = sum(gumbel_softmax(LOGITS, u, temperature) for u in uniform(count, 4))
    expected = count * LOGITS.softmax(0)
    assert float(((drawn - expected).square() / expected).sum()) < 16.3  # chi-square of 3: 1 in 1000


def test_one_hot_to_the_bit_with_the_gradient_of_the_mixture():
    for u in uniform(20, 4):
        logits, weights = LOGITS.clone().requires_grad_(), uniform(5)[1:]
        hard = gumbel_softmax(logits, u, 2.0)
        soft = gumbel_softmax(logits, u, 2.0, hard=False)
        assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(), 4).double())
        (one,) = torch.autograd.grad(weights @ hard, logits)
        (other,) = torch.autograd.grad(weights @ soft, logits)
        assert torch.equal(one, other)
        y = soft.detach()
        torch.testing.assert_close(one, y * (weights - weights @ y) / 2.0, rtol=1e-12, atol=0)


def test_a_mixture_of_the_largest():
    for u in uniform(20, 4):
        whole = gumbel_softmax(LOGITS, u, 2.0, hard=False)
        some = gumbel_softmax(LOGITS, u, 2.0, hard=False, top_k=2)
        assert int((some > 0).sum()) == 2 and float(some.sum()) == pytest.approx(1, abs=1e-12)
        top = whole.topk(2)
        torch.testing.assert_close(some[top.indices], top.values / top.values.sum())
        assert torch.equal(gumbel_softmax(LOGITS, u, 2.0, hard=False, top_k=9), whole)


def test_certain_and_impossible_candidates():
    logits = torch.full((3,), -torch.inf)
    logits[1] = 0
    for u in torch.zeros(3), torch.full((3,), 1 - 2**-24), uniform(3).float():
        assert gumbel_softmax(logits, u, 2.0).tolist() == [0, 1, 0]
        assert gumbel_softmax(logits, u, 2.0, hard=False, top_k=2).tolist() == [0, 1, 0]


def test_how_far_the_pictures_of_a_text_have_moved():
    before, after = Toy(), Toy(means=(1.2, -1.0))
    z, t = torch.randn(3, 1, 2, 2), torch.tensor([20, 500, 980])
    texts = before.encode_prompt(["one", "two", "one, two"])
    square = before.schedule.alphas_cumprod[t]
    rate = (1 - square) / (square * 0.25 + 1 - square)  # dx0 / dmu
    expected = (0.3 * rate).square().mean()
    for rows in (64, 2):
        found = moved(before, after, z, t, texts, rows)
        torch.testing.assert_close(
            found.double(), expected * torch.tensor([1.0, 0, 1]).double(), atol=1e-6, rtol=1e-3
        )
    assert torch.allclose(
        denoised(before, z, t, texts[:1]), before.schedule.to_x0(before.predict_noise(z, t, texts[:1]), z, t)
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_keys_and_values_that_moved_by_the_sum_over_layers(rank):
    model = models.load(tiny_pipeline("sdxl"))
    options = {"settings": {}, "steps": 1, "learning_rate": 0.1, "allow_unknown": True, "rank": rank}
    trainer = Trainer(model, "cat", "xattn", method="test", **options)
    generator = torch.Generator().manual_seed(0)
    for weight in trainer.part.masters:
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    texts = trainer.encode(["dog", "a house in the snow"])
    expected = torch.zeros(2)
    with torch.no_grad():
        for name, layer in trainer.student.cross_attention.items():
            original = model.cross_attention[name]
            for letter in ("to_k", "to_v"):
                apart = getattr(layer, letter)(texts.embeds) - getattr(original, letter)(texts.embeds)
                expected += apart.square().sum((1, 2))
    assert float(expected.min()) > 0
    torch.testing.assert_close(read_differently(trainer, texts), expected, rtol=1e-4, atol=0)


def preserved(**options):
    """How often each candidate is, while "one" is erased: "three" is nine tenths of it, and "two" nothing."""
    edit = eap(Toy(empty=(0.9, 0.0)), "one", ["two", "three"], negative_guidance=3.0, **SEARCHED | options)
    times = edit.details["preserved"]["one"]
    assert sum(times.values()) == SEARCHED["steps"]
    return {"two": 0, "three": 0} | times


@pytest.mark.parametrize(
    "how",
    [
        {"search": "gumbel", "search_learning_rate": 0.2},
        {"search": "gumbel", "search_learning_rate": 0.2, "hard": False},
        {"search": "exhaustive", "search_every": 10},
        {"search": "linear", "search_every": 10},
    ],
)
def test_finds_what_suffers(how):
    assert preserved(**how)["three"] > 48


def test_the_gradient_of_the_released_code_is_not_that_of_the_objective():
    assert preserved(search_learning_rate=0.2, search_gradient="code")["two"] > 48


def test_in_float16_its_gradient_is_that_of_float32(tmp_path):
    found = []
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        how = {"steps": 1, "rank": 4, "learning_rate": 0.1, "num_inference_steps": 2, "checkpoint": folder}
        words = ["a box", "a tent", "a ring", "a star", "at the beach", "a heart"]
        eap(testbed.load(dtype=dtype), "a ball", words, allow_unknown=True, **how)
        (file,) = folder.glob("*.safetensors")
        found.append(load_file(file)["kept.search.0.exp_avg"])  # a tenth of it
    wide, narrow = found
    assert float(torch.cosine_similarity(wide, narrow, dim=0)) > 0.999
    large = wide.abs() > 0.1 * wide.abs().max()
    assert int(large.sum()) > 2 and torch.equal(wide[large].sign(), narrow[large].sign())
    torch.testing.assert_close(narrow.norm(), wide.norm(), rtol=0.1, atol=0)


def test_a_search_that_overflows_names_its_rate(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.zeros_like(self, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^search_learning_rate: got 0\.01, at which"):
        eap(Toy(), "one", ["two", "three"], **SEARCHED)


def test_used_again_latents_stay_with_their_concept_and_candidate():
    edit = eap(Toy(), ["one", "two"], ["three"], **SEARCHED | {"reuse": 2})
    times = edit.details["preserved"]
    assert times.keys() == {"one", "two"} and all(of["three"] % 2 == 0 for of in times.values())


@pytest.mark.parametrize("search", ["gumbel", "exhaustive"])
def test_taken_up_again_in_the_middle_of_a_block(search, tmp_path):
    def run(**options):
        how = {"steps": 12, "pending": 4, "reuse": 2, "batch_size": 2, "search_every": 3} | options
        return eap(Toy(empty=(0.5, 0.2)), "one", ["three", "two"], search=search, **SEARCHED | how)

    whole, real, calls = run(), torch.nn.utils.clip_grad_norm_, itertools.count()

    def stopped(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path, checkpoint_every=5)
    again = run(checkpoint=tmp_path)
    assert torch.equal(again.changes[WEIGHT].delta, whole.changes[WEIGHT].delta)
    assert again.details["preserved"] == whole.details["preserved"]
