"""Wanda: streamed statistics against everything kept and summed in float64, and the selection's rules."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig

from pumice import models, testbed
from pumice.memorization import engine
from pumice.memorization.wanda import (
    feed_forward,
    largest,
    select,
    selected_per_row,
    wanda,
    wanda_edit,
    wanda_statistics,
)
from pumice.models import Edit, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

PROMPTS = ["a red cat", "a photo of a dog in the city", "house"]
FEW = {"steps": 3, "num_inference_steps": 10}


@torch.no_grad()
def brute_force(pipe, prompts, seeds, steps, n, guidance_scale, rows) -> dict[str, torch.Tensor]:
    """One prompt and seed at a time, diffusers' own scheduler, all inputs kept, one sum in float64."""
    model = models.load(pipe)
    layers = feed_forward(model)
    kept = {name: [[] for _ in range(steps)] for name in layers}
    step = 0
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: kept[name][step].append(inputs[0]))
        for name, layer in layers.items()
    ]
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for prompt in prompts:
        for seed in seeds:
            scheduler.set_timesteps(n)
            x = engine.initial_noise([seed], model.latent_shape())
            for step in range(steps):
                t = scheduler.timesteps[step]
                uncond = model.predict(x, t, model.unconditional())
                if rows == "cond":
                    for of in kept.values():
                        of[step].pop()
                cond = model.predict(x, t, model.encode_prompt(prompt))
                x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    for handle in handles:
        handle.remove()
    return {
        name: torch.stack(
            [
                torch.nn.functional.normalize(torch.cat([h.flatten(0, 1) for h in of]).double(), dim=1).norm(
                    dim=0
                )
                for of in steps_of
            ]
        )
        for name, steps_of in kept.items()
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("rows", ["both", "cond"])
def test_streamed_statistics_are_those_of_one_sum_in_float64(family, rows):
    pipe = tiny_pipeline(family)
    found = wanda_statistics(pipe, PROMPTS, **FEW, seeds=[3, 8], rows=rows, batch_size=5)
    target = brute_force(pipe, PROMPTS, (3, 8), 3, 10, 7.5, rows)
    base = brute_force(pipe, [""], (3, 8), 3, 10, 7.5, rows)
    assert list(found.target) == list(found.base) == list(target)
    for name, norms in target.items():
        assert norms.shape == (3, feed_forward(models.load(pipe))[name].in_features)
        torch.testing.assert_close(found.target[name].double(), norms, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(found.base[name].double(), base[name] * 3**0.5, rtol=2e-4, atol=1e-6)


def test_a_prompt_n_times_is_the_prompt_times_the_root_of_n():
    pipe = tiny_pipeline("sd1")
    once = wanda_statistics(pipe, [""], **FEW)
    often = wanda_statistics(pipe, [""] * 10, **FEW)
    for name, norms in once.target.items():
        torch.testing.assert_close(once.base[name], norms)
        torch.testing.assert_close(often.target[name], norms * 10**0.5, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(often.base[name], often.target[name], rtol=1e-4, atol=1e-6)


def test_the_sums_of_squares_add_up_to_the_rows():
    """Every normalised row has norm 1: (2 branches) x 2 prompts x tokens."""
    found = wanda_statistics(tiny_pipeline("sd1"), PROMPTS[:2], **FEW)
    tokens = {
        "down_blocks.0": 256,
        "down_blocks.1": 64,
        "mid_block": 64,
        "up_blocks.0": 64,
        "up_blocks.1": 256,
    }
    for name, norms in found.target.items():
        rows = next(count for block, count in tokens.items() if name.startswith(block))
        torch.testing.assert_close(norms.double().square().sum(1), torch.full((3,), 4.0 * rows).double())


def test_forward_chunking_changes_nothing():
    pipe = tiny_pipeline("sd1")
    expected = wanda_statistics(pipe, PROMPTS, **FEW)
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(16, dim=1)
    found = wanda_statistics(pipe, PROMPTS, **FEW)
    for name, norms in expected.target.items():
        torch.testing.assert_close(found.target[name], norms, rtol=1e-4, atol=1e-6)


def test_compiled_blocks_are_listened_to():
    pipe = tiny_pipeline("sd1")
    expected = wanda_statistics(pipe, PROMPTS[:1], **FEW)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager")
    model = models.load(pipe)
    with torch.no_grad():
        model.predict(torch.zeros(2, *model.latent_shape()), 901, model.encode_prompt("a"))
    found = wanda_statistics(pipe, PROMPTS[:1], **FEW)
    for name, norms in expected.target.items():
        torch.testing.assert_close(found.target[name], norms, rtol=1e-4, atol=1e-6)


def random_layer(rows: int = 12, columns: int = 50, steps: int = 4):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.2] = 0
    return weight, *torch.rand(2, steps, columns, generator=generator)


@pytest.mark.parametrize("select_ratio", [0.0, 0.25, 0.5, 0.75])
def test_selects_what_the_definition_says(select_ratio):
    weight, target, base = random_layer()
    times = torch.zeros_like(weight)
    for a_target, a_base in zip(target.double(), base.double(), strict=True):
        score, other = weight.double().abs() * a_target, weight.double().abs() * a_base
        for row in range(len(weight)):
            order = score[row].argsort(descending=True, stable=True)
            for column in order[:5].tolist():  # floor(0.1 * 50)
                times[row, column] += bool(score[row, column] > other[row, column])
    expected = times > select_ratio * 4
    assert expected.any()
    assert torch.equal(select(weight, target, base, 0.1, select_ratio), expected)


def test_stronger_columns_are_stronger_scores_wherever_there_is_a_weight():
    weight, target, base = random_layer()
    everything = select(weight, target[:1], base[:1], 1.0, 0.0)
    scores = [weight.double().abs() * norms[0].double() for norms in (target, base)]
    assert torch.equal(everything, scores[0] > scores[1])
    assert not select(weight, target, target, 1.0, 0.0).any()
    assert not everything[weight == 0].any()


@pytest.mark.parametrize("count", [0, 1, 3, 7, 20])
def test_of_equal_scores_the_lower_column_is_taken(count):
    scores = torch.randint(0, 3, (40, 20), generator=torch.Generator().manual_seed(2)).float()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(largest(scores, count), expected.scatter(1, order, True))


def test_how_many_are_selected_in_stable_diffusion():
    assert [selected_per_row(0.01, columns) for columns in (1280, 2560, 5120)] == [12, 25, 51]
    assert selected_per_row(0.29, 100) == 29, "0.29 * 100 is 28.999999999999996"
    widths = [320] * 5 + [640] * 5 + [1280] * 6  # of its 16 blocks, each of 4 x as many columns
    assert sum(width * selected_per_row(0.01, 4 * width) for width in widths) == 490_880


def masks(edit: Edit) -> dict[str, torch.Tensor]:
    return {name: change.mask() for name, change in edit.changes.items()}


def test_masks_do_not_depend_on_the_batch_size(monkeypatch):
    pipe = tiny_pipeline("sd1")
    settings = {"steps": 2, "num_inference_steps": 10, "seeds": 2, "sparsity": 0.1}
    expected = masks(wanda(pipe, PROMPTS, **settings))
    assert sum(int(mask.sum()) for mask in expected.values()) > 100
    for batch_size in (2, 5):
        found = masks(wanda(pipe, PROMPTS, batch_size=batch_size, **settings))
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    predict = models.DiffusionModel.predict

    def small(self, latents, t, embeds):
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(models.DiffusionModel, "predict", small)
    found = masks(wanda(pipe, PROMPTS, **settings))
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_only_the_first_steps_are_run(monkeypatch):
    rows = []
    predict = models.DiffusionModel.predict
    monkeypatch.setattr(
        models.DiffusionModel, "predict", lambda self, x, t, e: rows.append(len(x)) or predict(self, x, t, e)
    )
    wanda(tiny_pipeline("sd1"), PROMPTS, steps=4)
    assert rows == [6] * 4 + [2] * 4, "three prompts in both branches, then the empty prompt once"


def test_several_sparsities_from_one_collection():
    pipe = tiny_pipeline("sd1")
    statistics = wanda_statistics(pipe, PROMPTS, **FEW)
    counts = []
    for sparsity in (0.02, 0.1, 0.3):
        edit = wanda_edit(pipe, statistics, sparsity=sparsity)
        again = masks(wanda(pipe, PROMPTS, **FEW, sparsity=sparsity))
        assert all(torch.equal(mask, again[name]) for name, mask in masks(edit).items())
        counts.append(sum(change.count for change in edit.changes.values()))
    assert 0 < counts[0] < counts[1] < counts[2]
    with pytest.raises(ValueError, match="statistics: they were collected from a model with other weights"):
        wanda_edit(tiny_pipeline("sd1", seed=1), statistics)


def test_the_edit_zeroes_its_weights_and_tells_how_it_was_made(tmp_path):
    pipe = tiny_pipeline("sd1")
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    edit = wanda(pipe, PROMPTS, **FEW, sparsity=0.05, guidance_scale=3.0)
    assert all(torch.equal(weight, pipe.unet.state_dict()[name]) for name, weight in before.items())
    assert set(edit.changes) == {f"{name}.weight" for name in feed_forward(models.load(pipe))}
    assert (edit.method, edit.targets) == ("wanda", tuple(PROMPTS))
    assert edit.settings == {
        "sparsity": 0.05,
        "select_ratio": 0.0,
        "steps": 3,
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "seeds": [0],
        "rows": "both",
    }
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").on(pipe):
        for name, mask in masks(edit).items():
            weight = pipe.unet.get_parameter(name)
            assert not weight[mask].any() and torch.equal(weight[~mask], before[name][~mask])
    assert all(torch.equal(weight, pipe.unet.state_dict()[name]) for name, weight in before.items())


def test_statistics_are_plain_data():
    found = wanda_statistics(tiny_pipeline("sd1"), "a cat", **FEW)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompts"] == ["a cat"] and data["settings"]["steps"] == 3
    for name, norms in found.target.items():
        assert torch.equal(torch.tensor(data["target"][name]), norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    pipe = tiny_pipeline("sd1")
    expected = wanda_statistics(pipe, PROMPTS, **FEW)
    pipe.to(dtype=dtype)
    found = wanda_statistics(pipe, PROMPTS, **FEW)
    for name, norms in expected.target.items():
        assert found.target[name].dtype == torch.float32
        torch.testing.assert_close(found.target[name], norms, rtol=0.05, atol=0.05 * float(norms.max()))
    assert wanda_edit(pipe, found, sparsity=0.1).report()


@torch.no_grad()
def test_memorized_captions_of_the_testbed_lose_more_than_fresh_ones():
    """Their pull at the first step shrinks; that of fresh captions stays."""
    from pumice.memorization import detect

    pipe = testbed.load()
    known = [world.memorized(i).caption for i in range(4)]
    fresh = world.fresh_captions(4, seed=11)
    edit = wanda(pipe, known, sparsity=0.3, steps=4)
    before = detect(pipe, known + fresh, seeds=1).scores
    with edit.on(pipe):
        after = detect(pipe, known + fresh, seeds=1).scores
    loss = (before - after) / before
    assert loss[:4].min() > 0.15 and loss[:4].mean() > loss[4:].mean() + 0.1


BAD = {
    "no prompts": ({"memorized": []}, ValueError, "memorized: got an empty list"),
    "not a string": ({"memorized": ["a", 3]}, TypeError, "memorized: got a int"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "no steps": ({"steps": 0}, ValueError, "steps: got 0"),
    "too many steps": ({"steps": 51}, ValueError, "steps: got 51, expected 1 to num_inference_steps = 50"),
    "no inference steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "no sparsity": ({"sparsity": 0.0}, ValueError, "sparsity: got 0.0"),
    "too much sparsity": ({"sparsity": 1.5}, ValueError, "sparsity: got 1.5"),
    "a sparsity of NaN": ({"sparsity": float("nan")}, ValueError, "sparsity: got nan"),
    "less than a weight": ({"sparsity": 1e-4, "steps": 1}, ValueError, "sparsity: got 0.0001, expected at"),
    "a ratio of all": ({"select_ratio": 1.0}, ValueError, "select_ratio: got 1.0"),
    "other rows": ({"rows": "uncond"}, ValueError, "rows: got 'uncond', expected 'both' or 'cond'"),
    "batch of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "a guidance of infinity": ({"guidance_scale": float("inf")}, ValueError, "guidance_scale: got inf"),
    "a path that is not a model": ({"pipe": "/nowhere/at all"}, ValueError, "source: '/nowhere/at all'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"pipe": tiny_pipeline("sd1"), "memorized": "a cat"} | change
    with pytest.raises(error, match=f"^{message}") as caught:
        wanda(arguments.pop("pipe"), arguments.pop("memorized"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_model_that_computes_nan_is_not_judged():
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_in.bias, float("nan"))
    with pytest.raises(ValueError, match="pipe: its feed-forward activations are not finite"):
        wanda(pipe, "a cat", **FEW)


def test_weights_under_an_adapter_are_refused():
    pipe = tiny_pipeline("sd1")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"]))
    with pytest.raises(UnsupportedModelError, match=r"ff\.net\.2: a LoRA adapter is attached"):
        wanda(pipe, "a cat", **FEW)
