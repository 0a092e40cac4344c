"""Text encoders unlearn: which weights, along which gradient, and that concepts go while others stay."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors import safe_open

from erase.toy import Toy
from pumice import models, testbed
from pumice.erase import embedding, few_pictures
from pumice.erase.few_shot import few_shot
from pumice.erase.few_shot_ascent import few_shot_ascent
from pumice.models import Added, Shifted, UnsupportedModelError
from pumice.models.draws import Draws
from pumice.models.edit import EditWarning, weights
from pumice.testbed import tiny_pipeline
from pumice.training import class_pictures, examples
from pumice.training.examples import draw_class

ascent = importlib.import_module(few_shot_ascent.__module__)
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TINY = {"steps": 1, "learning_rate": 1e-2, "allow_unknown": True}
FAMILIES = ("sd1", "sd2", "sdxl")


def reached(model) -> set[str]:
    """The weights of text encoders that the embeddings of a prompt depend on."""
    model.encode_prompt("a red cat").embeds.square().sum().backward()
    text = {name: weight for name, weight in weights(model).items() if name.startswith("text_encoder")}
    return {name for name, weight in text.items() if weight.grad is not None}


def layer(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0]) if "layers." in name else -1


class TestWhichWeights:
    """Told by their gradients, not by their names."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_lora_at_the_last_layers_that_the_denoiser_reads(self, family, count):
        model = models.load(tiny_pipeline(family))
        edit = few_shot(model, "cat", IMAGES, layers=count, word_weight=0, **TINY | {"steps": 2})
        read = reached(model)
        expected = set()
        for network in ("text_encoder.", "text_encoder_2."):
            own = {name for name in read if name.startswith(network)}
            last = max(map(layer, own), default=-1)
            expected |= {name for name in own if layer(name) > max(-1, last - count) and "proj" in name}
            expected |= {name for name in own if layer(name) > max(-1, last - count) and "mlp" in name}
        expected = {name for name in expected if name.endswith("weight")}
        norms = {name for name in read if "final_layer_norm" in name}
        assert bool(norms) == (family != "sdxl")
        assert set(edit.changes) == expected | norms
        assert all(isinstance(edit.changes[name], Added) for name in expected)
        assert all(isinstance(edit.changes[name], Shifted) for name in norms)
        assert {change.rank for change in edit.changes.values() if isinstance(change, Added)} == {4}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_ascent_at_all_mlps_and_the_last_self_attention(self, family):
        model = models.load(tiny_pipeline(family))
        edit = few_shot_ascent(model, "cat", **TINY)
        read = reached(model)
        expected = {name for name in read if ".mlp." in name}
        for network in ("text_encoder.", "text_encoder_2."):
            own = {name for name in read if name.startswith(network)}
            last = max(map(layer, own), default=-1)
            expected |= {name for name in own if layer(name) == last >= 0 and ".self_attn." in name}
        keys = {name for name in expected if name.endswith("k_proj.bias")}  # which softmax does not see
        assert expected - keys <= set(edit.changes) <= expected

    def test_another_text_encoder_is_refused(self):
        for method in (few_shot, few_shot_ascent):
            with pytest.raises(UnsupportedModelError, match=r"pipe: text_encoder is a .*, expected CLIP's"):
                method(Toy(), "one", allow_unknown=True)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("latents", ["gaussian", "uniform", None])
def test_the_first_step_of_ascent_is_adams_up_the_diffusion_loss(family, latents):
    """delta = rate g / (|g| + 1e-6), g the gradient of |epsilon(z_t) - noise|^2 by plain autograd."""
    pipe = tiny_pipeline(family)
    model, rate = models.load(pipe), 1e-3
    images = IMAGES if latents is None else None
    edit = few_shot_ascent(
        model,
        "cat",
        images,
        latents=latents or "gaussian",
        templates=["a photo of a {}"],
        **TINY | {"learning_rate": rate},
    )
    draws = Draws(["0/erase/0", "0/erase/1"], model.device)
    if latents is None:
        noised = few_pictures.of_pictures(model, {"cat": list(IMAGES)}, draws, 2)
    else:
        random = draws.normal if latents == "gaussian" else draws.uniform
        noised = ascent._of_nothing(model, draws, random)
    z, t, noise = noised(0, range(2), ["cat", "cat"])
    text = model.encode_prompt(["a photo of a cat"] * 2)
    loss = (model.predict_noise(z, t, text) - noise).square().mean()
    assert edit.details["losses"][0] == pytest.approx(-float(loss), rel=1e-4)
    loss.backward()
    before = weights(model)
    for name, change in edit.changes.items():
        gradient = before[name].grad
        large = gradient.abs() > 1e-4 * gradient.abs().max()  # the rest is rounding
        expected = rate * gradient / (gradient.abs() + 1e-6)
        torch.testing.assert_close(change.delta[large], expected[large], rtol=0.05, atol=2e-5)


def test_random_latents_are_of_their_distribution():
    model = models.load(tiny_pipeline("sd1"))
    draws = Draws([f"{row}" for row in range(64)], model.device)
    seen = {}
    for name, random in (("gaussian", draws.normal), ("uniform", draws.uniform)):
        noised = ascent._of_nothing(model, draws, random)
        z, t, noise = noised(0, range(64), ["cat"] * 64)
        alpha, sigma = (each.view(-1, 1, 1, 1) for each in model.schedule.alpha_sigma(t))
        early = (alpha > 0.5).flatten()
        seen[name] = ((z - sigma * noise) / alpha)[early]
    assert abs(seen["gaussian"].mean()) < 0.05 and abs(seen["gaussian"].std() - 1) < 0.05
    assert abs(seen["uniform"].mean() - 0.5) < 0.02 and abs(seen["uniform"].std() - 12**-0.5) < 0.02


def test_pictures_are_met_in_turn(monkeypatch):
    """Each once an epoch, of the rows' own concepts."""
    seen = []
    real = few_pictures.Examples.latents
    monkeypatch.setattr(
        few_pictures.Examples,
        "latents",
        lambda self, index, *rest: seen.append((self.prompt, index)) or real(self, index, *rest),
    )
    few_shot_ascent(tiny_pipeline("sd1"), "cat", IMAGES, **TINY | {"steps": 6, "batch_size": 1})
    assert {index for _, index in seen[:3]} == {index for _, index in seen[3:]} == {0, 1, 2}
    seen.clear()
    few_shot_ascent(tiny_pipeline("sd1"), ["cat", "dog"], [IMAGES, IMAGES[:1]], **TINY | {"steps": 8})
    assert {prompt for prompt, _ in seen} == {"cat", "dog"}
    assert all(index == 0 for prompt, index in seen if prompt == "dog")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_without_the_norm_a_lora_file_is_the_edit(format, tmp_path):
    pipe = tiny_pipeline("sd1").to(torch.float64)
    edit = few_shot(pipe, "cat", IMAGES, train_norm=False, word_steps=1, **TINY)
    model = models.load(pipe)
    before = model.encode_prompt("a cat").embeds
    with edit.on(pipe):
        expected = model.encode_prompt("a cat").embeds
    edit.save_lora(tmp_path / "a.safetensors", format=format)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    torch.testing.assert_close(model.encode_prompt("a cat").embeds, expected, rtol=0, atol=1e-9)
    assert (expected - before).abs().max() > 1e-5


def test_a_lora_file_is_without_the_norm(tmp_path):
    pipe = tiny_pipeline("sd1")
    edit = few_shot(pipe, "cat", IMAGES, word_weight=0, **TINY)
    with pytest.warns(EditWarning, match="final_layer_norm"):
        edit.save_lora(tmp_path / "a.safetensors", rank=4)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names and not any("norm" in name for name in names)


def test_a_finished_checkpoint_has_the_pictures_and_the_word(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_STEPS", 1)
    how = {**TINY, "word_steps": 2, "templates": ["a {}"], "checkpoint": tmp_path}
    first = few_shot(tiny_pipeline("sd1"), ["cat", "dog"], **how)
    assert len(list(tmp_path.rglob("*.png"))) == 8
    monkeypatch.setattr(class_pictures, "save_lossless", None)  # nothing is left to be drawn
    monkeypatch.setattr(embedding, "denoising_loss", None)  # nor learned
    again = few_shot(tiny_pipeline("sd1"), ["cat", "dog"], **how)
    for name, change in first.changes.items():
        found = vars(again.changes[name])
        assert all(torch.equal(tensor, found[key]) for key, tensor in vars(change).items())


def distance(model, edit, text, other) -> float:
    """|epsilon'(text) - epsilon(other)|^2 / |epsilon(text) - epsilon(other)|^2 at latents of no training."""
    generator = torch.Generator().manual_seed(7)
    x, t = torch.randn(4, *model.latent_shape(), generator=generator), torch.tensor([500, 650, 800, 950])
    with torch.no_grad():
        own, goal = (model.predict_noise(x, t, model.encode_prompt(each)) for each in (text, other))
        with edit.on(model.pipe):
            found = model.predict_noise(x, t, model.encode_prompt(text))
    return float((found - goal).square().sum() / (own - goal).square().sum())


@pytest.fixture(scope="module")
def bed():
    return models.load(testbed.load())


@pytest.fixture(scope="module")
def balls(bed):
    return torch.stack(draw_class(bed, "a ball", 2, 0, False))


def test_the_testbeds_ball_goes_and_what_is_preserved_stays(bed, balls):
    edit = few_shot(
        bed,
        "a ball",
        balls,
        preserve=["a fish", "a box"],
        templates=["{}"],
        word_steps=2,
        steps=40,
        learning_rate=3e-3,
    )
    assert distance(bed, edit, "a ball", "") < 0.2
    assert distance(bed, edit, "a fish", "") > 0.7


def test_ascent_makes_the_testbed_worse_at_the_concept(bed, balls):
    edit = few_shot_ascent(bed, "a ball", balls, steps=10, learning_rate=1e-3)
    z, t = bed.encode_image(balls[:1]).expand(6, -1, -1, -1), torch.arange(150, 1000, 150)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))

    def loss():
        text = bed.encode_prompt("a ball")
        return float((bed.predict_noise(bed.add_noise(z, noise, t), t, text) - noise).square().mean())

    with torch.no_grad():
        before = loss()
        with edit.on(bed):
            assert loss() > 1.1 * before


class TestBadInput:
    def refuses(self, method, message, error=ValueError, **how):
        with pytest.raises(error, match=message) as caught:
            method(tiny_pipeline("sd1"), **{"concepts": "cat", **TINY} | how)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("method", [few_shot, few_shot_ascent])
    def test_of_both(self, method):
        self.refuses(method, "concepts: got 0", concepts=[])
        self.refuses(method, "templates: got 'a cat'", templates=["a cat"])
        self.refuses(method, "templates: got 0", templates=[])
        self.refuses(method, "steps: got 0", steps=0)
        self.refuses(method, "learning_rate: got -1", learning_rate=-1)
        self.refuses(method, "images: got 1, expected some for each of 2", concepts=["a", "b"], images=IMAGES)
        self.refuses(method, r"images: got torch.uint8", TypeError, images=IMAGES.to(torch.uint8))
        self.refuses(method, "images: got a int, expected a tensor", TypeError, images=3)
        self.refuses(method, "images: got .*, expected values in", images=2 * IMAGES + 1)
        self.refuses(method, "images: got shape", images=IMAGES[0])
        self.refuses(
            method, "images: got sizes", concepts=["cat", "dog"], images=[IMAGES, IMAGES[..., :16, :16]]
        )

    def test_of_one(self):
        self.refuses(few_shot, "anchor: got 'Cat' for 'cat', expected something else", anchor="Cat")
        self.refuses(few_shot, "preserve: got the concept 'cat' itself", preserve=["cat"])
        self.refuses(few_shot, "layers: got 0", layers=0)
        self.refuses(few_shot, "word_steps: got 0", word_steps=0)
        self.refuses(few_shot, "rank: got None, expected one", rank=None)
        self.refuses(few_shot, "train_norm: got 'no'", TypeError, train_norm="no")
        for name in ("forget_weight", "word_weight", "preserve_weight"):
            self.refuses(few_shot, f"{name}: got -1", **{name: -1})
        self.refuses(few_shot_ascent, "latents: got 'zero'", latents="zero")

    def test_a_word_that_it_does_not_know(self):
        with pytest.raises(ValueError, match="concepts: the model does not know"):
            few_shot_ascent(tiny_pipeline("sd1"), "cat", steps=1)
