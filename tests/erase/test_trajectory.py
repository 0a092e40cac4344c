"""Latents on guided trajectories: diffusers' own, of the right distribution, however they are batched."""

from __future__ import annotations

import pytest
import torch

from erase.toy import WEIGHT, S, Toy
from pumice import models
from pumice.erase.trajectory import Latents, Trajectories
from pumice.models.draws import Draws
from pumice.testbed import tiny_pipeline
from pumice.training.student import Part


def trajectories(model, texts, count=1, **how) -> Trajectories:
    embeds = model.encode_prompt(texts * count)
    draws = Draws([f"row {row}" for row in range(count)], torch.device("cpu"))
    return Trajectories(model, lambda step: embeds, draws, count, 100, branches=len(texts), **how)


def parts(found: Trajectories, steps) -> list[int]:
    """k of row 0 at each step."""
    return [int(found._parts(step)[0]) for step in steps]


@pytest.fixture(scope="module")
def model():
    return models.load(tiny_pipeline("sd1"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_they_are_the_steps_of_diffusers_pipeline(family):
    pipe, seen = tiny_pipeline(family), []
    model = models.load(pipe)
    found = trajectories(model, ["a cat"], num_inference_steps=4, guidance_scale=4.0)
    for step in range(3):
        (k,) = parts(found, [step])
        z, t = found.at(step).of([0])
        seen[:] = [found._draws.normal([0], "start", step, model.latent_shape())]
        with torch.no_grad():
            pipe(
                "a cat",
                latents=seen[0],
                num_inference_steps=4,
                guidance_scale=4.0,
                output_type="latent",
                callback_on_step_end=lambda pipe, i, t, inputs: seen.append(inputs["latents"]) or {},
            )
        assert torch.allclose(z, seen[3 - k], atol=1e-4)
        assert 250 * k <= int(t) < 250 * (k + 1)


def test_those_of_the_code_start_below_the_highest_timestep():
    pipe = tiny_pipeline("sd1")
    model, scheduler = models.load(pipe), pipe.scheduler
    found = trajectories(model, ["a cat"], num_inference_steps=4, guidance_scale=4.0, variant="code")
    texts = [model.encode_prompt(text) for text in ("a cat", "")]
    scheduler.set_timesteps(4)
    for step in range(3):
        (k,) = parts(found, [step])
        expected = found._draws.normal([0], "start", step, model.latent_shape())
        for t in scheduler.timesteps[1:][: min(4 - k, 3)]:
            with torch.no_grad():
                cond, uncond = (model.predict(expected, t, text) for text in texts)
            expected = scheduler.step(uncond + 4 * (cond - uncond), t, expected).prev_sample
        assert torch.allclose(found.at(step).z[0], expected, atol=1e-4)


def test_how_many_steps_lead_to_each_part(model):
    k = torch.arange(50)
    paper, code = (
        trajectories(model, ["cat"], num_inference_steps=50, variant=variant).skipped(k).double()
        for variant in ("paper", "code")
    )
    assert paper.tolist() == list(range(49, -1, -1)) and float(paper.mean()) == 24.5
    assert code[0] == code[1] == 49 and code[49] == 1  # the highest timestep of 50 is left out
    assert float(code.mean()) == pytest.approx(25.48)


def test_passes_are_two_a_step_and_no_more():
    toy = Toy()
    for variant in ("paper", "code"):
        found = trajectories(toy, ["one"], 3, num_inference_steps=10, variant=variant, pending=4)
        found.at(0)
        k = torch.cat([found._parts(step) for step in range(4)])
        assert found.passes == 2 * int(found.skipped(k).sum())


def test_latents_have_the_distribution_of_the_guided_concept():
    """Guidance g moves the mean of a Gaussian by g; DDIM keeps its variance but for its step size."""
    toy, rows = Toy((0.8, 0.0)), 256
    found = trajectories(toy, ["one"], rows, num_inference_steps=100, guidance_scale=2.0, rows=10**4)
    z, t = found.at(0).of(range(rows))
    k = found._parts(0)
    arrived = toy.schedule.timesteps(100)[(99 - k).clamp(max=99)]
    square = toy.schedule.alphas_cumprod[arrived].reshape(-1, 1, 1, 1)
    mean, std = square.sqrt() * 1.6, (square * S**2 + 1 - square).sqrt()
    normal = (z - mean) / std
    assert abs(float(normal.mean())) < 4 / (4 * rows) ** 0.5 + 0.02
    assert float(normal.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(t // 10, k) and len(set((t % 10).tolist())) == 10


def test_the_batch_does_not_matter(model):
    texts = {"texts": ["cat", "dog"], "count": 2, "num_inference_steps": 4}
    alone = trajectories(model, **texts)
    expected = [Latents(z.clone(), t) for z, t in map(alone.at, range(3))]  # z is a view of the state
    for how in ({"rows": 1}, {"rows": 5, "pending": 3}, {"pending": 2}):
        batched = trajectories(model, **texts, **how)
        for step, one in enumerate(expected):
            two = batched.at(step)
            assert torch.equal(one.t, two.t) and torch.allclose(one.z, two.z, atol=1e-4)


def test_running_out_of_memory_halves_the_rows_and_changes_nothing(model, monkeypatch):
    texts = {"texts": ["cat", "dog"], "count": 3, "num_inference_steps": 4, "pending": 2}
    whole = trajectories(model, **texts).at(0)
    real, sizes = type(model).predict, []

    def small(self, latents, timesteps, embeds):
        sizes.append(len(latents))
        if len(latents) > 4:
            raise torch.OutOfMemoryError
        return real(self, latents, timesteps, embeds)

    monkeypatch.setattr(type(model), "predict", small)
    found = trajectories(model, **texts).at(0)
    assert torch.allclose(found.z, whole.z, atol=1e-4) and max(sizes) > 4


def test_branches_share_noise_and_time(model):
    found = trajectories(model, ["cat", "dog", "cat"], 2, num_inference_steps=4)
    step = next(step for step in range(9) if max(found._parts(step)) < 3)  # which walks
    z, t = found.at(step)
    assert z.shape == (2, 3, *model.latent_shape()) and t.shape == (2,)
    assert torch.allclose(z[:, 0], z[:, 2], atol=1e-5) and not torch.allclose(z[:, 0], z[:, 1], atol=1e-3)
    assert not torch.allclose(z[0], z[1], atol=1e-1)
    alone = trajectories(model, ["dog"], 2, num_inference_steps=4).at(step)
    assert torch.allclose(z[:, 1], alone.z[:, 0], atol=1e-4) and torch.equal(t, alone.t)


def test_a_block_is_used_again_at_other_times_of_its_parts(model):
    found = trajectories(model, ["cat"], num_inference_steps=4, pending=2, reuse=3)
    blocks = []
    for step in range(6):
        z, t = found.at(step)
        blocks.append(z.clone())
        k = int(found._parts(step % 2)[0])
        assert 250 * k <= int(t) < 250 * (k + 1) and torch.equal(z, blocks[step % 2])
        assert step < 2 or not torch.equal(t, found.at(step - 2).t)
    before = found.passes
    assert not torch.equal(found.at(6).z, blocks[0])
    assert found.passes - before == 2 * int(found.skipped(torch.tensor(parts(found, [6, 7]))).sum())
    exact = trajectories(model, ["cat"], num_inference_steps=4)
    assert torch.allclose(exact.at(0).z, blocks[0], atol=1e-4)


def test_narrow_passes_are_near_and_leave_the_weights(model):
    weights = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    step = 0
    wide, narrow = (
        trajectories(model, ["cat"], 4, num_inference_steps=4, dtype=dtype).at(step).z
        for dtype in (None, torch.bfloat16)
    )
    assert narrow.dtype == torch.float32 and not torch.equal(wide, narrow)
    assert (wide - narrow).norm() < 0.05 * wide.norm()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.unet.state_dict().items())


def test_narrow_passes_follow_the_weights_that_train():
    part = Part(Toy(), [WEIGHT])
    wide, narrow = (
        trajectories(part.model, ["one"], 8, num_inference_steps=8, dtype=dtype)
        for dtype in (None, torch.bfloat16)
    )
    for step in range(3):
        one, two = wide.at(step).z, narrow.at(step).z
        assert (one - two).norm() < 0.05 * one.norm()
        with torch.no_grad():
            part.weights[WEIGHT].mul_(-1.3)


def test_weights_that_changed_count_from_the_next_block_on():
    toy = Toy()
    found = trajectories(toy, ["one"], num_inference_steps=8, pending=2)
    still = trajectories(Toy(), ["one"], num_inference_steps=8, pending=2)
    first = found.at(0).z.clone()
    with torch.no_grad():
        toy.unet.mid_block["attn2"]["to_v"].weight.mul_(-1)
    assert torch.equal(found.at(1).z, still.at(1).z) and torch.equal(found.at(0).z, first)
    step = next(step for step in range(2, 20) if parts(still, [step])[0] < 4)
    assert not torch.allclose(found.at(step).z, still.at(step).z, atol=1e-2)
