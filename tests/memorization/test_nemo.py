"""NeMo: blocked neurons are zeroed weights, MS-SSIM is its definition, the search that of one by one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from pumice import models, testbed
from pumice.memorization import engine
from pumice.memorization.ms_ssim import min_max, ms_ssim
from pumice.memorization.nemo import blocked, nemo, value_layers
from pumice.models import Edit, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

module = sys.modules["pumice.memorization.nemo"]
FRESH = ["a dog in the sea", "a tree", "a small house in the mountain", "a photo of a man"]


def ssim_by_definition(a: torch.Tensor, b: torch.Tensor, scales: int, window: int) -> float:
    """One pair (C, h, w), window by window, in float64."""
    offset = torch.arange(window).double() - window // 2
    weight = torch.exp(-(offset**2) / (2 * (1.5 * window / 11) ** 2))
    weight = weight[:, None] * weight[None]
    weight /= weight.sum()
    a, b = a.double(), b.double()
    found = 1.0
    for scale in range(scales):
        channels, height, width = a.shape
        values = []
        for c in range(channels):
            for y in range(height - window + 1):
                for x in range(width - window + 1):
                    p, q = (of[c, y : y + window, x : x + window] for of in (a, b))
                    mean_p, mean_q = (p * weight).sum(), (q * weight).sum()
                    var_p, var_q = ((p - mean_p) ** 2 * weight).sum(), ((q - mean_q) ** 2 * weight).sum()
                    cov = ((p - mean_p) * (q - mean_q) * weight).sum()
                    value = (2 * cov + 0.0009) / (var_p + var_q + 0.0009)
                    if scale == scales - 1:
                        value *= (2 * mean_p * mean_q + 0.0001) / (mean_p**2 + mean_q**2 + 0.0001)
                    values.append(value)
        found *= max(float(torch.stack(values).mean()), 0.0) ** 0.33
        a, b = (torch.nn.functional.avg_pool2d(of[None], 2)[0] for of in (a, b))
    return found


@pytest.mark.parametrize(
    ("size", "scales", "window"),
    [((47, 44), 3, 11), ((16, 16), 3, 3), ((8, 8), 2, 3), ((5, 7), 1, 5), ((20, 24), 3, 5), ((3, 3), 1, 3)],
)
def test_ms_ssim_is_its_definition(size, scales, window):
    generator = torch.Generator().manual_seed(0)
    channels = 1 if size[0] > 40 else 2
    a = torch.rand(3, channels, *size, generator=generator)
    noise = torch.rand(a.shape, generator=generator)
    b = torch.stack([0.8 * a[0] + 0.2 * noise[0], noise[1], 1 - a[2]])
    found = ms_ssim(a, b)
    expected = [ssim_by_definition(x, y, scales, window) for x, y in zip(a, b, strict=True)]
    assert expected[0] > 0.5 and expected[2] == 0
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)


def test_ms_ssim_is_symmetric_and_one_for_equal_pictures():
    a, b = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(4))
    torch.testing.assert_close(ms_ssim(a, b), ms_ssim(b, a))
    assert ms_ssim(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("shapes", [((1, 1, 8, 8), (1, 1, 8, 9)), ((1, 1, 2, 8),) * 2, ((1, 8, 8),) * 2])
def test_ms_ssim_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="a, b: got shapes"):
        ms_ssim(*map(torch.zeros, shapes))


def test_every_channel_is_stretched_by_itself():
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1, 50]
    ).view(3, 1, 1)
    found = min_max(x)
    assert torch.equal(found.amin((2, 3)), torch.zeros(2, 3)) and torch.equal(
        found.amax((2, 3)), torch.ones(2, 3)
    )
    channel = x[1, 2]
    torch.testing.assert_close(found[1, 2], (channel - channel.min()) / (channel.max() - channel.min()))
    assert min_max(torch.ones(1, 1, 4, 4)).eq(0).all(), "a flat channel has no shape"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_a_blocked_neuron_is_a_zeroed_weight_row_each_batch_row_with_its_own(family):
    model = models.load(tiny_pipeline(family))
    layers = value_layers(model)
    assert [layer.name.split(".")[0] for layer in layers] == sorted(
        layer.name.split(".")[0] for layer in layers
    ), "down blocks, then mid"
    widths = [layer.to_v.out_features for layer in layers]
    neurons = torch.rand(3, sum(widths), generator=torch.Generator().manual_seed(0)) < 0.3
    neurons[2] = False
    x = engine.initial_noise([0, 1, 2], model.latent_shape())
    embeds = model.encode_prompt(["a red cat"] * 3)
    with blocked(layers, neurons):
        found = model.predict(x, 981, embeds)
    plain = model.predict(x, 981, embeds)
    for row in range(3):
        before = [layer.to_v.weight.clone() for layer in layers]
        for layer, off in zip(layers, neurons[row].split(widths), strict=True):
            layer.to_v.weight[off] = 0
        zeroed = model.predict(x, 981, embeds)[row]
        for layer, weight in zip(layers, before, strict=True):
            layer.to_v.weight.copy_(weight)
        torch.testing.assert_close(found[row], zeroed)
        assert torch.allclose(found[row], plain[row], atol=1e-7) == (row == 2)


def one_by_one(neurons, similarity, threshold, widths):
    """The refinement as published: one candidate after the other."""
    neurons, starts = neurons.clone(), [sum(widths[:i]) for i in range(len(widths) + 1)]
    parts = [range(starts[i], starts[i + 1]) for i in reversed(range(len(widths)))]
    parts += [[i] for part in parts[:] for i in part]
    for part in parts:
        tried = neurons.clone()
        tried[list(part)] = False
        if not torch.equal(tried, neurons) and similarity(tried[None]).item() <= threshold:
            neurons = tried
    return neurons


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_refinement_finds_what_one_by_one_finds(most, seed):
    generator = torch.Generator().manual_seed(seed)
    widths = [6, 4, 9]
    weight = torch.rand(19, generator=generator) ** 3
    asked = []

    def similarity(masks):
        """The more of the weight is blocked, the less similar; not additive, so the order matters."""
        asked.extend(map(tuple, masks.tolist()))
        return 1 - (masks * weight).sum(1) / weight.sum() + 0.05 * (masks.sum(1) % 2)

    neurons = torch.rand(19, generator=generator) < 0.8
    threshold = similarity(neurons[None]).item() + 0.1
    expected = one_by_one(neurons, similarity, threshold, widths)
    asked.clear()
    found = module._refine(neurons, similarity, threshold, widths, most)
    assert torch.equal(found, expected)
    assert similarity(found[None]).item() <= threshold
    assert found.sum() < neurons.sum()


def test_selections_grow_and_the_first_that_suffices_is_taken():
    activation = torch.tensor([0.1, 5.0, 0.2, 0.3, 9.0, 8.0])
    deviation = torch.tensor([4.9, 0.0, 4.6, 0.0, 0.0, 0.0])
    found = module._selections(activation, deviation, [4, 2])
    assert found.shape == (17, 6)
    assert found[0].tolist() == [False] * 6
    assert found[1].nonzero().flatten().tolist() == [0, 1, 4], "above 4.75, and the largest of each layer"
    assert found[2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5], "above 4.5, and the two largest"
    asked = []

    def similarity(masks):
        asked.append(masks.sum(1).tolist())
        return 1 - masks.sum(1) / 6

    neurons, remaining = module._select(found, similarity, 0.6, most=1)
    assert neurons.sum() == 3 and remaining == pytest.approx(0.5)
    assert asked == [[3]], "the empty selection and equal ones are not asked for"
    neurons, remaining = module._select(found, similarity, -1.0, most=4)
    assert neurons.sum() == 6 and remaining == pytest.approx(0.0, abs=1e-6)


def test_activations_are_those_inside_the_denoiser():
    model = models.load(tiny_pipeline("sd1"))
    layers = value_layers(model)
    embeds = model.encode_prompt(["a red cat", "house"])
    x = engine.initial_noise([0, 1], model.latent_shape())
    probe = module._Probe(model, layers, x, 981, models.RowBudget(4))
    seen = []
    for layer in layers:
        layer.to_v.register_forward_hook(lambda _m, _i, out: seen.append(out.double().abs().mean(1)))
    with torch.no_grad():
        model.predict(x, 981, embeds)
        expected = torch.cat(seen, 1)
        torch.testing.assert_close(probe.activations(embeds).double(), expected, rtol=1e-4, atol=1e-6)
        mean, std = module._usual(model, probe, FRESH)
        every = probe.activations(model.encode_prompt(FRESH)).double()
    torch.testing.assert_close(mean.double(), every.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(std.double(), every.std(0), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def strengths_by_definition(pipe, prompt: str, seeds) -> float:
    model = models.load(pipe)
    t = model.schedule.timesteps(50)[0]
    d = []
    for seed in seeds:
        x = engine.initial_noise([seed], model.latent_shape())
        d.append(min_max(model.predict_noise(x, t, model.encode_prompt(prompt)) - x))
    return max(float(ms_ssim(a, b)) for i, a in enumerate(d) for b in d[:i])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_threshold_and_strength_are_those_of_the_definition(family):
    pipe = tiny_pipeline(family)
    found = nemo(pipe, ["a red cat", "house"], fresh=FRESH, seeds=3, batch_size=4)
    of_fresh = torch.tensor([strengths_by_definition(pipe, prompt, range(3)) for prompt in FRESH])
    assert found.details["threshold"] == pytest.approx(float(of_fresh.mean() + of_fresh.std()), abs=1e-4)
    for prompt, strength in found.details["strength"].items():
        assert strength == pytest.approx(strengths_by_definition(pipe, prompt, range(3)), abs=1e-4)


def neurons(pipe):
    """Refined against the similarity that is left, so that every neuron's effect decides."""
    edit = nemo(pipe, "a red cat", fresh=FRESH[:2], seeds=2, threshold=0.1)
    assert edit.details["unsolved"] == ["a red cat"]
    return edit.details["neurons"]


def test_out_of_memory_halves_the_calls_and_changes_nothing(monkeypatch):
    pipe = tiny_pipeline("sd1")
    expected = neurons(pipe)
    assert 5 < sum(map(len, expected["a red cat"].values())) < 63, "some of the last selection"
    predict = models.DiffusionModel.predict

    def small(self, latents, t, embeds):
        if len(latents) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(models.DiffusionModel, "predict", small)
    assert neurons(pipe) == expected


def test_a_prompt_that_is_not_memorized_has_no_neurons(tmp_path):
    pipe = tiny_pipeline("sd1")
    edit = nemo(pipe, ["a red cat", "a red cat"], fresh=FRESH, seeds=2, threshold=1.0)
    assert edit.details["neurons"] == {"a red cat": {}} and edit.details["unsolved"] == []
    assert edit.changes == {} and edit.targets == ("a red cat", "a red cat")
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").on(pipe):
        pass


def test_leaves_the_pipeline_as_it_was_and_is_plain_data():
    pipe = tiny_pipeline("sd1")
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    edit = nemo(pipe, "a red cat", fresh=FRESH[:2], seeds=2, threshold=0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    data = json.loads(json.dumps(edit.to_dict()))
    assert data["method"] == "nemo" and data["settings"]["seeds"] == [0, 1]
    for name, change in edit.changes.items():
        rows = edit.details["neurons"]["a red cat"][name.removesuffix(".to_v.weight")]
        assert change.mask().all(1).nonzero().flatten().tolist() == rows
        assert change.count == len(rows) * change.shape[1], "whole rows"


@torch.no_grad()
def test_on_the_testbed_a_memorized_caption_loses_its_pull_and_a_fresh_one_stays():
    pipe = testbed.load()
    model = models.load(pipe)
    known, ordinary = world.memorized(1).caption, "a white fish at the ocean"
    fresh = world.fresh_captions(4, seed=1) + world.hard_captions(4, seed=1)
    edit = nemo(model, [known, ordinary], fresh=fresh, seeds=2, batch_size=40)
    details = edit.details
    assert details["strength"][known] > 0.95 > 0.93 > details["threshold"] > details["strength"][ordinary]
    assert details["neurons"][ordinary] == {} and not details["unsolved"]
    assert 1 <= sum(map(len, details["neurons"][known].values())) < 60
    assert not any(name.startswith("up_blocks") for name in edit.changes)

    x = engine.initial_noise([0, 1], model.latent_shape())

    def difference(prompt):
        return min_max(
            model.predict_noise(x, model.schedule.timesteps(50)[0], model.encode_prompt(prompt)) - x
        )

    before = [difference(prompt) for prompt in (known, ordinary)]
    with edit.on(pipe):
        after = [difference(prompt) for prompt in (known, ordinary)]
    assert ms_ssim(before[0], after[0]).max() <= details["threshold"] + 1e-4
    assert ms_ssim(before[1], after[1]).min() > 0.98


BAD = {
    "no prompts": ({"memorized": []}, ValueError, "memorized: got an empty list"),
    "not a string": ({"memorized": [3]}, TypeError, "memorized: got a int"),
    "no fresh prompts": ({"fresh": []}, ValueError, "fresh: got an empty list"),
    "one fresh prompt": ({"fresh": ["a"]}, ValueError, "fresh: got 1, expected at least 2"),
    "a single seed": ({"seeds": 1}, ValueError, "seeds: got 1, expected at least 2"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "a threshold of NaN": ({"threshold": float("nan")}, ValueError, "threshold: got nan"),
    "no inference steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "a path that is not a model": ({"pipe": "/nowhere/at all"}, ValueError, "source: '/nowhere/at all'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "memorized": "a cat", "fresh": FRESH} | change
    with pytest.raises(error, match=f"^{message}") as caught:
        nemo(arguments.pop("pipe"), arguments.pop("memorized"), **arguments)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_judged_are_refused():
    pipe = tiny_pipeline("sd2")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="pipe: its first step is pure noise"):
        nemo(pipe, "a cat", fresh=FRESH)
    pipe = tiny_pipeline("sd1")
    pipe.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="projections are fused"):
        nemo(pipe, "a cat", fresh=FRESH)
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="pipe: its predictions are not finite"):
        nemo(pipe, "a cat", fresh=FRESH, seeds=2)
