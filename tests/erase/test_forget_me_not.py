"""Attention to the words for a concept: the loss from whole maps, and what training on it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pumice import models, testbed
from pumice.erase.attention_loss import Subjects, energies, root, words
from pumice.erase.forget_me_not import forget_me_not
from pumice.erase.trainer import Trainer
from pumice.models import watch_attention
from pumice.testbed import tiny_pipeline, world

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def pipe():
    return testbed.load()


@pytest.fixture(scope="module")
def tiny():
    return {family: models.load(tiny_pipeline(family)) for family in FAMILIES}


def pictures(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def drawn(kind: str, numbers: range, colour: str = "red") -> torch.Tensor:
    """Pictures of an object at places and in poses that its number decides, whatever its colour."""
    places = list(world.PLACES)
    scenes = [
        world.draw(world.Scene(kind, colour, places[number % len(places)]), np.random.default_rng(number))
        for number in numbers
    ]
    return torch.from_numpy(np.stack(scenes))


def noised(model, count: int = 2):
    g = torch.Generator().manual_seed(3)
    return torch.randn(count, *model.latent_shape(), generator=g), torch.tensor([800, 300])[:count]


def from_maps(model, z, t, embeds, columns, masks=None) -> torch.Tensor:
    """What `energies` is, by its definition."""
    found = []

    def observe(name, probabilities):
        for row in range(len(z)):
            chosen = probabilities[row][:, :, columns[row]]
            if masks is not None:
                height, width = z.shape[2:]
                while height * width > chosen.shape[1]:
                    height, width = -(-height // 2), -(-width // 2)
                rows = torch.arange(height) * masks.shape[1] // height
                across = torch.arange(width) * masks.shape[2] // width
                chosen = chosen[:, (masks[row][rows][:, across] > 0.5).flatten()]
            found.append(chosen.square().sum())

    with watch_attention(model.cross_attention.values(), observe):
        model.predict(z, t, embeds)
    return torch.stack(found).view(-1, len(z)).T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_energies_and_their_gradient_are_those_of_the_maps(tiny, family, masked):
    model = tiny[family]
    z, t = noised(model)
    embeds = model.encode_prompt(["a cat", "a photo of a red house"])
    columns = torch.stack(
        [words(model, "a {}", "cat", False), words(model, "a photo of {}", "a red house", True)]
    )
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :20], masks[1, :24] = 1, 0.7
    given = (model, z, t, embeds, columns, *([masks] if masked else []))
    weights = [layer.to_k.weight for layer in model.cross_attention.values()]
    weights += [layer.module.to_q.weight for layer in model.cross_attention.values()]
    kept = []
    for f in (energies, from_maps):
        value = f(*given)
        gradients = torch.autograd.grad(root(value).sum(), weights)
        kept.append((value, *gradients))
    for found, expected in zip(*kept, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_one_norm_of_all_layers_and_a_norm_of_each(tiny):
    model = tiny["sd1"]
    z, t = noised(model, 1)
    columns = words(model, "a photo of {}", "cat", False)[None]
    embeds = model.encode_prompt("a photo of cat")
    maps = []
    with watch_attention(
        model.cross_attention.values(), lambda name, p: maps.append(p[..., columns[0]].flatten())
    ):
        model.predict(z, t, embeds)
    found = energies(model, z, t, embeds, columns)
    torch.testing.assert_close(root(found.sum(1))[0], torch.cat(maps).norm())
    torch.testing.assert_close(root(found).sum(), sum(each.norm() for each in maps))


def test_hooks_are_gone_and_nothing_changes_the_output(tiny):
    model = tiny["sd1"]
    z, t = noised(model)
    embeds = model.encode_prompt(["a cat", "a dog"])
    columns = torch.ones(2, embeds.embeds.shape[1], dtype=torch.bool)
    before = model.predict(z, t, embeds)
    seen = []
    handle = model.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        energies(model, z, t, embeds, columns)
    finally:
        handle.remove()
    assert torch.equal(seen[0], before)
    with pytest.raises(ValueError, match="columns"):
        energies(model, z, t, embeds, columns[:, :-1])
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_the_root_has_no_gradient_at_zero():
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(root(x).sum(), x)
    assert gradient.tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    ("prompt", "concept", "with_eos", "expected"),
    [
        ("a photo of {}", "a ball", False, ["a", "ball"]),
        ("{} at the beach", "a red ball", False, ["a", "red", "ball"]),
        ("a {} at the beach", "ball", True, ["ball", "<|endoftext|>"]),
        ("in the style of {}", "lindqvist", False, ["lindqvist"]),
    ],
)
def test_where_words_stand(pipe, prompt, concept, with_eos, expected):
    model = models.load(pipe)
    (tokens,) = model.tokenize(prompt.replace("{}", concept))
    found = words(model, prompt, concept, with_eos)
    chosen = [tokens.ids[place] for place in found.nonzero().flatten().tolist()]
    assert (
        pipe.tokenizer.decode(chosen).split()
        == pipe.tokenizer.decode(pipe.tokenizer(" ".join(expected)).input_ids[1:-1]).split()
    )
    assert bool(found[tokens.eos]) == with_eos and found.sum() == len(chosen)


def test_pictures_stop_looking_at_the_word(pipe):
    """On pictures and noise that training has not seen; other words are looked at as before, nearly."""
    edit = forget_me_not(
        pipe, "ball", drawn("ball", range(6)), prompt="a {}", steps=24, learning_rate=5e-5, allow_unknown=True
    )
    losses = edit.details["losses"]
    assert sum(losses[-6:]) < 0.75 * sum(losses[:6])
    model = models.load(pipe)
    change = []
    for kind in ("ball", "tent"):
        with torch.no_grad():
            z = model.encode_image(drawn(kind, range(10, 14)))
            t = torch.full((4,), 500)
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
            given = model.add_noise(z, noise, t), t, model.encode_prompt([f"a {kind}"] * 4)
            columns = words(model, "a {}", kind, False).expand(4, -1)
            before = root(energies(model, *given, columns).sum(1)).mean()
            with edit.on(pipe):
                after = root(energies(model, *given, columns).sum(1)).mean()
        change.append(float(after / before))
    assert change[0] < 0.75, change
    assert change[0] < change[1], change


def test_each_row_is_its_concept_picture_and_time(tiny):
    """The loss of a step by hand, of two concepts with pictures of different sizes, in any passes."""
    model = tiny["sd1"]
    concepts, images = ("cat", "a red house"), [pictures(2), pictures(1, 64)]
    subjects = Subjects(model, concepts, images, None, prompt="a photo of {}", with_eos=False, num_images=1)
    trainer = Trainer(
        model, concepts, "xattn", method="test", settings=subjects.settings, steps=1, learning_rate=1e-3,
        batch_size=6, allow_unknown=True,
    )  # fmt: skip
    rows, t = range(6), torch.tensor([10, 200, 400, 600, 800, 999])
    of = trainer.of_step(4)
    assert set(of) == set(concepts)
    with torch.no_grad():
        found = subjects.energies(trainer, 4, rows, t)
        alone = torch.cat([subjects.energies(trainer, 4, [row], t[[row]]) for row in rows])
    # groups of one size come one after the other
    order = sorted(rows, key=lambda row: of[row] != of[0])
    torch.testing.assert_close(found, alone[order], rtol=1e-4, atol=1e-6)
    draws = trainer.draws
    for row in (0, order[-1]):
        index = int(draws.uniform([row], "picture", 4) * len(images[concepts.index(of[row])]))
        with torch.no_grad():
            noise = draws.normal(
                [row], "posterior", 4, model.latent_shape(*images[concepts.index(of[row])].shape[2:])
            )
            z = model.encode_image(images[concepts.index(of[row])][index][None], noise=noise)
            z = model.add_noise(z, draws.normal([row], "noise", 4, z.shape[1:]), t[[row]])
            expected = from_maps(
                model, z, t[[row]], model.encode_prompt(f"a photo of {of[row]}"),
                words(model, "a photo of {}", of[row], False)[None],
            )  # fmt: skip
        torch.testing.assert_close(alone[[row]], expected, rtol=1e-4, atol=1e-6)


def test_pictures_that_the_model_draws(tiny, monkeypatch):
    from pumice.erase import attention_loss

    asked = []

    def draw(model, wanted, seed, folder, progress):
        asked.extend((prompt, len(numbers), seed) for prompt, numbers in wanted.items())
        return {prompt: list(pictures(len(numbers))) for prompt, numbers in wanted.items()}

    monkeypatch.setattr(attention_loss, "drawn_pictures", draw)
    how = {"steps": 2, "learning_rate": 1e-3, "allow_unknown": True, "seed": 7}
    drawn = forget_me_not(tiny["sd1"], "cat", num_images=2, **how)
    assert asked == [("a photo of cat", 2, 7)]
    given = forget_me_not(tiny["sd1"], "cat", pictures(2), **how)
    for name, change in drawn.changes.items():
        assert torch.equal(change.delta, given.changes[name].delta)
    assert drawn.settings["images"] == 2 and len(given.settings["images"][0]) == 64


def test_what_trains(tiny):
    how = {"steps": 1, "learning_rate": 1e-3, "allow_unknown": True}
    whole = forget_me_not(tiny["sd1"], "cat", pictures(1), **how)
    cross = forget_me_not(tiny["sd1"], "cat", pictures(1), parameters="xattn", **how)
    assert all(".attn2." in name for name in cross.changes) and "conv_in.weight" in whole.changes
    assert whole.settings["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parameters": "text"}, ValueError, "^parameters: got 'text', expected one of"),
        ({"prompt": "a photo"}, ValueError, "^prompt: got 'a photo', expected templates with one {}"),
        ({"prompt": "a photo of {} " + "house " * 80}, ValueError, "^prompt: .* has no place for the tokens"),
        ({"with_eos": 1}, TypeError, "^with_eos: got 1, expected a bool"),
        ({"num_images": 0}, ValueError, "^num_images: got 0"),
        ({"images": pictures(2) + 1}, ValueError, "^images: got .* expected values in"),
        ({"images": pictures(2)[0]}, ValueError, "^images: got shape"),
        ({"images": ["no.png"]}, ValueError, r"^images\[0\]: 'no.png' cannot be read"),
        ({"images": [pictures(1)] * 2}, ValueError, "^images: got 2, expected some for each of 1"),
        ({"images": pictures(1, 31)}, ValueError, "^height: got 31"),
        ({"weight_decay": -1}, ValueError, "^weight_decay: got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(tiny, change, error, message):
    given = {"images": pictures(1), "steps": 1, "learning_rate": 1e-3, "allow_unknown": True} | change
    with pytest.raises(error, match=message):
        forget_me_not(tiny["sd1"], "cat", **given)
