"""The optimisation against a plain loop in float64 and a closed form, and replays that it stops."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pumice import models, testbed
from pumice.memorization import engine
from pumice.memorization.descent import Evaluation
from pumice.memorization.mitigate import _Objective, mitigate, optimize_embeds
from pumice.models import NoiseSchedule, PromptEmbeds, RowBudget, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world
from pumice.testbed.tiny import ddim_scheduler

PROMPTS = ["a red cat", "a photo of a dog in the city"]
NEVER = 1e-3  # a target that is not reached
SMALL = {"height": 16, "width": 16}
SETTINGS = {"target": NEVER, "max_iterations": 2, **SMALL}


def double_pipeline(family: str):
    """Float64, in which AdamW, for which only the sign of a gradient counts at first, can be compared."""
    return tiny_pipeline(family).to(torch.float64)


def plain_loop(pipe, prompt: str, seeds: list[int], steps: int, lr: float, wen: bool = False):
    """One prompt, both branches in every iteration: losses, and the embeddings they belong to."""
    model = models.load(pipe)
    noise = engine.initial_noise(seeds, model.latent_shape(16, 16))
    with torch.no_grad():
        embeds, uncond = model.encode_prompt(prompt), model.unconditional()
    rows = torch.nn.Parameter(embeds.embeds if wen else embeds.embeds[:, 1:].clone())
    optimizer = torch.optim.AdamW([rows], lr=lr, weight_decay=0.01)
    losses, values = [], []
    for _ in range(steps + 1):
        current = rows if wen else torch.cat((embeds.embeds[:, :1], rows), dim=1)
        values.append(current.detach().clone())
        conditions = (PromptEmbeds(current, embeds.pooled, embeds.tokens), uncond)
        cond, without = (model.predict_noise(noise, 981, e) for e in conditions)
        loss = (cond - without).norm()
        loss = loss if wen else loss / len(seeds) ** 0.5
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if wen:
            rows.grad[:, 0] = 0
        optimizer.step()
    return losses, values


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_matches_a_plain_loop_over_prompts_with_both_branches(family):
    pipe = double_pipeline(family)
    found = mitigate(pipe, PROMPTS, seeds=[3, 8], lr=0.02, batch_size=3, **SETTINGS)
    for index, prompt in enumerate(PROMPTS):
        losses, values = plain_loop(pipe, prompt, [3, 8], 2, 0.02)
        assert found.trace[index] == pytest.approx(losses, rel=1e-6)
        best = values[losses.index(min(losses))]
        torch.testing.assert_close(found.prompt_embeds.embeds[index : index + 1], best, rtol=0, atol=1e-6)
    assert found.iterations.tolist() == [2, 2] and not found.converged.any()


def test_wen_has_the_norm_of_the_batch_and_decays_bos_and_returns_the_last_iterate():
    pipe = double_pipeline("sd1")
    settings = SETTINGS | {"seeds": [3, 8], "lr": 0.02}
    found = mitigate(pipe, PROMPTS[0], variant="wen", **settings)
    losses, values = plain_loop(pipe, PROMPTS[0], [3, 8], 2, 0.02, wen=True)
    assert found.trace[0] == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(found.prompt_embeds.embeds, values[-1], rtol=0, atol=1e-6)
    with torch.no_grad():
        start = models.load(pipe).encode_prompt(PROMPTS[0]).embeds
    bos = found.prompt_embeds.embeds[0, 0]
    torch.testing.assert_close(bos, start[0, 0] * (1 - 0.02 * 0.01) ** 2, rtol=1e-12, atol=0)
    ours = mitigate(pipe, PROMPTS[0], **settings)
    assert torch.equal(ours.prompt_embeds.embeds[0, 0], start[0, 0])
    assert found.trace[0][0] == pytest.approx(2**0.5 * ours.trace[0][0])


def test_the_target_is_per_sample_however_many_pictures(monkeypatch):
    """The same noise four times is the same problem."""
    model = models.load(double_pipeline("sd1"))
    one = mitigate(model, PROMPTS[0], seeds=[5], **SETTINGS)
    draw = engine.initial_noise
    monkeypatch.setattr(engine, "initial_noise", lambda seeds, shape: draw([5], shape).repeat(4, 1, 1, 1))
    four = mitigate(model, PROMPTS[0], seeds=4, **SETTINGS)
    assert four.trace[0] == pytest.approx(one.trace[0], rel=1e-9)
    assert four.before.tolist() == [pytest.approx(one.before[0].tolist() * 4)]
    wen = mitigate(model, PROMPTS[0], seeds=4, variant="wen", **SETTINGS)
    assert wen.trace[0][0] == pytest.approx(2 * one.trace[0][0])


def test_batch_size_changes_nothing():
    """Also not where the seeds of one prompt need several calls."""
    pipe = double_pipeline("sd1")
    one = mitigate(pipe, PROMPTS, seeds=3, **SETTINGS)
    for batch_size in (1, 2, 4):
        other = mitigate(pipe, PROMPTS, seeds=3, batch_size=batch_size, **SETTINGS)
        torch.testing.assert_close(other.prompt_embeds.embeds, one.prompt_embeds.embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.after, one.after)


def test_out_of_memory_halves_the_batch(monkeypatch):
    pipe = double_pipeline("sd1")
    settings = SETTINGS | {"seeds": 2, "max_iterations": 1}
    expected = mitigate(pipe, PROMPTS, **settings)
    predict = models.DiffusionModel.predict

    def small(self, latents, t, embeds):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(models.DiffusionModel, "predict", small)
    found = mitigate(pipe, PROMPTS, **settings)
    torch.testing.assert_close(found.prompt_embeds.embeds, expected.prompt_embeds.embeds, rtol=0, atol=1e-6)


def test_a_fresh_prompt_is_returned_untouched_after_one_call_and_draws_what_it_always_did(monkeypatch):
    pipe = tiny_pipeline("sdxl")
    model = models.load(pipe)
    rows = []
    predict = models.DiffusionModel.predict
    monkeypatch.setattr(
        models.DiffusionModel, "predict", lambda self, x, t, e: rows.append(len(x)) or predict(self, x, t, e)
    )
    backward = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: backward.append(args))
    found = mitigate(pipe, PROMPTS, target=100.0, seeds=2)
    assert rows == [2, 4] and not backward, "the unconditional rows once, then every row once"
    assert found.converged.all() and found.iterations.tolist() == [0, 0]
    assert torch.equal(found.before, found.after)
    with torch.no_grad():
        assert torch.equal(found.prompt_embeds.embeds, model.encode_prompt(PROMPTS).embeds)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    empty = model.unconditional()
    images = [
        pipe(generator=torch.Generator().manual_seed(0), **settings, **prompt).images
        for prompt in (
            {"prompt": PROMPTS[0]},
            {
                "prompt_embeds": found.prompt_embeds[0].embeds,
                "pooled_prompt_embeds": found.prompt_embeds[0].pooled,
                "negative_prompt_embeds": empty.embeds,
                "negative_pooled_prompt_embeds": empty.pooled,
            },
        )
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_one_that_has_converged_takes_no_more_rows(monkeypatch):
    pipe = double_pipeline("sd1")
    start = mitigate(pipe, PROMPTS, **SETTINGS | {"target": 100.0}).before[:, 0]
    rows = []
    predict = models.DiffusionModel.predict
    monkeypatch.setattr(
        models.DiffusionModel, "predict", lambda self, x, t, e: rows.append(len(x)) or predict(self, x, t, e)
    )
    settings = SETTINGS | {"target": float(start.min()) + 1e-5, "lr": 0.001}
    found = mitigate(pipe, PROMPTS, **settings)
    assert rows == [1, 2, 1, 1]
    assert found.converged.tolist() == (start == start.min()).tolist()
    alone = [mitigate(pipe, prompt, **settings) for prompt in PROMPTS]
    embeds = torch.cat([part.prompt_embeds.embeds for part in alone])
    torch.testing.assert_close(found.prompt_embeds.embeds, embeds, rtol=0, atol=1e-6)
    assert found.iterations.tolist() == [int(part.iterations) for part in alone]


class Oracle:
    """Gaussian data, in closed form: without prompt N(0, s_u^2), with one N(mu, s_c^2), mu the prompt's rows.

    epsilon_cond = A (x - alpha mu), epsilon_uncond = B x, so d = (A - B) x - A alpha mu.
    """

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, t: int, s_c: float, s_u: float) -> None:
        self.schedule = NoiseSchedule.from_config(ddim_scheduler("epsilon").config)
        alpha, sigma = (float(x) for x in self.schedule.alpha_sigma(t))
        self.alpha = alpha
        self.a, self.b = (sigma / (alpha**2 * s**2 + sigma**2) for s in (s_c, s_u))

    def frozen(self):
        return nullcontext()

    def predict(self, x: Tensor, t: int, embeds: PromptEmbeds) -> Tensor:
        return self.a * (x - self.alpha * embeds.embeds[:, 1:].reshape(x.shape))

    def difference(self, x: Tensor, mu: Tensor) -> Tensor:
        return (self.a - self.b) * x - self.a * self.alpha * mu


def toy() -> tuple[Oracle, Tensor, Tensor, PromptEmbeds]:
    """|x| = 128, x and mu orthogonal, |mu| = 115.2, D = 16384."""
    oracle = Oracle(981, s_c=0.0, s_u=1.0)
    x, mu = torch.randn(2, 16384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * 128 / x.norm()
    mu = mu - (mu @ x) / (x @ x) * x
    mu = (mu * 115.2 / mu.norm()).view(1, 16, 1024)
    embeds = PromptEmbeds(
        torch.cat((torch.ones(1, 1, 1024), mu), dim=1), None, (SimpleNamespace(prompt="mu"),)
    )
    return oracle, x.view(1, 1, 4, 64, 64), mu, embeds


def test_closed_form_of_the_loss_and_of_the_first_step():
    """Of L = |d|, the gradient by mu is -A alpha d / |d|: the first step adds lr sign(d) to mu."""
    oracle, x, mu, embeds = toy()
    found = optimize_embeds(
        oracle, embeds, x, oracle.b * x, 981, target=NEVER, max_iterations=1, lr=0.05, weight_decay=0.0
    )
    d = oracle.difference(x.view(mu.shape), mu)
    assert found.trace[0][0] == pytest.approx(8.8115, abs=5e-5)
    gradient = -oracle.a * oracle.alpha * d / d.norm()
    moved = mu - 0.05 * gradient / (gradient.abs() + 1e-8)
    assert found.trace[0][1] == pytest.approx(oracle.difference(x.view(mu.shape), moved).norm().item())
    torch.testing.assert_close(found.prompt_embeds.embeds[:, 1:], moved, rtol=0, atol=1e-9)
    assert torch.equal(found.prompt_embeds.embeds[:, :1], embeds.embeds[:, :1])


def test_the_gradient_in_closed_form():
    oracle, x, mu, embeds = toy()
    x = torch.cat((x, 2 * x), dim=1)  # two seeds: L = sqrt((|d_1|^2 + |d_2|^2) / 2)
    objective = _Objective(oracle, embeds, x, oracle.b * x, 981, NEVER, False, RowBudget(16))
    found = objective([0], objective.start, torch.tensor([1024.0]))
    assert isinstance(found, Evaluation)
    d = torch.stack([oracle.difference(part.view(mu.shape), mu) for part in x[0]])
    loss = (d.square().sum() / 2).sqrt()
    torch.testing.assert_close(found.loss, loss[None])
    torch.testing.assert_close(found.magnitudes[0], d.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.gradient, 1024 * -oracle.a * oracle.alpha * d.sum(0) / (2 * loss))


def test_prompts_of_a_running_sampler_may_have_noises_of_their_own():
    model = models.load(double_pipeline("sd2"))
    noise = engine.initial_noise([4, 9], model.latent_shape(16, 16))[:, None]
    with torch.no_grad():
        embeds = model.encode_prompt(PROMPTS)
        uncond = model.predict(noise[:, 0], 981, model.unconditional())[:, None]
    found = optimize_embeds(model, embeds, noise, uncond, torch.tensor(981), target=NEVER, max_iterations=2)
    for index, seed in enumerate([4, 9]):
        alone = mitigate(model, PROMPTS[index], seeds=[seed], **SETTINGS)
        torch.testing.assert_close(
            found.prompt_embeds.embeds[index], alone.prompt_embeds.embeds[0], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode):
    """As inside a pipeline's call, tensors of inference mode included."""
    model = models.load(double_pipeline("sd1"))
    with mode():
        noise = engine.initial_noise([0], model.latent_shape(16, 16))[None]
        embeds = model.encode_prompt(PROMPTS[0])
        uncond = model.predict(noise[0], 981, model.unconditional())[None]
        found = optimize_embeds(model, embeds, noise, uncond, 981, target=NEVER, max_iterations=2)
    assert not torch.is_inference_mode_enabled()
    expected = mitigate(model, PROMPTS[0], **SETTINGS)
    torch.testing.assert_close(
        found.prompt_embeds.embeds.clone(), expected.prompt_embeds.embeds, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_finite_and_gives_embeddings_of_its_own_dtype(dtype):
    found = mitigate(tiny_pipeline("sd1").to(dtype), PROMPTS, **SETTINGS)
    assert found.prompt_embeds.embeds.dtype == dtype
    assert found.prompt_embeds.embeds.isfinite().all() and not found.skipped.any()
    exact = mitigate(tiny_pipeline("sd1"), PROMPTS, **SETTINGS)
    torch.testing.assert_close(found.after, exact.after, rtol=0.1, atol=0.1)


def test_leaves_the_pipeline_as_it_was_also_after_an_error(monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    before = [parameter.clone() for parameter in pipe.unet.parameters()]

    def check():
        assert pipe.unet.training and not pipe.text_encoder.training
        for parameter, value in zip(pipe.unet.parameters(), before, strict=True):
            assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, value)

    found = mitigate(pipe, PROMPTS, **SETTINGS)
    assert not found.prompt_embeds.embeds.requires_grad
    check()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mitigate(pipe, PROMPTS, **SETTINGS)
    check()


def test_results_are_plain_data():
    found = mitigate(tiny_pipeline("sd1"), PROMPTS, seeds=2, **SETTINGS)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == PROMPTS and data["iterations"] == [2, 2] and data["skipped"] == [0, 0]
    assert torch.equal(torch.tensor(data["before"]), found.before)
    assert [len(losses) for losses in data["trace"]] == [3, 3]


BAD = {
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "not a string": ({"prompts": [3]}, TypeError, "prompts: got a int"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "a target of nothing": ({"target": 0.0}, ValueError, "target: got 0.0, expected a positive number"),
    "a target of NaN": ({"target": float("nan")}, ValueError, "target: got nan"),
    "no iterations": ({"max_iterations": 0}, ValueError, "max_iterations: got 0"),
    "a negative learning rate": ({"lr": -0.1}, ValueError, "lr: got -0.1"),
    "a negative decay": ({"weight_decay": -1.0}, ValueError, "weight_decay: got -1.0"),
    "another variant": ({"variant": "ren"}, ValueError, "variant: got 'ren', expected None or 'wen'"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "no inference steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "an odd height": ({"height": 33}, ValueError, "height: got 33"),
    "something else": ({"pipe": SimpleNamespace()}, TypeError, "source: got a SimpleNamespace"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "prompts": "a cat", "target": 1.0} | change
    with pytest.raises(error, match=message) as caught:
        mitigate(arguments.pop("pipe"), arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit():
    oracle, x, _, embeds = toy()
    with pytest.raises(ValueError, match=r"latents: got shape \(1, 4, 64, 64\), expected \(1, S, C, h, w\)"):
        optimize_embeds(oracle, embeds, x[0], x[0], 981, target=1.0)
    with pytest.raises(ValueError, match="uncond: got shape"):
        optimize_embeds(oracle, embeds, x, x[:, :, :2], 981, target=1.0)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        mitigate(tiny_pipeline("flux"), "a cat", target=1.0)


def test_pure_noise_at_the_first_step_is_refused():
    pipe = tiny_pipeline("sd2")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="pipe: its first step is pure noise"):
        mitigate(pipe, "a cat", target=1.0)


def test_a_model_that_predicts_nan_is_not_mitigated():
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="pipe: its predictions for 2 of 2 prompts are not finite"):
        mitigate(pipe, ["a cat", "a dog"], target=1.0)


def test_on_the_testbed_the_replay_stops():
    pipe = testbed.load()
    known = [world.memorized(index) for index in (1, 3)]
    captions = [picture.caption for picture in known]
    originals = torch.stack([torch.as_tensor(picture.picture) for picture in known])
    found = mitigate(pipe, captions, target=1.2, lr=0.1, num_inference_steps=25)
    assert found.converged.all()
    assert (found.before > 1.6).all() and (found.after <= 1.2).all()
    settings = {"num_inference_steps": 25, "guidance_scale": 5, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(0) for _ in captions]
    empty = models.load(pipe).unconditional().repeat(len(captions)).embeds.detach()
    images = pipe(
        prompt_embeds=found.prompt_embeds.embeds,
        negative_prompt_embeds=empty,
        generator=generators,
        **settings,
    ).images
    assert (testbed.similarity(images, originals).diagonal() < testbed.REPLAYED).all()
