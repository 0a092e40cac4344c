import json

import numpy as np
import pytest
import torch

from pumice import models, testbed
from pumice.memorization.dori import dori
from pumice.models import DiffusionModel, PromptEmbeds, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

SMALL = {"steps": 3, "batch_size": 2}


def pictures(count, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def embeddings(attack):
    return [
        value for value in (attack.prompt_embeds.embeds, attack.prompt_embeds.pooled) if value is not None
    ]


def assert_close(a, b):
    """In the mean: Adam turns the rounding of gradients that are almost zero into whole steps of 0.1."""
    for one, other in zip(a, b, strict=True):
        assert (one - other).square().mean().sqrt() < 1e-3


def assert_same(a, b, rows=slice(None)):
    assert_close(embeddings(a), [value[rows] for value in embeddings(b)])
    torch.testing.assert_close(a.losses, b.losses[rows], rtol=1e-4, atol=1e-5)


def by_hand(pipe, image, prompt, *, steps, batch_size, lr=0.1, seed=0, lost=()):
    """One picture with torch's own Adam and the schedule written out; `lost` steps are never made."""
    model = models.load(pipe)
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x0, start = model.encode_image(image[None]), model.encode_prompt(prompt or "")
    leaves = [value for value in (start.embeds, start.pooled) if value is not None]
    if prompt is None:
        leaves = [torch.randn(leaf.shape, generator=generator) for leaf in leaves]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    adam, losses = torch.optim.Adam(leaves, lr=lr), []
    for step in range(steps):
        noise = torch.randn((batch_size, *x0.shape[1:]), generator=generator)
        t = torch.randint(1000, (batch_size,), generator=generator)
        errors = []
        for n in range(batch_size):
            squared = model.schedule.alphas_cumprod[t[n]].float()
            x_t = squared.sqrt() * x0 + (1 - squared).sqrt() * noise[n]
            target = noise[n : n + 1]
            if model.prediction_type == "v_prediction":
                target = squared.sqrt() * noise[n] - (1 - squared).sqrt() * x0
            y = PromptEmbeds(leaves[0], leaves[1] if len(leaves) > 1 else None, start.tokens)
            errors.append((model.predict(x_t, t[n], y) - target).square().mean())
        loss = torch.stack(errors).mean()
        losses.append(loss.item())
        if step not in lost:
            adam.zero_grad()
            loss.backward()
            adam.step()
    return [leaf.detach() for leaf in leaves], losses


@pytest.mark.parametrize("prompt", ["a red cat", None], ids=["prompt", "gaussian"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_it_is_adam_on_the_diffusion_loss(family, prompt):
    pipe = tiny_pipeline(family)
    image = pictures(1)[0]
    found = dori(pipe, image[None], None if prompt is None else [prompt], seed=7, **SMALL)
    expected, losses = by_hand(pipe, image, prompt, seed=7, **SMALL)
    assert_close(embeddings(found), expected)
    assert found.losses[0].tolist() == pytest.approx(losses, rel=1e-4)
    assert found.skipped.tolist() == [0]


@pytest.mark.parametrize("prompts", [["a cat", "a dog", "a red car"], None], ids=["prompts", "gaussian"])
def test_company_and_rows_change_nothing(prompts):
    pipe, images = tiny_pipeline("sd1"), pictures(3)
    together = dori(pipe, images, prompts, **SMALL)
    for rows in (1, 4):
        assert_same(dori(pipe, images, prompts, rows=rows, **SMALL), together)
    alone = dori(pipe, images[2:], None if prompts is None else prompts[2:], **SMALL)
    assert_same(alone, together, slice(2, 3))


def test_seeds_draw_other_noise():
    pipe, images = tiny_pipeline("sd1"), pictures(1)
    first, again, other = (dori(pipe, images, "a cat", seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(first.prompt_embeds.embeds, again.prompt_embeds.embeds)
    assert not torch.allclose(first.losses, other.losses)


def test_out_of_memory_halves_the_rows(monkeypatch):
    pipe, images = tiny_pipeline("sd1"), pictures(3)
    expected = dori(pipe, images, **SMALL)
    predict, seen = DiffusionModel.predict, []

    def small(self, latents, t, embeds):
        seen.append(len(latents))
        if len(seen) == 4:  # in the second step, with a part of its gradient summed up
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return predict(self, latents, t, embeds)

    monkeypatch.setattr(DiffusionModel, "predict", small)
    assert_same(dori(pipe, images, rows=4, **SMALL), expected)
    assert seen == [4, 2, 4, 2] + [2, 2, 2] * 2


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(monkeypatch):
    pipe, images = tiny_pipeline("sd1"), pictures(2)
    settings = {"steps": 4, "batch_size": 2}
    expected = [
        by_hand(pipe, image, prompt, lost=lost, **settings)[0][0][0]
        for image, prompt, lost in ((images[0], "a cat", ()), (images[1], "a dog", (1,)))
    ]
    predict, calls = DiffusionModel.predict, []

    def poisoned(self, latents, t, embeds):
        calls.append(t)
        output = predict(self, latents, t, embeds)
        if len(calls) == 2:  # rows are picture 0, 0, 1, 1
            output = output + torch.tensor([0, 0, float("inf"), 0]).view(4, 1, 1, 1)
        return output

    monkeypatch.setattr(DiffusionModel, "predict", poisoned)
    found = dori(pipe, images, ["a cat", "a dog"], **settings)
    assert found.skipped.tolist() == [0, 1]
    assert found.losses.isfinite().tolist() == [[True] * 4, [True, False, True, True]]
    assert_close(found.prompt_embeds.embeds, expected)


def test_a_model_without_finite_gradients_is_no_success_for_the_defence():
    pipe = tiny_pipeline("sd1")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(
        ValueError, match=r"^pipe: for 2 of 2 pictures no gradient was finite in torch.float32"
    ):
        dori(pipe, pictures(2), **SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_keep_a_float32_state(dtype):
    pipe = tiny_pipeline("sd1").to(dtype)
    found = dori(pipe, pictures(1), "a cat", **SMALL)
    assert found.prompt_embeds.embeds.dtype == found.losses.dtype == torch.float32
    assert found.skipped.tolist() == [0]
    full = dori(tiny_pipeline("sd1"), pictures(1), "a cat", **SMALL)
    torch.testing.assert_close(found.losses, full.losses, rtol=0.05, atol=0)


def test_the_first_step_moves_every_coordinate_by_lr():
    pipe = tiny_pipeline("sd1")
    start = models.load(pipe).encode_prompt("a cat").embeds.detach()
    found = dori(pipe, pictures(1), "a cat", steps=1, lr=0.05)
    moved = (found.prompt_embeds.embeds - start).abs()
    assert (moved <= 0.05 * (1 + 1e-4)).all() and moved.median() == pytest.approx(0.05, rel=1e-3)


def test_leaves_the_pipeline_as_it_was_after_an_error_too(monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    before = [(p.requires_grad, p.clone()) for p in pipe.unet.parameters()]

    def check():
        assert pipe.unet.training and not pipe.vae.training
        for parameter, (flag, value) in zip(pipe.unet.parameters(), before, strict=True):
            assert parameter.requires_grad == flag and parameter.grad is None
            assert torch.equal(parameter, value)

    dori(pipe, pictures(1), **SMALL)
    check()
    monkeypatch.setattr(DiffusionModel, "predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dori(pipe, pictures(1), **SMALL)
    check()


def test_it_can_be_called_where_gradients_are_off():
    pipe, images = tiny_pipeline("sd1"), pictures(1)
    with torch.no_grad():
        assert_same(dori(pipe, images, **SMALL), dori(pipe, images, **SMALL))


def test_results_are_plain_data():
    found = dori(tiny_pipeline("sd1"), pictures(2), ["a cat", "a dog"], **SMALL)
    data = json.loads(json.dumps(found.to_dict()))
    assert torch.equal(torch.tensor(data["losses"]), found.losses) and found.losses.shape == (2, 3)
    assert data["prompts"] == ["a cat", "a dog"] and data["skipped"] == [0, 0]
    assert (data["lr"], data["batch_size"], data["seed"]) == (0.1, 2, 0)


def test_a_few_steps_from_noise_lower_the_loss_of_memorized_pictures():
    """On noises that the attack has not seen."""
    pipe = testbed.load()
    model = models.load(pipe)
    images = torch.from_numpy(np.stack([world.memorized(i).picture for i in (0, 1)]))
    noise = torch.randn(8, *model.latent_shape(), generator=torch.Generator().manual_seed(99))
    t = torch.arange(60, 1000, 120)

    @torch.no_grad()
    def loss(embeds):
        x0 = model.encode_image(images)
        found = []
        for i in range(2):
            x = x0[i].expand_as(noise)
            output = model.predict(model.add_noise(x, noise, t), t, embeds[i])
            found.append((output - model.schedule.target(x, noise, t)).square().mean())
        return torch.stack(found)

    few, more = (dori(pipe, images, steps=steps).prompt_embeds for steps in (1, 8))
    assert (loss(more) < 0.5 * loss(few)).all()


BAD = {
    "no pictures": ({"images": pictures(0)}, ValueError, "images: got none"),
    "a list of pictures": ({"images": [pictures(1)[0]]}, TypeError, "images: got list"),
    "a single picture": ({"images": pictures(1)[0]}, ValueError, "images: got shape"),
    "whole numbers": (
        {"images": torch.ones(1, 3, 32, 32, dtype=torch.uint8)},
        TypeError,
        "images: got torch",
    ),
    "values up to 255": ({"images": pictures(1) * 255}, ValueError, "images: got .*, expected values in"),
    "a picture of NaN": ({"images": pictures(1) * float("nan")}, ValueError, "images: got NaN"),
    "an odd size": ({"images": pictures(1, size=31)}, ValueError, "height: got 31"),
    "too many prompts": ({"prompts": ["a", "b"]}, ValueError, "prompts: got 2, expected 1, one for each"),
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "not a string": ({"prompts": [3]}, TypeError, "prompts: got a int"),
    "no steps": ({"steps": 0}, ValueError, "steps: got 0, expected at least 1"),
    "half a step": ({"steps": 0.5}, TypeError, "float"),
    "no noises": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    "no rows": ({"rows": 0}, ValueError, "rows: got 0"),
    "standing still": ({"lr": 0.0}, ValueError, r"lr: got 0.0, expected a positive number"),
    "a rate of NaN": ({"lr": float("nan")}, ValueError, "lr: got nan"),
    "a negative seed": ({"seed": -1}, ValueError, "seed: got -1"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    arguments = {"images": pictures(1)} | change
    with pytest.raises(error, match=message) as caught:
        dori(tiny_pipeline("sd1"), arguments.pop("images"), arguments.pop("prompts", None), **arguments)
    assert "\n" not in str(caught.value)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="FluxPipeline is not supported"):
        dori(tiny_pipeline("flux"), pictures(1))
