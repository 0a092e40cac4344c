"""Gradients against central differences, the released code's variant against itself, words on the testbed."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pumice import models, testbed
from pumice.memorization import engine
from pumice.memorization.detect import detect
from pumice.memorization.explain import explain
from pumice.memorization.magnitude import Magnitude
from pumice.models import DiffusionModel, PromptEmbeds, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

PROMPTS = ["a red cat", "a photo of a dog in the city", "tiny house", "a painting of the sea"]
FAMILIES = ["sd1", "sd2", "sdxl"]


def double(family: str):
    pipe = tiny_pipeline(family).to(torch.float64)
    pipe.unet.register_to_config(sample_size=8)  # float64 convolutions are slow
    return models.load(pipe)


def first_magnitudes(model: DiffusionModel, embeds: PromptEmbeds, seed: int) -> Tensor:
    noise = engine.initial_noise([seed], model.latent_shape()).double()
    t = model.schedule.timesteps(50)[0]
    cond = model.predict_noise(noise.expand(len(embeds), -1, -1, -1), t, embeds)
    uncond = model.predict_noise(noise, t, model.unconditional())
    return (cond - uncond).flatten(1).norm(dim=1)


def nudges(dim: int, length: int, position: int, step: float) -> Tensor:
    """(2 D, L, D): every element of one position up, then every one down."""
    found = torch.zeros(2 * dim, length, dim, dtype=torch.float64)
    found[:dim, position], found[dim:, position] = step * torch.eye(dim), -step * torch.eye(dim)
    return found


def slope_norm(magnitudes: Tensor, step: float) -> Tensor:
    up, down = magnitudes.chunk(2)
    return ((up - down) / (2 * step)).norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embedding_gradients_are_those_of_central_differences(family):
    model, step = double(family), 1e-5
    (found,) = explain(model, "a red cat", seeds=[3])
    embeds = model.encode_prompt("a red cat")
    length, dim = embeds.embeds.shape[1:]
    for position in (2, 60):
        nudged = embeds.repeat(2 * dim)
        nudged = PromptEmbeds(
            nudged.embeds + nudges(dim, length, position, step), nudged.pooled, nudged.tokens
        )
        expected = slope_norm(first_magnitudes(model, nudged, 3), step)
        torch.testing.assert_close(found.token_scores[position].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_input_gradients_are_those_of_central_differences(family):
    """For Stable Diffusion XL through both encoders and the pooled embedding."""
    model, step = double(family), 1e-5
    (found,) = explain(model, "a red cat", seeds=[3], wrt="input")
    for position in (2,):
        expected = torch.zeros((), dtype=torch.float64)
        for encoder in model.text_encoders:
            table = encoder.get_input_embeddings()
            length, dim = 77, table.embedding_dim
            shift = nudges(dim, length, position, step)
            hook = table.register_forward_hook(lambda module, args, out, shift=shift: out + shift)
            nudged = model.encode_prompt(["a red cat"] * 2 * dim)
            hook.remove()
            expected += slope_norm(first_magnitudes(model, nudged, 3), step) ** 2
        torch.testing.assert_close(
            found.token_scores[position].double(), expected.sqrt(), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrt", ["embedding", "input"])
def test_batches_equal_a_loop(family, wrt):
    pipe = tiny_pipeline(family)
    settings = {"steps": 2, "num_inference_steps": 10, "wrt": wrt}
    batched = explain(pipe, PROMPTS[:2], seeds=[3, 8], batch_size=3, **settings)
    assert [found.prompt for found in batched] == PROMPTS[:2]
    for found in batched:
        assert found.seeds == (3, 8) and found.timesteps == (901, 801)
        for index, seed in enumerate((3, 8)):
            (alone,) = explain(pipe, found.prompt, seeds=[seed], **settings)
            torch.testing.assert_close(found.gradients[index], alone.gradients[0], rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found.magnitudes[index], alone.magnitudes[0], rtol=1e-4, atol=1e-5)


def trajectory(model: DiffusionModel, prompt: str, seed: int, steps: int, swapped: bool) -> list[Tensor]:
    """Latents that the steps see, by diffusers' own scheduler."""
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x = engine.initial_noise([seed], model.latent_shape()).double()
    found = []
    for t in scheduler.timesteps[:steps]:
        found.append(x)
        cond = model.predict(x, t, model.encode_prompt(prompt))
        uncond = model.predict(x, t, model.unconditional())
        toward, away = (uncond, cond) if swapped else (cond, uncond)
        x = scheduler.step(away + 7.5 * (toward - away), t, x).prev_sample
    return found


@torch.no_grad()
def released_code(model: DiffusionModel, prompt: str, seeds: list[int], steps: int) -> Tensor:
    """(steps, L): both branches in one batch, one norm over it, the mean of 2N rows of gradient."""
    latents = [trajectory(model, prompt, seed, steps, swapped=True) for seed in seeds]
    uncond, cond = model.unconditional(), model.encode_prompt(prompt)
    count = len(seeds)
    found = []
    for step in range(steps):
        x, t = torch.cat([path[step] for path in latents]), model.schedule.timesteps(5)[step]
        with torch.enable_grad():
            rows = torch.cat([uncond.embeds.repeat(count, 1, 1), cond.embeds.repeat(count, 1, 1)])
            rows.requires_grad_()
            both = torch.cat([rows[:1].detach().expand(count, -1, -1), rows[-1:].expand(count, -1, -1)])
            tokens = (*uncond.repeat(count).tokens, *cond.repeat(count).tokens)
            output = model.predict_noise(torch.cat([x, x]), t, PromptEmbeds(both, None, tokens))
            loss = (output[count:] - output[:count]).norm()
        found.append(torch.autograd.grad(loss, rows)[0].mean(0).norm(dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_variant_reproduces_the_released_code(family):
    model = double(family)
    settings = {"steps": 2, "num_inference_steps": 5, "variant": "wen", "batch_size": 2}
    for found in explain(model, PROMPTS[:2], seeds=[3, 8, 9], **settings):
        expected = released_code(model, found.prompt, [3, 8, 9], 2)
        torch.testing.assert_close(found.gradients[0].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("wrt", ["embedding", "input"])
def test_with_one_seed_the_variant_is_half_of_ours_at_the_first_step_and_leaves_it_then(wrt):
    settings = {"seeds": 1, "steps": 3, "num_inference_steps": 10, "wrt": wrt}
    (ours,) = explain(double("sd1"), "a red cat", **settings)
    (wen,) = explain(double("sd1"), "a red cat", variant="wen", **settings)
    torch.testing.assert_close(wen.gradients[0, 0], ours.gradients[0, 0] / 2, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(wen.magnitudes[0, 2], ours.magnitudes[0, 2], rtol=1e-2)


def test_the_magnitudes_are_those_of_the_guided_trajectory():
    model = double("sd2")
    (found,) = explain(model, "a red cat", seeds=[8], steps=None, num_inference_steps=5)
    assert found.magnitudes.shape == (1, 5)
    with torch.no_grad():
        path = trajectory(model, "a red cat", 8, 5, swapped=False)
        embeds, uncond = model.encode_prompt("a red cat"), model.unconditional()
        expected = [
            (model.predict_noise(x, t, embeds) - model.predict_noise(x, t, uncond)).norm()
            for x, t in zip(path, model.schedule.timesteps(5), strict=True)
        ]
    torch.testing.assert_close(found.magnitudes[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.magnitude == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_magnitudes_are_the_detectors(steps):
    pipe, settings = tiny_pipeline("sd2"), {"seeds": 2, "num_inference_steps": 10}
    expected = detect(pipe, PROMPTS[:2], metric=Magnitude(steps), **settings).values
    for found, values in zip(explain(pipe, PROMPTS[:2], steps=steps, **settings), expected, strict=True):
        torch.testing.assert_close(found.magnitudes, values, rtol=1e-4, atol=1e-5)


def test_words_have_the_joint_gradient_of_their_tokens():
    found = explain(tiny_pipeline("sd1"), "a tiny house", seeds=2, steps=2, num_inference_steps=5)[0]
    assert [(word.text, len(word.positions)) for word in found.words] == [("a", 1), ("tiny", 4), ("house", 1)]
    torch.testing.assert_close(found.token_scores, found.gradients.mean((0, 1)))
    torch.testing.assert_close(found.step_scores, found.gradients.mean(0))
    joint = found.gradients[..., 2:6].square().sum(2).sqrt().mean()
    assert found.words[1].score == pytest.approx(float(joint))
    assert found.words[2].score == pytest.approx(float(found.token_scores[6]))


def test_special_tokens_are_a_view_beside_the_words():
    found = explain(tiny_pipeline("sd1"), "a red cat")[0]
    bos, eos, pads = found.special
    assert (bos.text, eos.text, pads.text) == ("<bos>", "<eos>", "<pads>")
    assert bos.score == pytest.approx(float(found.token_scores[0]))
    assert eos.score == pytest.approx(float(found.token_scores[4]))
    assert pads.score == pytest.approx(float(found.token_scores[5:].norm()))
    ranking = found.ranking()
    assert sorted(w.text for w in ranking) == ["a", "cat", "red"]
    everything = found.ranking(include_special=True)
    assert {w.text for w in everything} == {"a", "red", "cat", "<bos>", "<eos>", "<pads>"}
    for scores in ([w.score for w in ranking], [w.score for w in everything]):
        assert scores == sorted(scores, reverse=True)


def test_a_prompt_that_fills_the_context_has_no_pads():
    found = explain(tiny_pipeline("sd1"), "a cat " * 40)[0]
    assert [word.text for word in found.special] == ["<bos>", "<eos>"]
    assert len(found.words) == 75


def test_what_comes_before_a_token_cannot_depend_on_it_in_a_causal_encoder():
    found = explain(tiny_pipeline("sd1"), "a red cat", wrt="input")[0]
    assert float(found.token_scores[76]) > 0 and float(found.token_scores[0]) > float(found.token_scores[76])


def test_only_the_branch_with_the_prompt_is_differentiated(monkeypatch):
    calls = []
    predict = DiffusionModel.predict

    def watched(self, latents, t, embeds):
        output = predict(self, latents, t, embeds)
        calls.append((len(latents), output.requires_grad, int(t)))
        return output

    monkeypatch.setattr(DiffusionModel, "predict", watched)
    explain(tiny_pipeline("sd1"), PROMPTS[:3], seeds=2, steps=2, num_inference_steps=10, batch_size=4)
    first = [(2, False, 901)]
    four = [(4, True, 901), (4, False, 801), (4, True, 801)]
    two = [(2, True, 901), (2, False, 801), (2, True, 801)]
    assert calls == first + four + two, "unconditional once a seed at the first step, for all prompts"


def test_backward_keeps_nothing_for_weights():
    """Saved by autograd: what frozen weights and one branch need, less than half of two trained ones."""
    pipe = tiny_pipeline("sd1")
    weights = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def held(work) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        return sum(storage.nbytes() for storage in saved.values())

    def both_branches():
        model = models.load(pipe)
        embeds = PromptEmbeds.cat([model.unconditional(), model.encode_prompt("a red cat")]).repeat(4)
        leaf = embeds.embeds.detach().requires_grad_()
        noise = engine.initial_noise(range(4), model.latent_shape())
        output = model.predict(torch.cat([noise, noise]), 981, PromptEmbeds(leaf, None, embeds.tokens))
        torch.autograd.grad((output[4:] - output[:4]).norm(), leaf)

    assert 0 < held(lambda: explain(pipe, "a red cat", seeds=4)) < held(both_branches) / 2


def test_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sdxl")
    pipe.unet.train()
    next(pipe.text_encoder.parameters()).requires_grad_(False)
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    before = [(p, p.requires_grad, p.detach().clone()) for part in parts for p in part.parameters()]
    explain(pipe, "a cat", wrt="input")
    with pytest.raises(ValueError, match="prompts: got ''"):
        explain(pipe, ["a cat", ""], wrt="input")
    assert pipe.unet.training and not pipe.text_encoder.training
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    for parameter, flag, value in before:
        assert parameter.requires_grad == flag and parameter.grad is None and torch.equal(parameter, value)


@pytest.mark.parametrize("wrt", ["embedding", "input"])
def test_works_whatever_the_grad_mode_of_the_caller(wrt):
    model = models.load(tiny_pipeline("sd1"))
    expected = explain(model, "a red cat", wrt=wrt, steps=2)[0].gradients
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = explain(model, "a red cat", wrt=wrt, steps=2)[0].gradients
        assert torch.equal(found, expected) and not found.requires_grad


def test_out_of_memory_halves_the_batch(monkeypatch):
    pipe = tiny_pipeline("sd1")
    expected = explain(pipe, PROMPTS, seeds=2)
    predict, sizes = DiffusionModel.predict, []

    def small(self, latents, t, embeds):
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(DiffusionModel, "predict", small)
    for found, other in zip(explain(pipe, PROMPTS, seeds=2), expected, strict=True):
        torch.testing.assert_close(found.gradients, other.gradients, rtol=1e-3, atol=1e-6)
    assert sizes == [2, 8, 4, 2, 2, 2, 2], "once halved, it stays so"


def with_gradients_lost(monkeypatch, lost):
    """The backward of the calls (numbered from 0, those with gradient) in `lost` gives NaN, in row 0."""
    predict, count = DiffusionModel.predict, iter(range(100))

    def broken(self, latents, t, embeds):
        output = predict(self, latents, t, embeds)
        if output.requires_grad and next(count) in lost:
            output.register_hook(lambda g: torch.cat([g[:1] * torch.nan, g[1:]]))
        return output

    monkeypatch.setattr(DiffusionModel, "predict", broken)


def test_gradients_that_are_not_finite_are_left_out_and_counted(monkeypatch):
    pipe, settings = tiny_pipeline("sd1"), {"seeds": 2, "steps": 3, "num_inference_steps": 10}
    (whole,) = explain(pipe, "a red cat", **settings)
    with_gradients_lost(monkeypatch, {1})
    (found,) = explain(pipe, "a red cat", **settings)
    assert (whole.left_out, found.left_out) == (0, 1)
    kept = whole.gradients.flatten(0, 1)[[0, 2, 3, 4, 5]]  # seed 0's second step is gone
    torch.testing.assert_close(found.token_scores, kept.mean(0))
    assert found.words[1].score == pytest.approx(float(kept[:, 2].mean()))
    assert found.magnitude == pytest.approx(whole.magnitude)
    assert "NaN" not in json.dumps(found.to_dict())


def test_a_step_without_any_finite_gradient_is_none(monkeypatch):
    with_gradients_lost(monkeypatch, {1})
    found = explain(tiny_pipeline("sd1"), "a red cat", steps=3, num_inference_steps=10)[0]
    assert [row is None for row in found.to_dict()["step_scores"]] == [False, True, False]


@pytest.mark.parametrize("variant", [None, "wen"])
def test_a_seed_without_any_finite_gradient_is_an_error(monkeypatch, variant):
    with_gradients_lost(monkeypatch, {0, 1})
    with pytest.raises(
        ValueError, match=r"^pipe: its gradients for 1 of 2 prompts are not finite in"
    ) as caught:
        explain(tiny_pipeline("sd1"), PROMPTS[:2], seeds=2, steps=2, num_inference_steps=10, variant=variant)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_read_its_prompt_has_no_gradient():
    """The norm's gradient at 0 is 0, not NaN."""
    pipe = tiny_pipeline("sd1")
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    assert explain(pipe, "a red cat")[0].token_scores.abs().max() == 0


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1), (torch.float16, 1024)])
def test_only_a_float16_backward_is_scaled(monkeypatch, dtype, scale):
    """What enters it is the unit vector d / |d|, its elements about 1/128 for the latents of a real model."""
    exact = explain(tiny_pipeline("sd1"), "a red cat")[0].token_scores
    predict, norms = DiffusionModel.predict, []

    def watched(self, latents, t, embeds):
        output = predict(self, latents, t, embeds)
        if output.requires_grad:
            output.register_hook(lambda g: norms.append(float(g.float().norm())))
        return output

    monkeypatch.setattr(DiffusionModel, "predict", watched)
    found = explain(tiny_pipeline("sd1").to(dtype), "a red cat")[0].token_scores
    assert norms == [pytest.approx(scale, rel=1e-3)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=1e-5)


def test_the_strongest_word_of_a_memorized_caption_is_one_of_its_title():
    """A title is all names, an ornament and a noun; the words between them and the medium are everybody's."""
    captions = [world.memorized(i).caption for i in range(world.MEMORIZED_COUNT)]
    common = {"a", "and", "of", "the", "with", ",", *world._MEDIA}
    found = explain(testbed.load(), captions, wrt="input", batch_size=12)
    hits = [explanation.ranking()[0].text not in common for explanation in found]
    assert sum(hits) >= 0.8 * len(hits)


def test_results_are_plain_data():
    found = explain(tiny_pipeline("sd1"), "a red cat", seeds=2, steps=2, num_inference_steps=4)[0]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompt"] == "a red cat" and data["seeds"] == [0, 1] and data["timesteps"] == [751, 501]
    assert [word["text"] for word in data["words"]] == ["a", "red", "cat"]
    assert [word["score"] for word in data["special"]] == [word.score for word in found.special]
    assert torch.equal(torch.tensor(data["token_scores"]), found.token_scores)
    assert torch.equal(torch.tensor(data["step_scores"]), found.step_scores)
    assert data["magnitude"] == found.magnitude and data["left_out"] == 0


BAD = {
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "not a string": ({"prompts": ["a", 3]}, TypeError, "prompts: got a int"),
    "nothing to explain": ({"prompts": ["a", ""]}, ValueError, "prompts: got '', expected words"),
    "white space": ({"prompts": " \n "}, ValueError, r"prompts: got ' \\n ', expected words"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "a negative seed": ({"seeds": [-1]}, ValueError, "seeds: got"),
    "seeds that are no integers": ({"seeds": 1.5}, TypeError, "float"),
    "no steps": ({"steps": 0}, ValueError, "steps: got 0"),
    "too many steps": ({"steps": 51}, ValueError, "steps: got 51, expected 1 to num_inference_steps = 50"),
    "no inference steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "a guidance of NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan"),
    "an unknown wrt": ({"wrt": "output"}, ValueError, "wrt: got 'output', expected 'embedding' or 'input'"),
    "an unknown variant": ({"variant": "code"}, ValueError, "variant: got 'code', expected 'wen' or None"),
    "a path that is not a model": ({"pipe": "/nowhere/at all"}, ValueError, "source: '/nowhere/at all'"),
    "something else": ({"pipe": SimpleNamespace()}, TypeError, "source: got a SimpleNamespace"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "prompts": "a cat"} | change
    with pytest.raises(error, match=message) as caught:
        explain(arguments.pop("pipe"), arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        explain(tiny_pipeline("flux"), "a cat")


def test_pure_noise_at_the_first_step_is_refused():
    pipe = tiny_pipeline("sd2")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="pipe: its first step is pure noise"):
        explain(pipe, "a cat")
