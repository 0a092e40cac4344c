"""Every metric against closed forms on Gaussian data, and against brute force on small random models."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pumice import models
from pumice.memorization import (
    Anisotropy,
    AttentionEntropy,
    BrightEnding,
    Magnitude,
    Sharpness,
    detect,
    engine,
)
from pumice.models import watch_attention
from pumice.testbed import tiny_pipeline

# s_c, s_u, |mu|, t: |d|, cos(epsilon_u, d), A - B
GOLDENS = {
    "memorized, first step": (0.0, 1.0, 115.2, 981, 8.8115, 0.0841, 0.005792),
    "memorized, low noise": (0.0, 1.0, 115.2, 41, 844.1063, 0.7366, 4.857652),
    "narrow, first step": (0.3, 1.0, 115.2, 981, 8.8015, 0.0766, 0.005268),
    "narrow, low noise": (0.3, 1.0, 115.2, 41, 250.383, 0.7040, 1.377010),
    "fresh, first step": (1.0, 1.0, 20.0, 981, 1.5155, 0.0, 0.0),
    "fresh, low noise": (1.0, 1.0, 20.0, 41, 3.878, 0.0, 0.0),
    "mild, first step": (0.9, 1.0, 40.0, 981, 3.0376, 0.0462, 0.001095),
    "mild, low noise": (0.9, 1.0, 40.0, 41, 11.0454, 0.5120, 0.044178),
}


class Gaussians:
    """epsilon of isotropic Gaussian data, N(0, s_u^2) without and N(mu, s_c^2) with a prompt.

    D = 16384, |x| = 128, x orthogonal to mu; both the same at every position, so that the mean of the
    positions' cosines is the cosine of the whole.
    """

    def __init__(self, model, monkeypatch, s_c: float, s_u: float, norm: float) -> None:
        self.model, self.s_c, self.s_u = model, s_c, s_u
        self.x, self.mu = torch.zeros(2, 1, 4, 64, 64)
        self.x[:, 0], self.mu[:, 1] = 2.0, norm / 64
        self.nothing = model.unconditional().embeds
        monkeypatch.setattr(model, "predict", self.predict)
        monkeypatch.setattr(
            engine, "initial_noise", lambda seeds, shape: self.x.expand(len(seeds), -1, -1, -1)
        )

    def slopes(self, t: int) -> tuple[float, float]:
        square = self.model.schedule.alphas_cumprod[t].item()
        a, b = (math.sqrt(1 - square) / (square * s * s + 1 - square) for s in (self.s_c, self.s_u))
        return a, b

    def predict(self, x: Tensor, t: Tensor, embeds) -> Tensor:
        a, b = self.slopes(int(t))
        if torch.equal(embeds.embeds[:1], self.nothing):
            return b * x
        return a * (x - self.model.schedule.alphas_cumprod[int(t)].sqrt().float() * self.mu)


def gaussian(monkeypatch, s_c: float, s_u: float, norm: float) -> Gaussians:
    return Gaussians(models.load(tiny_pipeline("sd1")), monkeypatch, s_c, s_u, norm)


@pytest.mark.parametrize("case", GOLDENS)
def test_goldens_of_gaussians(case, monkeypatch):
    s_c, s_u, norm, t, magnitude, cosine, slope = GOLDENS[case]
    oracle = gaussian(monkeypatch, s_c, s_u, norm)
    a, b = oracle.slopes(t)
    assert a - b == pytest.approx(slope, rel=1e-5, abs=1e-6)
    settings = {"seeds": 2, "height": 128, "width": 128}
    found = detect(oracle.model, "a cat", metric="anisotropy", **settings)
    if t == 981:
        assert found.values[..., 0].tolist() == [[pytest.approx(magnitude, rel=2e-4)] * 2]
        first = detect(oracle.model, "a cat", metric="magnitude", **settings)
        assert first.scores.item() == pytest.approx(magnitude, rel=2e-4)
    else:
        assert found.values[..., 1].tolist() == [[pytest.approx(cosine, abs=2e-4)] * 2]
        assert found.scores.item() == pytest.approx(found.values[0, 0, 0].item() + 2 * cosine, abs=5e-4)


@pytest.mark.parametrize("displacement", [1 / 512, 1 / 128, 1 / 8])
@pytest.mark.parametrize("case", ["memorized, first step", "narrow, first step", "mild, first step"])
def test_sharpness_of_gaussians_is_exact_for_any_displacement(case, displacement, monkeypatch):
    """The score is linear, so |H s| = |A - B| / sigma^2 |d| whatever the step of the finite difference."""
    s_c, s_u, norm, t, magnitude, _, slope = GOLDENS[case]
    oracle = gaussian(monkeypatch, s_c, s_u, norm)
    found = detect(
        oracle.model, "a cat", metric=Sharpness(displacement=displacement), seeds=1, height=128, width=128
    )
    sigma_squared = 1 - oracle.model.schedule.alphas_cumprod[t].item()
    assert found.scores.item() == pytest.approx(abs(slope) / sigma_squared * magnitude, rel=5e-3)


def test_sharpness_is_the_derivative_along_the_score(monkeypatch):
    """Against forward-mode differentiation of a model that is not linear, float64."""
    model = models.load(tiny_pipeline("sd1"))
    nothing = model.unconditional().embeds
    torch.manual_seed(0)
    mix = torch.randn(4, 4).double() / 3

    def predict(x, t, embeds):
        if torch.equal(embeds.embeds[:1], nothing):
            return 0.2 * x.double()
        return torch.einsum("ij,bjhw->bihw", mix, torch.tanh(x.double())) + 0.1 * x.double() ** 2

    monkeypatch.setattr(model, "predict", predict)
    found = detect(model, "a cat", metric=Sharpness(displacement=1e-3), seeds=[4])
    x = engine.initial_noise([4], model.latent_shape()).double()
    sigma = (1 - model.schedule.alphas_cumprod[981]).sqrt()

    def score(x):
        prompt = model.encode_prompt("a cat")
        return -(predict(x, 981, prompt) - predict(x, 981, model.unconditional())) / sigma

    _, derivative = torch.func.jvp(score, (x,), (score(x),))
    assert found.scores.item() == pytest.approx(derivative.norm().item(), rel=2e-2)


@pytest.mark.parametrize("metric", [Magnitude(), Anisotropy(), Sharpness(displacement=0.05), BrightEnding()])
def test_v_predictions_score_as_the_same_model_in_epsilon(metric, monkeypatch):
    """One denoiser dressed as either kind: v = (epsilon - sigma x) / alpha gives the same scores."""
    scores = []
    for family in ("sd1", "sd2"):
        pipe = tiny_pipeline("sd1")
        if family == "sd2":
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        model = models.load(pipe)
        inner = model.predict

        def predict(x, t, embeds, model=model, inner=inner):
            epsilon = inner(x, t, embeds)
            alpha, sigma = (c.float() for c in model.schedule.alpha_sigma(t))
            return epsilon if model.prediction_type == "epsilon" else (epsilon - sigma * x) / alpha

        monkeypatch.setattr(model, "predict", predict)
        steps = 12 if metric.name == "bright_ending" else 50
        scores.append(
            detect(model, ["a cat", "sea"], metric=metric, seeds=2, num_inference_steps=steps).scores
        )
    torch.testing.assert_close(*scores, rtol=5e-3, atol=1e-5)


def columns_of(model, embeds, x, t) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), watch_attention(model.cross_attention.values(), seen.__setitem__):
        model.predict(x, t, embeds)
    return seen


def entropy(attention: Tensor) -> Tensor:
    return -(attention * attention.clamp(min=1e-30).log()).sum()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_layer_entropy_is_that_of_the_mean_attention(family):
    model = models.load(tiny_pipeline(family))
    found = detect(model, ["a cat", "a red house by the sea"], metric="attention_entropy", seeds=[3])
    for prompt, score in zip(found.prompts, found.scores, strict=True):
        x = engine.initial_noise([3], model.latent_shape())
        seen = columns_of(model, model.encode_prompt(prompt), x, 981)
        assert score.item() == pytest.approx(entropy(list(seen.values())[3][0].mean((0, 1))).item(), rel=1e-5)


def test_layer_entropy_stops_at_its_layer():
    model = models.load(tiny_pipeline("sd1"))
    ran = []
    layers = list(model.cross_attention.values())
    handles = [
        layer.module.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)
    ]
    detect(model, "a cat", metric=AttentionEntropy(layer=2), seeds=1)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1], "layers before it, once: no unconditional pass, and nothing behind"


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_trajectory_entropy_against_a_loop(variant):
    model = models.load(tiny_pipeline("sd1"))
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(12)
    metric = AttentionEntropy(form="trajectory", variant=variant)
    found = detect(model, "a red house", metric=metric, seeds=[3], num_inference_steps=12)
    embeds, nothing = model.encode_prompt("a red house"), model.unconditional()
    eos = embeds.tokens[0].eos
    x = engine.initial_noise([3], model.latent_shape())
    whole, summary = [], []
    for t in scheduler.timesteps:
        seen = columns_of(model, embeds, x, t)
        mean = torch.stack([attention[0].mean((0, 1)) for attention in seen.values()]).mean(0)
        whole.append(entropy(mean))
        summary.append(entropy(mean[eos:]))
        with torch.no_grad():
            cond, uncond = model.predict(x, t, embeds), model.predict(x, t, nothing)
        x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
    change = torch.stack(summary[-10:]).mean() - summary[0]
    expected = torch.stack(whole[-10:]).mean() + (change.abs() if variant == "paper" else change)
    assert found.scores.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_bright_ending_against_two_passes(family):
    """As published: one trajectory to get the masks, a second one to use them."""
    model = models.load(tiny_pipeline(family))
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    prompts = ["a red house", "sea"]
    found = detect(model, prompts, metric="bright_ending", seeds=[3, 4], num_inference_steps=5, batch_size=3)
    blocks = [name.split(".attentions")[0] for name in model.cross_attention]
    for p, prompt in enumerate(prompts):
        embeds, nothing = model.encode_prompt(prompt), model.unconditional()
        for s, seed in enumerate([3, 4]):
            x = engine.initial_noise([seed], model.latent_shape())
            differences = []
            for t in scheduler.timesteps:
                seen = columns_of(model, embeds, x, t)
                with torch.no_grad():
                    cond, uncond = model.predict(x, t, embeds), model.predict(x, t, nothing)
                epsilons = [model.schedule.to_epsilon(output, x, t) for output in (cond, uncond)]
                differences.append(epsilons[0] - epsilons[1])
                x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
            maps = [
                attention[0].mean(0)[:, embeds.tokens[0].eos]
                for name, attention in seen.items()
                if name.startswith(blocks[0] + ".")
            ]
            mask = torch.stack(maps).mean(0)
            side = math.isqrt(len(mask))
            mask = mask.reshape(1, 1, side, side)
            mask = torch.nn.functional.interpolate(mask, x.shape[2:])
            expected = torch.stack([(d * mask).norm() / mask.mean() for d in differences])
            torch.testing.assert_close(found.values[p, s], expected, rtol=2e-3, atol=1e-4)


def test_batch_size_changes_nothing():
    pipe = tiny_pipeline("sd1")
    prompts = ["a cat", "a red house", "sea"]
    for metric in (Anisotropy(), Sharpness(), AttentionEntropy(), BrightEnding()):
        one, other = (
            detect(pipe, prompts, metric=metric, seeds=2, num_inference_steps=4, batch_size=size)
            for size in (8, 1)
        )
        torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-5)


BAD = {
    "a weight of NaN": (Anisotropy(norm_weight=float("nan")), {}, "norm_weight: got nan"),
    "too few steps": (Anisotropy(), {"num_inference_steps": 3}, "num_inference_steps: got 3"),
    "no displacement": (Sharpness(displacement=0), {}, "displacement: got 0"),
    "steps": (Sharpness(steps=0), {}, "steps: got 0"),
    "a layer that is not there": (AttentionEntropy(layer=99), {}, "layer: got 99, expected 0 to"),
    "another form": (AttentionEntropy(form="x"), {}, "form: got 'x'"),  # type: ignore[arg-type]
    "another variant": (AttentionEntropy(variant="x"), {}, "variant: got 'x'"),  # type: ignore[arg-type]
    "a short trajectory": (
        AttentionEntropy(form="trajectory"),
        {"num_inference_steps": 10},
        "num_inference_steps: got 10, expected more than the 10",
    ),
}


@pytest.mark.parametrize(("metric", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_bad_choices(metric, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        detect(tiny_pipeline("sd1"), "a cat", metric=metric, **settings)
    assert "\n" not in str(caught.value)
