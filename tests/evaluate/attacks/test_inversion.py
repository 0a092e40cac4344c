"""A word is learned and nothing else, the same one whatever stands beside it; it brings concepts back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pumice import erase, models, testbed
from pumice.evaluate import concept_inversion
from pumice.models import Edit, UnsupportedModelError, Zeroed
from pumice.testbed import world

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")  # of tiny random models

FEW = {"steps": 3, "batch_size": 2, "seeds": 2, "num_inference_steps": 2, "label": "x"}


def nothing(images):
    return [["x"]] * len(images)


@pytest.fixture(scope="module")
def tiny():
    return testbed.tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def edit(tiny):
    return erase.uce(tiny, "ball", tokens="all", guide="box")


@pytest.fixture(scope="module")
def pictures(tiny):
    side = models.load(tiny).latent_shape()[1] * models.load(tiny).vae_scale_factor
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learned(tiny, edit, pictures):
    return concept_inversion(tiny, {"uce": edit}, pictures, classify=nothing, checkpoints=[0, 2], **FEW)


def test_only_the_word_learns_and_the_pipeline_is_left_as_it_was(tiny, edit, pictures):
    before = models.fingerprint(models.load(tiny))
    modules = [tiny.unet, tiny.text_encoder, tiny.vae]
    tiny.text_encoder.train()
    found = concept_inversion(tiny, {"uce": edit}, pictures, classify=nothing, **FEW)
    assert tiny.text_encoder.training
    tiny.text_encoder.eval()
    assert models.fingerprint(models.load(tiny)) == before
    for module in modules:
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
        assert not any(m._forward_pre_hooks for m in module.modules())
    assert not tiny.text_encoder.get_input_embeddings()._forward_hooks
    start = tiny.text_encoder.get_input_embeddings().weight.detach()
    ids = tiny.tokenizer("object", add_special_tokens=False).input_ids
    assert (found.vectors["uce"][0] - start[ids].mean(0)).abs().max() > 1e-3


def test_the_first_loss_is_that_of_the_template_with_the_initial_word(tiny, edit, pictures):
    """What the placeholder reads is the word's embedding, in its place and nowhere else."""
    template, word = "a photo of a {} at the beach", "ball"
    model = models.load(tiny)
    count = len(tiny.tokenizer(word, add_special_tokens=False).input_ids)
    found = concept_inversion(
        tiny,
        {"uce": edit},
        pictures,
        classify=nothing,
        template=template,
        initial=word,
        tokens=count,
        seed=5,
        **FEW,
    )
    generator = torch.Generator().manual_seed(5)
    x0 = model.encode_image(pictures)[torch.randint(3, (2,), generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(model.schedule.num_train_timesteps, (2,), generator=generator)
    embeds = model.encode_prompt(template.format(word))
    for name in ("none", "uce"):
        with models.hook_edits(tiny, [edit if name == "uce" else None]), torch.no_grad():
            output = model.predict(model.add_noise(x0, noise, t), t, embeds)
        expected = (output - model.schedule.target(x0, noise, t)).square().mean()
        torch.testing.assert_close(found.losses[name][0, 0], expected)
    assert found.losses["none"][0, 0] != found.losses["uce"][0, 0]


def test_the_first_step_follows_the_gradient(tiny, pictures):
    """AdamW's first step is lr sign(gradient); the gradient by finite differences."""
    model = models.load(tiny)
    layer = tiny.text_encoder.get_input_embeddings()
    (word,) = tiny.tokenizer("*", add_special_tokens=False).input_ids
    start = layer.weight.detach()[word].clone()
    found = concept_inversion(
        tiny, {}, pictures, classify=nothing, initial="*", learning_rate=0.1, **FEW | {"steps": 1}
    )
    step = found.vectors["none"][0][0, 0] - start * (1 - 0.1 * 0.01)
    generator = torch.Generator().manual_seed(0)
    x0 = model.encode_image(pictures)[torch.randint(3, (2,), generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(model.schedule.num_train_timesteps, (2,), generator=generator)

    def loss(vector):
        def put(module, args, output):
            return torch.where((args[0] == word)[..., None], vector, output)

        handle = layer.register_forward_hook(put)
        output = model.predict(model.add_noise(x0, noise, t), t, model.encode_prompt("a photo of a *"))
        handle.remove()
        return (output - model.schedule.target(x0, noise, t)).square().mean()

    leaf = start.clone().requires_grad_()
    with model.frozen():
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert (gradient.abs() > 1e-6).float().mean() > 0.5
    clear = gradient.abs() > 1e-6
    torch.testing.assert_close(step[clear], -0.1 * gradient.sign()[clear], rtol=0.02, atol=1e-4)


def test_the_budget_is_honoured_and_checkpoints_are_points_of_one_run(tiny, edit, pictures, learned):
    assert [(row["name"], row["steps"]) for row in learned.rows] == [
        (name, steps) for name in ("none", "uce") for steps in (0, 2, 3)
    ]
    assert all(found.shape == (1, 3) for found in learned.losses.values())
    shorter = concept_inversion(tiny, {"uce": edit}, pictures, classify=nothing, **FEW | {"steps": 2})
    for name in ("none", "uce"):
        assert torch.equal(shorter.losses[name], learned.losses[name][:, :2])


def test_the_same_seed_gives_the_same_word_and_another_another(tiny, edit, pictures, learned):
    again, other = (
        concept_inversion(tiny, {"uce": edit}, pictures, classify=nothing, seed=seed, **FEW)
        for seed in (0, 1)
    )
    assert torch.equal(again.vectors["uce"][0], learned.vectors["uce"][0])
    assert torch.equal(again.pictures["uce"], learned.pictures["uce"])
    assert not torch.equal(other.vectors["uce"][0], learned.vectors["uce"][0])


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_neither_neighbours_nor_batches_change_what_is_learned(tiny, edit, pictures, learned, rows):
    another = erase.uce(tiny, "dog", tokens="all")
    found = concept_inversion(
        tiny, {"other": another, "uce": edit}, pictures, classify=nothing, restarts=2, rows=rows, **FEW
    )
    assert found.vectors["uce"][0].shape[0] == 2 and found.pictures["uce"].shape[:2] == (2, 2)
    for name in ("none", "uce"):
        torch.testing.assert_close(found.losses[name][:1], learned.losses[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.vectors[name][0][:1], learned.vectors[name][0], rtol=0, atol=2e-4)
    next_seed = concept_inversion(tiny, {}, pictures, classify=nothing, seed=1, **FEW)
    torch.testing.assert_close(found.losses["none"][1:], next_seed.losses["none"], rtol=1e-4, atol=1e-5)


def test_an_edit_by_hooks_is_attacked_as_if_it_were_applied(tiny, edit, pictures, learned):
    model = models.load(tiny)
    name = next(iter(model.cross_attention)) + ".to_k.weight"
    shape = model.unet.get_parameter(name).shape
    nothing_zeroed = Zeroed.pack(torch.zeros(shape, dtype=torch.bool))
    alone = Edit.made(model, edit.changes | {name: nothing_zeroed}, method="test", targets=())
    expected = Edit.made(
        model, {k: v for k, v in edit.changes.items() if k != name}, method="test", targets=()
    )
    found = concept_inversion(tiny, {"weights": alone, "hooks": expected}, pictures, classify=nothing, **FEW)
    torch.testing.assert_close(found.losses["weights"], found.losses["hooks"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(found.losses["weights"], found.losses["none"])


def test_success_is_counted_by_hand(tiny, edit, pictures):
    """Pictures alternate between two labels, whatever they show."""
    calls = []

    def classify(images):
        calls.append(len(images))
        return [["X", "y"] if i % 4 == 0 else ["y", "X"] for i in range(len(images))]

    found = concept_inversion(tiny, edit, pictures, classify=classify, **FEW | {"seeds": 8})
    assert calls == [8, 8] and list(found.vectors) == ["none", "uce"]
    for row in found.rows:
        assert row["success"] == 25 and row["esr"] == 75
        assert row["success_low"] == pytest.approx(3.19, abs=0.01)
        assert row["success_high"] == pytest.approx(65.09, abs=0.01)
    assert found.curve("uce") == [(3, 25.0)]
    again = concept_inversion(tiny, {}, pictures, classify=classify, k=2, **FEW)
    assert again.curve("none") == [(3, 100.0)]
    with pytest.raises(ValueError, match="name: got 'sce', expected one of 'none', 'uce'"):
        found.curve("sce")


def test_results_are_plain_data_and_a_table(learned):
    again = json.loads(json.dumps(learned.to_dict()))
    assert again["rows"] == [dict(row) for row in learned.rows] and again["settings"]["steps"] == 3
    assert learned.table() == [
        ("edit", "0 steps", "2 steps", "3 steps"),
        ("none", "100.0", "100.0", "100.0"),
        ("uce", "100.0", "100.0", "100.0"),
    ]


def test_pictures_of_every_kind_and_numbers_of_numpy_give_the_same(tiny, pictures, tmp_path):
    images = [Image.fromarray((each.permute(1, 2, 0) * 255).round().byte().numpy()) for each in pictures]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    exact = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
    numbers = {name: np.int64(value) for name, value in FEW.items() if name != "label"}
    numbers |= {
        "k": np.int64(1),
        "seed": np.int64(0),
        "learning_rate": np.float32(5e-3),
        "checkpoints": [np.int64(1)],
    }
    expected = concept_inversion(tiny, {}, exact, classify=nothing, **FEW)
    for given in (images, paths):
        found = concept_inversion(tiny, {}, given, classify=nothing, label="x", **numbers)
        torch.testing.assert_close(found.losses["none"], expected.losses["none"])
        assert json.loads(json.dumps(found.to_dict()))["settings"]["images"] == len(pictures)
    assert repr(found) == "Inversion(concept_inversion of 'x', none)"


def test_stable_diffusion_xl_learns_in_both_text_encoders():
    pipe = testbed.tiny_pipeline("sdxl")
    model = models.load(pipe)
    side = model.latent_shape()[1] * model.vae_scale_factor
    pictures = torch.rand(2, 3, side, side)
    edit = erase.uce(pipe, "ball")
    start = concept_inversion(
        pipe, edit, pictures, classify=nothing, **FEW | {"steps": 1, "learning_rate": 1e-12}
    )
    found = concept_inversion(pipe, edit, pictures, classify=nothing, tokens=2, **FEW)
    for one, other in zip(found.vectors["uce"], start.vectors["uce"], strict=True):
        assert one.shape[:2] == (1, 2) and ((one - other).abs() > 1e-3).float().mean() > 0.5
    assert {one.shape[2] for one in found.vectors["uce"]} == {
        encoder.config.hidden_size for encoder in model.text_encoders
    }


def test_half_precision_learns_too(pictures):
    pipe = testbed.tiny_pipeline("sd1").to(torch.bfloat16)
    found = concept_inversion(pipe, {}, pictures, classify=nothing, **FEW)
    (vector,) = found.vectors["none"]
    assert vector.dtype == torch.float32 and vector.isfinite().all()
    start = concept_inversion(pipe, {}, pictures, classify=nothing, learning_rate=1e-12, **FEW)
    assert (vector - start.vectors["none"][0]).abs().max() > 1e-3


def test_a_closed_form_edit_of_the_trained_model_gives_the_concept_back():
    pipe = testbed.load()
    edit = erase.uce(pipe, "ball", tokens="all", guide="box")  # alone, it draws no ball at all
    scenes = zip(["red", "blue", "yellow", "pink", "green", "purple"], world.PLACES, strict=True)
    shown = pipe(
        [world.full_caption(world.Scene("ball", *scene)) for scene in scenes],
        num_inference_steps=12,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(900 + i) for i in range(6)],
        output_type="pt",
    ).images
    found = concept_inversion(
        pipe,
        edit,
        shown,
        label="ball",
        classify=testbed.classifier("object"),
        steps=25,
        checkpoints=[0],
        initial="thing",
        seeds=6,
        num_inference_steps=12,
        guidance_scale=5.0,
    )
    (_, before), (_, after) = found.curve("uce")
    assert before <= 50 and after >= 80
    assert found.curve("none")[-1][1] >= 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edits": {"a": 1}}, TypeError, "edits: got a int under 'a'"),
        ({"images": torch.rand(3, 32, 32)}, ValueError, r"images: got shape \(3, 32, 32\)"),
        ({"images": torch.rand(1, 3, 32, 32) * 255}, ValueError, "images: got .*, expected values in"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "images: got torch.uint8"),
        ({"label": 1}, TypeError, "label: got a int, expected a string"),
        ({"template": "a photo"}, ValueError, "template: got 'a photo', expected one with one {}"),
        ({"template": "a photo of ({})"}, ValueError, "template: got .*, expected {} as a word of its own"),
        ({"template": "a very long photo " * 40 + "{}"}, ValueError, "template: .* does not fit"),
        ({"initial": " "}, ValueError, "initial: got ' ', expected a word"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"tokens": 0}, ValueError, "tokens: got 0"),
        ({"restarts": 0}, ValueError, "restarts: got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"rows": 0}, ValueError, "rows: got 0"),
        ({"checkpoints": [9]}, ValueError, r"checkpoints: got \[9\], expected 0 to steps = 3"),
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"steps": "a"}, TypeError, "steps: got a str"),
        ({"seed": "a"}, TypeError, "seed: got a str"),
        ({"seeds": "a"}, TypeError, "seeds: got a str"),
        ({"checkpoints": ["a"]}, TypeError, "checkpoints: got a str"),
        ({"checkpoints": 3}, TypeError, "checkpoints: got a int"),
        ({"learning_rate": "a"}, TypeError, "learning_rate: got a str"),
        ({"guidance_scale": "a"}, TypeError, "guidance_scale: got a str"),
        ({"images": [1]}, TypeError, r"images\[0\]"),
        ({"classify": lambda images: []}, ValueError, "classify: returned 0 lists"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(tiny, pictures, change, error, message):
    good = {"edits": {}, "images": pictures, "classify": nothing} | FEW | change
    with pytest.raises(error, match=message) as caught:
        concept_inversion(tiny, good.pop("edits"), good.pop("images"), **good)
    assert "\n" not in str(caught.value)


def test_families_without_a_denoiser_of_the_kind_are_refused(pictures):
    with pytest.raises(UnsupportedModelError):
        concept_inversion(testbed.tiny_pipeline("sd3"), {}, pictures, classify=nothing, **FEW)
