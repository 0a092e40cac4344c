"""Both ways to adjust a noise, against closed forms and plain loops, and what they do on the testbed."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pumice import models, testbed
from pumice.memorization import engine
from pumice.memorization.initial_noise import (
    RHO,
    UNGUIDED_ABOVE,
    adjust_batchwise,
    adjust_initial_noise,
    adjust_per_sample,
)
from pumice.models import NoiseSchedule, PromptEmbeds, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world
from pumice.testbed.tiny import ddim_scheduler

PROMPTS = ["a red cat", "a photo of a dog in the city"]
SMALL = {"height": 16, "width": 16}


class Oracle:
    """Gaussian data in closed form: d = (A - B) x - A alpha mu, mu the rows of a prompt, 0 without one."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, t: int = 981, s_c: float = 0.0, s_u: float = 1.0) -> None:
        self.schedule = NoiseSchedule.from_config(ddim_scheduler("epsilon").config)
        self.alpha, sigma = (float(x) for x in self.schedule.alpha_sigma(t))
        self.a, self.b = (sigma / (self.alpha**2 * s**2 + sigma**2) for s in (s_c, s_u))

    def frozen(self):
        return nullcontext()

    def unconditional(self) -> PromptEmbeds:
        return embeds_of(torch.zeros(1, 4, 64))

    def predict(self, x: Tensor, t: int, embeds: PromptEmbeds) -> Tensor:
        mu = embeds.embeds.reshape(x.shape).double()
        bare = (mu == 0).flatten(1).all(1).view(-1, 1, 1, 1)
        return torch.where(bare, self.b * x, self.a * (x - self.alpha * mu))

    def direction(self, x: Tensor, mu: Tensor) -> Tensor:
        return (self.a - self.b) * x - self.a * self.alpha * mu.reshape(x.shape)


def embeds_of(mu: Tensor) -> PromptEmbeds:
    return PromptEmbeds(mu, None, (SimpleNamespace(prompt="mu"),) * len(mu))


def toy() -> tuple[Oracle, Tensor, Tensor]:
    x, mu = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Oracle(), x.view(3, 4, 8, 8), mu


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batchwise_in_closed_form(batch_size):
    """Each step is -gamma (A - B) rho sqrt(D) d / |d|, and d shrinks along itself."""
    oracle, x, mu = toy()
    found = adjust_batchwise(oracle, x, embeds_of(mu), 981, max_iterations=3, batch_size=batch_size)
    expected = x
    for _ in range(3):
        d = oracle.direction(expected, mu)
        unit = d / d.flatten(1).norm(dim=1).view(3, 1, 1, 1)
        expected = expected - 0.7 * (oracle.a - oracle.b) * (50 / 128) * 16 * unit
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    before, after = (oracle.direction(v.double(), mu).flatten(1).norm(dim=1) for v in (x, found))
    shrunk = before - 3 * 0.7 * (oracle.a - oracle.b) ** 2 * (50 / 128) * 16
    torch.testing.assert_close(after, shrunk, rtol=0, atol=1e-5)


def test_the_papers_lengths():
    assert RHO * math.sqrt(4 * 64 * 64) == pytest.approx(50)
    assert UNGUIDED_ABOVE == 900


def test_a_known_direction_saves_a_call_and_changes_nothing():
    oracle, x, mu = toy()
    calls = []
    predict = oracle.predict
    oracle.predict = lambda *arguments: calls.append(len(arguments[0])) or predict(*arguments)
    whole = adjust_batchwise(oracle, x, embeds_of(mu), 981)
    known = adjust_batchwise(oracle, x, embeds_of(mu), 981, direction=oracle.direction(x, mu))
    assert calls == [6] * 4 + [6] * 3
    torch.testing.assert_close(known, whole)


def test_a_negative_prompt_takes_the_place_of_none():
    oracle, x, mu = toy()
    other = mu.flip(0)
    found = adjust_batchwise(oracle, x, embeds_of(mu), 981, uncond_embeds=embeds_of(other), max_iterations=1)
    torch.testing.assert_close(found.double(), x, rtol=0, atol=1e-6)  # d no longer depends on x
    same = adjust_batchwise(oracle, x, embeds_of(mu), 981, uncond_embeds=oracle.unconditional())
    torch.testing.assert_close(same, adjust_batchwise(oracle, x, embeds_of(mu), 981))


def plain_adamw(oracle: Oracle, x: Tensor, mu: Tensor, target: float) -> tuple[Tensor, float]:
    latent = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.AdamW([latent], lr=0.02, weight_decay=0.01)
    for _ in range(4):
        loss = oracle.direction(latent, mu).norm()
        value = latent.detach().clone()
        if loss <= target:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return value, loss.item()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_per_sample_against_plain_adamw(batch_size):
    oracle, x, mu = toy()
    oracle.a = 3.0  # a steep model, so that few steps show
    ends = sorted(plain_adamw(oracle, x[i], mu[i], 0.0)[1] for i in range(3))
    target = (ends[0] + ends[1]) / 2  # one of three arrives
    found = adjust_per_sample(
        oracle, x, embeds_of(mu), 981, target=target, max_iterations=3, lr=0.02, batch_size=batch_size
    )
    expected = torch.stack([plain_adamw(oracle, x[i], mu[i], target)[0] for i in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_magnitudes_are_the_detectors(family):
    """Epsilon space, per sample, before and after; and the latents are those that they belong to."""
    model = models.load(tiny_pipeline(family))
    found = adjust_initial_noise(model, PROMPTS, seeds=[3, 8], gamma=5.0, **SMALL)
    noise = engine.initial_noise([3, 8], model.latent_shape(16, 16))
    with torch.no_grad():
        for p, prompt in enumerate(PROMPTS):
            for s in range(2):
                for x, magnitude in (
                    (noise[s : s + 1], found.before),
                    (found.latents[p, s][None], found.after),
                ):
                    cond, uncond = (
                        model.predict_noise(x, 981, e)
                        for e in (model.encode_prompt(prompt), model.unconditional())
                    )
                    assert magnitude[p, s].item() == pytest.approx((cond - uncond).norm().item(), rel=1e-3)
    assert found.latents.shape == (2, 2, *noise.shape[1:]) and found.latents.dtype == torch.float32
    assert found.converged is None and found.seeds == (3, 8) and found.prompts == tuple(PROMPTS)


@pytest.mark.parametrize("mode", ["batch", "per_sample"])
def test_batch_size_changes_nothing_and_the_gradient_mode_neither(mode):
    pipe = tiny_pipeline("sd1").to(torch.float64)
    settings = {"mode": mode, "target": 1e-3, "max_iterations": 2, "seeds": 2, **SMALL}
    one = adjust_initial_noise(pipe, PROMPTS, **settings)
    with torch.inference_mode():
        other = adjust_initial_noise(pipe, PROMPTS, batch_size=3, **settings)
    alone = adjust_initial_noise(pipe, PROMPTS[1], **settings | {"seeds": [1]})
    torch.testing.assert_close(other.latents.clone(), one.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.latents[0, 0], one.latents[1, 1], rtol=0, atol=1e-5)
    assert not one.converged.any()


def test_out_of_memory_halves_the_batch(monkeypatch):
    pipe = tiny_pipeline("sd1")
    expected = adjust_initial_noise(pipe, PROMPTS, seeds=2, **SMALL)
    predict = models.DiffusionModel.predict

    def small(self, latents, t, embeds):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(models.DiffusionModel, "predict", small)
    found = adjust_initial_noise(pipe, PROMPTS, seeds=2, **SMALL)
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-5)


def test_a_noise_at_its_target_stays():
    pipe = tiny_pipeline("sd1")
    found = adjust_initial_noise(pipe, PROMPTS, mode="per_sample", target=100.0, **SMALL)
    noise = engine.initial_noise([0], models.load(pipe).latent_shape(16, 16))
    assert torch.equal(found.latents[0], noise) and torch.equal(found.latents[1], noise)
    assert found.converged.all()


def test_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    adjust_initial_noise(pipe, "a cat", mode="per_sample", target=1e-3, max_iterations=1, **SMALL)
    assert pipe.unet.training and not pipe.text_encoder.training
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())


def test_results_are_plain_data():
    found = adjust_initial_noise(tiny_pipeline("sd1"), PROMPTS, seeds=2, target=1.0, **SMALL)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == PROMPTS and data["seeds"] == [0, 1]
    assert torch.equal(torch.tensor(data["after"]), found.after)
    assert data["converged"] == (found.after <= 1.0).tolist()


BAD = {
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "a negative seed": ({"seeds": [-1]}, ValueError, "seeds: got"),
    "another mode": ({"mode": "both"}, ValueError, "mode: got 'both', expected 'batch' or 'per_sample'"),
    "no target": ({"mode": "per_sample"}, ValueError, "target: got None, expected the"),
    "a target of nothing": ({"target": 0.0}, ValueError, "target: got 0.0"),
    "no iterations": ({"max_iterations": 0}, ValueError, "max_iterations: got 0"),
    "a gamma of NaN": ({"gamma": float("nan")}, ValueError, "gamma: got nan, expected a finite number"),
    "a rho of nothing": ({"rho": 0.0}, ValueError, "rho: got 0.0, expected a positive number"),
    "a negative learning rate": ({"lr": -0.1}, ValueError, "lr: got -0.1"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "an odd height": ({"height": 33}, ValueError, "height: got 33"),
    "something else": ({"pipe": SimpleNamespace()}, TypeError, "source: got a SimpleNamespace"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "prompts": "a cat"} | change
    with pytest.raises(error, match=message) as caught:
        adjust_initial_noise(arguments.pop("pipe"), arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit():
    oracle, x, mu = toy()
    with pytest.raises(ValueError, match="prompt_embeds: got 2 prompts, expected 1 or 3, as latents"):
        adjust_batchwise(oracle, x, embeds_of(mu[:2]), 981)
    with pytest.raises(ValueError, match="uncond_embeds: got 2 prompts"):
        adjust_per_sample(oracle, x, embeds_of(mu), 981, uncond_embeds=embeds_of(mu[:2]), target=1.0)
    with pytest.raises(ValueError, match="direction: got shape"):
        adjust_batchwise(oracle, x, embeds_of(mu), 981, direction=x[:2])


def test_models_that_say_nothing_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        adjust_initial_noise(tiny_pipeline("flux"), "a cat")
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="pipe: its predictions for 1 of 1 prompts are not finite"):
        adjust_initial_noise(pipe, "a cat", **SMALL)


def test_on_the_testbed_memorized_captions_pull_less():
    captions = [world.memorized(index).caption for index in (0, 1, 2)]
    pipe = testbed.load()
    batch = adjust_initial_noise(pipe, captions, seeds=2)
    assert (batch.after < batch.before).all()
    assert (batch.before > 1.9).all()
    sample = adjust_initial_noise(
        pipe, captions[:2], mode="per_sample", target=2.0, lr=0.03, max_iterations=12
    )
    assert sample.converged.all() and (sample.after <= 2.0).all()
