"""The detector against a brute-force loop, and the invariants that its scores must have."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pumice import memorization, models, ops
from pumice.memorization import Magnitude, engine
from pumice.models import UnsupportedModelError
from pumice.testbed import tiny_pipeline

PROMPTS = ["a red cat", "a photo of a dog in the city", "house", "a painting of the sea"]


def brute_force(pipe, prompt: str, seed: int, steps: int, n: int, guidance_scale: float) -> Tensor:
    """Both branches at every step, one prompt and seed at a time, float64, diffusers' own scheduler."""
    model = models.load(pipe)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(n)
    embeds, uncond = model.encode_prompt(prompt), model.unconditional()
    shape = (1, *model.latent_shape())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    found = []
    for t in scheduler.timesteps[:steps]:
        cond_out, uncond_out = (model.predict(x.float(), t, e).double() for e in (embeds, uncond))
        cond, unc = (model.schedule.to_epsilon(out, x, t) for out in (cond_out, uncond_out))
        found.append((cond - unc).flatten().norm())
        guided = uncond_out + guidance_scale * (cond_out - uncond_out)
        x = scheduler.step(guided, t, x).prev_sample
    return torch.stack(found)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_matches_a_loop_over_prompts_seeds_and_both_branches(family, steps):
    pipe = tiny_pipeline(family)
    found = memorization.detect(
        pipe, PROMPTS, metric=Magnitude(steps), seeds=[3, 8], num_inference_steps=10, batch_size=3
    )
    expected = torch.stack(
        [torch.stack([brute_force(pipe, p, s, steps, 10, 7.5) for s in (3, 8)]) for p in PROMPTS]
    )
    assert found.values.shape == (4, 2, steps)
    torch.testing.assert_close(found.values.double(), expected, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found.seed_scores, found.values.mean(2))
    torch.testing.assert_close(found.scores, found.values.mean((1, 2)))


def test_none_scores_every_step():
    found = memorization.detect(
        tiny_pipeline("sd1"), "a cat", metric=Magnitude(None), seeds=1, num_inference_steps=5
    )
    assert found.values.shape == (1, 1, 5)
    assert found.columns == tuple(f"magnitude at t={t}" for t in (801, 601, 401, 201, 1))


@pytest.mark.parametrize("steps", [1, 3])
def test_batch_size_and_order_change_nothing(steps):
    pipe = tiny_pipeline("sd1")
    settings = {"seeds": 3, "metric": Magnitude(steps), "num_inference_steps": 10}
    one = memorization.detect(pipe, PROMPTS, batch_size=32, **settings)
    for batch_size in (1, 2, 5, 7):
        other = memorization.detect(pipe, PROMPTS[::-1], batch_size=batch_size, **settings)
        torch.testing.assert_close(other.values.flip(0), one.values, rtol=1e-5, atol=1e-5)


def test_full_calls_give_the_same_bits_whatever_else_is_in_them():
    pipe = tiny_pipeline("sd1")
    one = memorization.detect(pipe, PROMPTS, seeds=2, batch_size=4)
    other = memorization.detect(pipe, [*PROMPTS[2:], "a car"], seeds=2, batch_size=4)
    assert torch.equal(one.values[2:], other.values[:2])


def test_blocks_are_filled_up_like_full_calls(monkeypatch):
    """The last prompt of a long list has the bits that it has in the middle of one."""
    monkeypatch.setattr(sys.modules["pumice.memorization.detect"], "_PROMPTS_A_BLOCK", 4)
    pipe = tiny_pipeline("sd1")
    prompts = [f"a {word}" for word in ("cat", "dog", "car", "tree", "sea")]
    one, other = (memorization.detect(pipe, p, seeds=1, batch_size=4) for p in (prompts, prompts[::-1]))
    assert torch.equal(one.values, other.values.flip(0))


def test_results_can_be_computed_with():
    found = memorization.detect(tiny_pipeline("sd1"), PROMPTS, seeds=1)
    weight = torch.ones(1, requires_grad=True)
    (found.values * weight).sum().backward()
    assert torch.allclose(weight.grad, found.values.sum())


def test_duplicates_are_computed_once(monkeypatch):
    pipe = tiny_pipeline("sd1")
    rows = []
    predict = models.DiffusionModel.predict
    monkeypatch.setattr(
        models.DiffusionModel, "predict", lambda self, x, t, e: rows.append(len(x)) or predict(self, x, t, e)
    )
    found = memorization.detect(pipe, ["a cat", "A  CAT", "a dog", "a cat"], seeds=2, batch_size=2)
    assert rows == [2, 2, 2], "two unconditional rows, then two for each of the two different prompts"
    assert torch.equal(found.values[0], found.values[1])
    assert torch.equal(found.values[0], found.values[3])
    assert found.prompts == ("a cat", "A  CAT", "a dog", "a cat")


def test_many_prompts_go_in_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["pumice.memorization.detect"], "_PROMPTS_A_BLOCK", 3)
    pipe = tiny_pipeline("sd1")
    prompts = [f"a {word}" for word in ("cat", "dog", "car", "tree", "sea", "bird", "cat")]
    found = memorization.detect(pipe, prompts, seeds=2)
    alone = [memorization.detect(pipe, prompt, seeds=2).scores for prompt in prompts]
    torch.testing.assert_close(found.scores, torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shared_unconditional_prediction_has_the_bits_of_one_for_each_prompt():
    model = models.load(tiny_pipeline("sd1"))
    found = memorization.detect(model, PROMPTS, seeds=2, batch_size=2).values[:, :, 0]
    noise, embeds = engine.initial_noise([0, 1], model.latent_shape()), model.encode_prompt(PROMPTS)
    for prompt, magnitudes in zip(PROMPTS, found, strict=True):
        cond = model.predict(noise, 981, embeds[[PROMPTS.index(prompt)] * 2])
        uncond = model.predict(noise, 981, model.unconditional())
        assert torch.equal(ops.guidance_magnitude(cond, uncond).difference, magnitudes)


def test_unconditional_predictions_are_kept_and_found_again(tmp_path, monkeypatch):
    pipe = tiny_pipeline("sd1")
    settings = {"seeds": 2, "batch_size": 2, "cache": tmp_path}
    first = memorization.detect(pipe, PROMPTS, **settings)
    assert len(list(tmp_path.iterdir())) == 1
    rows = []
    predict = models.DiffusionModel.predict
    monkeypatch.setattr(
        models.DiffusionModel, "predict", lambda self, x, t, e: rows.append(len(x)) or predict(self, x, t, e)
    )
    again = memorization.detect(pipe, PROMPTS, **settings)
    assert torch.equal(first.values, again.values)
    assert rows == [2] * 4, "conditional rows alone"
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] += 1
    rows.clear()
    memorization.detect(pipe, PROMPTS, **settings)
    assert rows == [2] * 5 and len(list(tmp_path.iterdir())) == 2, "other weights, another table"


def test_the_empty_prompt_pulls_nowhere():
    found = memorization.detect(tiny_pipeline("sd1"), ["", "a cat"], seeds=2)
    assert found.scores[0] < 1e-4 < found.scores[1]


def test_v_predictions_are_scored_as_epsilon():
    """At t = 981 the raw difference is 1 / alpha = 13.2 times as large."""
    model = models.load(tiny_pipeline("sd2"))
    found = memorization.detect(model, "a cat", seeds=[5])
    noise = engine.initial_noise([5], model.latent_shape())
    with torch.no_grad():
        raw = [model.predict(noise, 981, e) for e in (model.encode_prompt("a cat"), model.unconditional())]
    assert (raw[0] - raw[1]).norm() / found.scores == pytest.approx(1 / 0.0760, rel=2e-3)


def test_the_noise_is_the_one_that_the_pipeline_draws():
    pipe = tiny_pipeline("sd1")
    noise = engine.initial_noise([0, 7], models.load(pipe).latent_shape())
    for i, seed in enumerate((0, 7)):
        latents = pipe.prepare_latents(
            1, 4, 32, 32, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(seed)
        )
        assert torch.equal(noise[i : i + 1], latents)


def test_what_did_not_fit_is_reported():
    found = memorization.detect(tiny_pipeline("sd1"), ["a cat", "a dog and " + "a house " * 50], seeds=1)
    assert found.truncated[0] == ""
    assert found.truncated[1].endswith("a house ") and len(found.truncated[1]) < 300


def test_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    before = [(p.requires_grad, p.clone()) for p in pipe.unet.parameters()]
    memorization.detect(pipe, "a cat", seeds=1)
    assert pipe.unet.training and not pipe.text_encoder.training
    for parameter, (grad, value) in zip(pipe.unet.parameters(), before, strict=True):
        assert parameter.requires_grad == grad and torch.equal(parameter, value)


def test_out_of_memory_halves_the_batch(monkeypatch):
    pipe = tiny_pipeline("sd1")
    expected = memorization.detect(pipe, PROMPTS, seeds=2)
    predict = models.DiffusionModel.predict

    def small(self, latents, t, embeds):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(models.DiffusionModel, "predict", small)
    found = memorization.detect(pipe, PROMPTS, seeds=2)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)


def test_results_are_plain_data():
    found = memorization.detect(
        tiny_pipeline("sd1"), PROMPTS, metric=Magnitude(2), seeds=2, num_inference_steps=4
    )
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == PROMPTS
    assert data["seeds"] == [0, 1] and data["columns"] == ["magnitude at t=751", "magnitude at t=501"]
    assert data["metric"] == "magnitude" and data["memorized"] is None and data["threshold"] is None
    assert torch.equal(torch.tensor(data["values"]), found.values)
    assert torch.equal(torch.tensor(data["seed_scores"]), found.seed_scores)


BAD = {
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "not a string": ({"prompts": ["a", 3]}, TypeError, "prompts: got a int"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "an empty list of seeds": ({"seeds": []}, ValueError, "seeds: got"),
    "a seed twice": ({"seeds": [3, 3]}, ValueError, "seeds: got .*, expected each of them once"),
    "a negative seed": ({"seeds": [-1]}, ValueError, "seeds: got"),
    "another metric": (
        {"metric": "loudness"},
        ValueError,
        "metric: got 'loudness', expected one of magnitude",
    ),
    "no steps": ({"metric": Magnitude(0)}, ValueError, "steps: got 0"),
    "negative steps": ({"metric": Magnitude(-2)}, ValueError, "steps: got -2"),
    "too many steps": (
        {"metric": Magnitude(51)},
        ValueError,
        "steps: got 51, expected 1 to num_inference_steps = 50",
    ),
    "no inference steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "a guidance of NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan"),
    "sequential without thresholds": ({"sequential": True}, ValueError, "sequential: needs a calibration"),
    "an odd height": ({"height": 33}, ValueError, "height: got 33"),
    "a path that is not a model": ({"pipe": "/nowhere/at all"}, ValueError, "source: '/nowhere/at all'"),
    "something else": ({"pipe": SimpleNamespace()}, TypeError, "source: got a SimpleNamespace"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "prompts": "a cat"} | change
    with pytest.raises(error, match=message) as caught:
        memorization.detect(arguments.pop("pipe"), arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        memorization.detect(tiny_pipeline("flux"), "a cat")


def test_pure_noise_at_the_first_step_is_refused():
    pipe = tiny_pipeline("sd2")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="pipe: its first step is pure noise"):
        memorization.detect(pipe, "a cat")


def test_a_model_that_predicts_nan_is_not_scored():
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="pipe: its predictions for 2 of 2 prompts are not finite"):
        memorization.detect(pipe, ["a cat", "a dog"], seeds=1)
