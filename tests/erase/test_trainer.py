"""The trainer: what trains and how far, what is told of it, and identities that its losses rest on."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from erase.toy import WEIGHT, S, Toy
from pumice import models
from pumice.erase import trainer as trainer_module
from pumice.erase.esd import esd
from pumice.erase.parameters import SETS, parameters
from pumice.erase.trainer import Trainer, apart, noises
from pumice.testbed import tiny_pipeline
from pumice.training.student import Part

HOW = {"method": "m", "settings": {}, "steps": 3, "learning_rate": 0.1}


def to(trainer: Trainer, mean: float):
    """The loss that pulls "one" to a mean, at one z and time."""
    toy = trainer.model
    z, t = torch.zeros(trainer.count, *toy.latent_shape()), torch.full((trainer.count,), 400)
    goal = toy.epsilon(z, t, mean).float()
    text = trainer.encode(["one"])

    def loss(step, rows):
        rows = list(rows)
        return apart(trainer.student.predict_noise(z[rows], t[rows], text), goal[rows], trainer.count)

    return loss


def test_apart_is_the_rows_share_of_the_mean_square():
    one, two = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    whole = (one - two).square().mean()
    shares = [apart(one[rows], two[rows], 5) for rows in (slice(0, 2), slice(2, 5))]
    assert torch.allclose(sum(shares), whole, rtol=1e-12)


def test_noises_of_several_texts_are_those_of_each():
    model = models.load(tiny_pipeline("sd2"))
    z, t = torch.randn(2, *model.latent_shape()), torch.tensor([10, 700])
    texts = [model.encode_prompt(text) for text in (["a cat", "a dog"], "a tree")]
    found = noises(model, z, t, *texts)
    for epsilon, text in zip(found, texts, strict=True):
        assert torch.allclose(epsilon, model.predict_noise(z, t, text), atol=1e-5)
    assert not any(epsilon.requires_grad for epsilon in found)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_loss_of_x0_is_one_of_epsilon_times_the_noise_to_signal_ratio(family):
    schedule = models.load(tiny_pipeline(family)).schedule
    t = torch.tensor([1, 300, 600, 998])
    x, one, two = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    square = schedule.alphas_cumprod[t]
    x0 = (schedule.to_x0(one, x, t) - schedule.to_x0(two, x, t)).square().flatten(1).mean(1)
    epsilon = (schedule.to_epsilon(one, x, t) - schedule.to_epsilon(two, x, t)).square().flatten(1).mean(1)
    assert torch.allclose(x0, epsilon * (1 - square) / square, rtol=1e-9)


def test_the_toy_predicts_what_is_best_for_its_pictures():
    """The mean of the noise, given x: a regression of a million draws."""
    toy = Toy()
    t = torch.tensor([300])
    generator = torch.Generator().manual_seed(0)
    x0 = 1.5 + S * torch.randn(10**6, generator=generator, dtype=torch.float64)
    noise = torch.randn(10**6, generator=generator, dtype=torch.float64)
    x = toy.schedule.add_noise(x0, noise, t)
    slope, offset = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), noise[:, None]).solution
    for at in (-1.0, 2.0):
        expected = toy.predict_noise(torch.full((1, 1, 2, 2), at), t, toy.encode_prompt("one"))
        assert float(expected.mean()) == pytest.approx(float(slope * at + offset), abs=5e-3)
        assert torch.allclose(toy.epsilon(torch.full((1, 1, 2, 2), at), t, 1.5).float(), expected)


def test_small_steps_in_bfloat16_are_lost_above_a_64th_and_float32_masters_keep_them():
    weights = torch.tensor([2**-7, 0.99 * 2**-6, 1.01 * 2**-6, 2**-5, 1.0], dtype=torch.bfloat16)
    narrow = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([narrow], lr=5e-5)
    for _ in range(200):
        optimizer.zero_grad()
        narrow.sum().backward()
        optimizer.step()
    assert (narrow != weights).tolist() == [True, True, False, False, False]

    toy = Toy()
    toy.unet.bfloat16()
    trainer = Trainer(toy, "one", "xattn", **HOW | {"steps": 200, "learning_rate": 5e-5})
    edit = trainer.train(to(trainer, 0.0))
    assert float(edit.changes[WEIGHT].delta[0, 0]) == pytest.approx(-200 * 5e-5, rel=0.05)
    assert toy.mean("one", edit) < 1.5
    with pytest.raises(
        ValueError, match="learning_rate: got 1e-06, at which 100% of the weights, in bfloat16"
    ):
        Trainer(toy, "one", "xattn", **HOW | {"learning_rate": 1e-6})


@pytest.mark.parametrize("which", SETS)
def test_what_trains_is_a_copy_and_all_else_is_the_models_own(which):
    model = models.load(tiny_pipeline("sd1"))
    names = parameters(model, which)
    part = Part(model, names)
    own, theirs = (dict(each.unet.named_parameters()) for each in (part.model, model))
    shared = {name for name in theirs if own[name].data_ptr() == theirs[name].data_ptr()}
    assert own.keys() == theirs.keys() and shared == theirs.keys() - set(names)
    assert {name for name, weight in own.items() if weight.requires_grad} == set(names)


def test_a_set_that_is_none_or_empty_is_refused():
    model = models.load(tiny_pipeline("sd1"))
    with pytest.raises(ValueError, match="parameters: got 'esd-x', expected one of xattn, "):
        parameters(model, "esd-x")
    with pytest.raises(ValueError, match="parameters: got 'selfattn', of which the model has none"):
        parameters(Toy(), "selfattn")
    linear = parameters(model, "noxattn", rank=2)
    assert linear and all(model.unet.get_submodule(name.removesuffix(".weight")) for name in linear)
    assert not any("conv" in name or "norm" in name for name in linear)


def test_concepts_take_turns_at_random_by_row_and_step_alone():
    toy = Toy()
    few, many = (Trainer(toy, ["one", "two"], "xattn", batch_size=rows, **HOW) for rows in (2, 3))
    turns = [many.of_step(step) for step in range(200)]
    assert [few.of_step(step) for step in range(200)] == [turn[:2] for turn in turns]
    assert abs(sum(turn.count("one") for turn in turns) - 300) < 60


def test_prepare_comes_before_latents_are_drawn_and_after_when_the_weights_moved():
    toy, log = Toy(), []
    trainer = Trainer(toy, "one", "xattn", **HOW)
    weight = trainer.part.weights[WEIGHT].detach()

    def prompts(step):
        log.append(("draw", step, float(weight[0, 0])))
        return trainer.encode(["one"])

    trainer.trajectories(prompts, guidance_scale=1.0, num_inference_steps=2)
    trainer.train(
        to(trainer, 0.0),
        prepare=lambda step: log.append(("prepare", step, float(weight[0, 0]))),
        after=lambda step: log.append(("after", step, float(weight[0, 0]))),
    )
    assert [what[:2] for what in log] == [
        (what, step) for step in range(3) for what in ("prepare", "draw", "after")
    ]
    moved = [log[3 * step + 2][2] for step in range(3)]
    assert moved == pytest.approx([1.4, 1.3, 1.2], abs=1e-2)
    assert [what[2] for what in log[:9:3]] == [1.5, *moved[:2]]


def test_what_it_tells_is_what_happened(tmp_path):
    toy = Toy()
    trainer = Trainer(toy, ["one", "two"], "xattn", **HOW, samples_every=2)
    edit = trainer.train(to(trainer, 0.0), details=lambda: {"more": 1})
    delta = edit.changes[WEIGHT].delta
    assert float(delta[0, 1]) == 0 and float(delta[0, 0]) == pytest.approx(-0.3, abs=1e-2)
    norm = math.hypot(1.5, 1.0)
    assert edit.details["overall_change"] == pytest.approx(float(delta.norm()) / norm, rel=1e-5)
    assert edit.details["relative_change"] == {WEIGHT: edit.details["overall_change"]}
    assert len(edit.details["losses"]) == 3 and edit.details["more"] == 1
    assert edit.details["losses"] == sorted(edit.details["losses"], reverse=True)
    assert edit.method == "m" and edit.targets == ("one", "two") and edit.base == models.fingerprint(toy)
    assert edit.settings["learning_rate"] == 0.1 and edit.settings["parameters"] == "xattn"


def test_values_stand_for_the_weights_and_nothing_learned_is_an_error():
    toy = Toy()
    trainer = Trainer(toy, "one", "xattn", **HOW)
    edit = trainer.train(to(trainer, 0.0), values=lambda: [torch.tensor([[7.0, 8.0]])])
    assert [toy.mean(text, edit) for text in ("one", "two")] == [7, 8]
    trainer = Trainer(toy, "one", "xattn", **HOW)
    with pytest.raises(ValueError, match="steps: nothing was learned"):
        trainer.train(to(trainer, 1.5), values=lambda: [toy.unet.get_parameter(WEIGHT)])


def test_pictures_are_drawn_while_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_SAMPLE_STEPS", 2)
    how = {"num_inference_steps": 2, "allow_unknown": True, "learning_rate": 1e-2}
    samples = {"samples": tmp_path / "seen", "samples_every": 2, "sample_prompts": ["a dog"]}
    pipe = tiny_pipeline("sd1")
    seen, unseen = (esd(pipe, "cat", steps=3, **how, **more) for more in (samples, {}))
    found = {path.name: Image.open(path) for path in (tmp_path / "seen").iterdir()}
    assert found.keys() == {"step-000000.png", "step-000002.png"}
    before, after = (found[name].tobytes() for name in sorted(found))
    assert before != after and found["step-000000.png"].size == (64, 32)
    assert seen.details["losses"] == unseen.details["losses"]  # looking changes nothing


def test_what_is_not_an_option_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, value, error in (
        ("rank", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("pending", 1.5, TypeError),
        ("reuse", 0, ValueError),
        ("rows", 0, ValueError),
        ("seed", "a", TypeError),
        ("sample_dtype", "bfloat16", TypeError),
        ("sample_dtype", torch.int8, TypeError),
        ("trajectory", "published", ValueError),
        ("checkpoint_every", 0, ValueError),
        ("checkpoint", tmp_path / "file", ValueError),
        ("samples", tmp_path / "file", ValueError),
        ("sample_prompts", [""], ValueError),
    ):
        with pytest.raises(error, match=f"^{name}"):
            Trainer(Toy(), "one", "xattn", **HOW | {name: value})
    for concepts, error in (
        (["one", "One "], ValueError),
        ([], ValueError),
        (1, TypeError),
        ([1], TypeError),
    ):
        with pytest.raises(error, match=r"^concepts: got"):
            Trainer(Toy(), concepts, "xattn", **HOW)
