"""The trainer: what trains and how far, what is told of it, and identities that its losses rest on."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
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
from pumice.training import steps
from pumice.training.checkpoint import TrainingWarning
from pumice.training.student import Part

HOW = {"method": "m", "settings": {}, "steps": 3, "learning_rate": 0.1}
PICTURE = torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8)
WALKS = HOW | {"settings": {"num_inference_steps": 2}}


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


def test_all_but_cross_attention_leaves_out_the_output_with_its_norm_and_the_embedding_of_time():
    model = models.load(tiny_pipeline("sdxl"))
    left = {name for name, _ in model.unet.named_parameters()} - {*parameters(model, "noxattn")}
    ends = ("conv_norm_out.", "conv_out.", "time_embedding.")
    assert {name.split(".")[0] + "." for name in left if ".attn2." not in name} == {*ends}
    assert any(name.startswith("add_embedding.") for name in parameters(model, "noxattn"))


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


def test_samples_that_cannot_be_written_are_told_of_and_a_file_there_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer_module, "draw", lambda *_, **__: PICTURE)
    path = tmp_path / "step-000000.png"
    path.write_text("mine")
    trainer = Trainer(Toy(), "one", "xattn", **HOW, samples=tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(trainer_module, "save_lossless", full)
        with pytest.warns(TrainingWarning, match=r"samples: .* step 0 .*No space left"):
            edit = trainer.train(to(trainer, 0.0))
    assert edit.changes and path.read_text() == "mine"
    trainer = Trainer(Toy(), "one", "xattn", **HOW, samples=tmp_path)
    trainer.train(to(trainer, 0.0))
    assert Image.open(path).size == (4, 4)


def test_samples_show_the_model_that_is_told(tmp_path, monkeypatch):
    seen = []

    def draw(pipe, *_, **__):
        seen.append(pipe)
        return PICTURE

    monkeypatch.setattr(trainer_module, "draw", draw)
    trainer = Trainer(Toy(), "one", "xattn", **HOW, samples=tmp_path, samples_every=3)
    trainer.train(to(trainer, 0.0))
    trainer, mean = Trainer(Toy(), "one", "xattn", **HOW, samples=tmp_path, samples_every=3), Toy()
    trainer.train(to(trainer, 0.0), shown=mean)
    assert seen[1] is not mean.pipe and seen[3] is mean.pipe and len(seen) == 4


def test_time_and_passes_add_up_over_interruptions(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def wait(seconds, what=None):
        clock[0] += seconds
        return what

    monkeypatch.setattr(trainer_module, "draw", lambda *_, **__: wait(1000, PICTURE))  # which is not counted

    def trained(folder, stop=None):
        how = {"checkpoint": folder, "checkpoint_every": 2, "samples": tmp_path, "samples_every": 1}
        trainer = Trainer(Toy(), "one", "xattn", **WALKS | {"steps": 4} | how)
        wait(5)  # what a method does before it trains
        text = trainer.encode(["one"])
        trainer.trajectories(lambda step: text, guidance_scale=1.0, num_inference_steps=8)

        def after(step):
            wait(10)
            if step == stop:
                raise KeyboardInterrupt

        return trainer.train(to(trainer, 0.0), after=after).details

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "two", stop=3)
    one, two = (trained(tmp_path / name) for name in ("one", "two"))
    assert one["seconds"] == 45 and two["seconds"] == 50
    assert one["sample_passes"] == two["sample_passes"] > 0
    assert trained(tmp_path / "two")["seconds"] == 55  # which was there already


def test_how_trajectories_are_drawn_is_asked_where_they_are_alone():
    plain, walking = ({"settings": settings} for settings in ({}, {"num_inference_steps": np.int64(2)}))
    for how, name in ((plain, "pending"), (plain, "reuse"), (walking, "pendign"), (plain, "stpes")):
        with pytest.raises(TypeError, match=f"^m: got {name}, expected its own arguments or rank"):
            Trainer(Toy(), "one", "xattn", **HOW | how | {name: 2})
    with pytest.raises(ValueError, match=r"^num_inference_steps: got 0"):
        Trainer(Toy(), "one", "xattn", **HOW | {"settings": {"num_inference_steps": 0}})
    found = []
    for how in (plain, walking | {"pending": np.int64(2)}):
        trainer = Trainer(Toy(), "one", "xattn", **HOW | how)
        found.append(trainer.train(to(trainer, 0.0)).settings)
    assert not found[0].keys() & {"pending", "reuse", "sample_dtype", "trajectory", "num_inference_steps"}
    assert found[1] == found[0] | {
        "num_inference_steps": 2,
        "pending": 2,
        "reuse": 1,
        "sample_dtype": None,
        "trajectory": "paper",
    }
    json.dumps(found)


def test_what_costs_nothing_is_checked_before_what_the_model_knows(tmp_path):
    (tmp_path / "file").touch()
    for name, value in (("samples", tmp_path / "file"), ("checkpoint", tmp_path / "file")):
        with pytest.raises(ValueError, match=f"^{name}"):
            Trainer(Toy(), "unknown", "xattn", **HOW | {name: value})
    with pytest.raises(ValueError, match=r"^concepts: the model does not know 'unknown'"):
        Trainer(Toy(), "unknown", "xattn", **HOW)


def test_a_concept_that_is_longer_than_a_prompt_is_refused():
    pipe = tiny_pipeline("sd1")
    with pytest.raises(
        ValueError, match=r"^concepts: got 'cat cat .*, expected a prompt that ends before 'cat"
    ):
        Trainer(pipe, " ".join(["cat"] * 100), "xattn", **HOW, allow_unknown=True)


def test_gradients_that_overflow_in_float16_want_a_wider_dtype():
    toy = Toy()
    toy.unet.half()
    trainer = Trainer(toy, "one", "xattn", **HOW)
    (weight,) = trainer.part.weights.values()
    with pytest.raises(
        ValueError, match=r"^pipe: got torch.float16, in which gradients overflow: step 0 .* inf"
    ):
        trainer.train(lambda step, rows: 1e6 * weight.float().sum())


def test_losses_are_float32_in_processes_with_and_without_rows():
    """Else they could not be added."""
    toy = Toy()
    toy.unet.double()
    trainer = Trainer(toy, "one", "xattn", **HOW)
    for rows in ([], [0]):
        found = steps._backward(
            trainer.part, lambda step, rows: trainer.part.masters[0].sum(), 0, rows, most=1
        )
        assert found.dtype == torch.float32


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
            Trainer(Toy(), "one", "xattn", **WALKS | {name: value})
    for concepts, error in (
        (["one", "One "], ValueError),
        ([], ValueError),
        (1, TypeError),
        ([1], TypeError),
    ):
        with pytest.raises(error, match=r"^concepts: got"):
            Trainer(Toy(), concepts, "xattn", **HOW)
