"""TRCE's first stage: weighted tokens against the normal equations of each layer, and what its EOS does."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from pumice import models, testbed
from pumice.erase.trce import TEMPLATES, TOKEN_WEIGHTS, trce
from pumice.models import Edit, UnsupportedModelError, fingerprint
from pumice.testbed import tiny_pipeline, world

CONCEPTS, SAFE = ("a red cat", "dog"), ("house", "a big ship")
FEW = ("a photo of {} in the city", "{} in the house", "two people look at {}")
KEPT = ("a photo of a house", "a red tree in the snow")
ALL = {"bos": 0.5, "keyword": 3.0, "first_eos": 1.0, "last_eos": 0.25}

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.arguments.ErasureWarning")


def projections(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{layer.name}.to_{letter}.weight": getattr(layer, f"to_{letter}").weight.detach().double()
        for layer in models.load(pipe).cross_attention.values()
        for letter in "kv"
    }


def embedded(pipe, text: str) -> torch.Tensor:
    return models.load(pipe).encode_prompt(text).embeds[0].detach().double()


def rows(pipe, template: str, text: str) -> dict[str, torch.Tensor]:
    """The four tokens, found by the tokenizer's ids."""
    whole = embedded(pipe, template.replace("{}", text))
    length = len(pipe.tokenizer(template.replace("{}", text)).input_ids)
    keyword = len(pipe.tokenizer(template.split("{}")[0] + text).input_ids) - 2
    return {"bos": whole[0], "keyword": whole[keyword], "first_eos": whole[length - 1], "last_eos": whole[-1]}


def maps_of(monkeypatch, call):
    """The edit, and its maps while they are in float64."""
    module = importlib.import_module("pumice.erase.trce")  # the function may hide it
    kept, real = {}, module.edit_of
    monkeypatch.setattr(
        module, "edit_of", lambda of, maps, **about: kept.update(maps) or real(of, maps, **about)
    )
    return call(), kept


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_the_papers_defaults():
    assert len(set(TEMPLATES)) == 15 and all(template.count("{}") == 1 for template in TEMPLATES)
    assert TOKEN_WEIGHTS == {"first_eos": 1}


@pytest.mark.parametrize("weights", [TOKEN_WEIGHTS, ALL])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_is_the_solution_of_each_layers_own_equation(family, weights, monkeypatch):
    pipe = tiny_pipeline(family).to(torch.float64)  # texts are encoded in other batches here
    edit, maps = maps_of(
        monkeypatch,
        lambda: trce(
            pipe,
            CONCEPTS,
            SAFE,
            templates=FEW,
            token_weights=weights,
            preserve=KEPT,
            preserve_scale=0.3,
            lamb=0.2,
        ),
    )
    kept = torch.cat([embedded(pipe, text) for text in KEPT])
    left = 0.3 * kept.T @ kept + 0.2 * torch.eye(kept.shape[1], dtype=torch.float64)
    moved = left.clone()
    for concept, safe in zip(CONCEPTS, SAFE, strict=True):
        for template in FEW:
            c, g = rows(pipe, template, concept), rows(pipe, template, safe)
            for token, weight in weights.items():
                left += weight * torch.outer(c[token], c[token])
                moved += weight * torch.outer(g[token], c[token])
    assert maps.keys() == projections(pipe).keys() == edit.changes.keys()
    for name, weight in projections(pipe).items():
        expected = torch.linalg.solve(left, (weight @ moved).T).T
        assert off(weight @ maps[name].dense() - weight, expected - weight) < 1e-10
    with edit.on(pipe):
        assert off(projections(pipe)[name], expected) < 1e-6


def test_a_weight_of_two_is_the_same_row_twice(monkeypatch):
    pipe = tiny_pipeline("sd1")
    _, twice = maps_of(monkeypatch, lambda: trce(pipe, "cat", "dog", token_weights={"keyword": 2}, lamb=1))
    _, once = maps_of(monkeypatch, lambda: trce(pipe, "cat", "dog", token_weights={"keyword": 1}, lamb=0.5))
    torch.testing.assert_close(
        next(iter(twice.values())).dense(), next(iter(once.values())).dense(), rtol=0, atol=1e-10
    )


def test_tokens_of_weight_zero_are_left_out():
    pipe = tiny_pipeline("sd1")
    everything = dict.fromkeys(ALL, 0.0) | TOKEN_WEIGHTS
    a, b = trce(pipe, "cat", "dog", lamb=1), trce(pipe, "cat", "dog", lamb=1, token_weights=everything)
    change, other = next(iter(a.changes.values())), next(iter(b.changes.values()))
    assert torch.equal(change.up, other.up) and torch.equal(change.down, other.down)
    assert a.settings == b.settings and a.report()["rank"] == 15
    assert (
        trce(tiny_pipeline("sdxl"), "cat", "dog", lamb=1, templates=FEW, token_weights=ALL).report()["rank"]
        == 12
    )


def test_eos_becomes_that_of_the_safe_prompt_and_the_rest_moves_less():
    pipe = tiny_pipeline("sdxl")
    edit = trce(pipe, "cat", "dog", templates=FEW, lamb=1e-9)
    change = next(iter(edit.changes.values()))
    for template in FEW:
        c, g = rows(pipe, template, "cat"), rows(pipe, template, "dog")
        mapped = c["first_eos"] + change.up.double() @ (change.down.double() @ c["first_eos"])
        assert off(mapped, g["first_eos"]) < 1e-3 < off(c["first_eos"], g["first_eos"])
    assert edit.report()["residual"] < 1e-3


def test_one_safe_text_for_all():
    pipe = tiny_pipeline("sd1")
    edit = trce(pipe, CONCEPTS, "house", lamb=1)
    assert edit.settings["safe"] == ["house", "house"] and edit.targets == CONCEPTS
    assert edit.to_dict() == trce(pipe, CONCEPTS, ["house", "house"], lamb=1).to_dict()


def test_the_model_stays_and_the_edit_is_what_it_says(tmp_path):
    pipe = tiny_pipeline("sd2")
    before = fingerprint(models.load(pipe))
    edit = trce(pipe, CONCEPTS, SAFE, token_weights=ALL, preserve=KEPT, lamb=0.5)
    assert fingerprint(models.load(pipe)) == before == edit.base
    assert edit.method == "trce" and edit.settings["token_weights"] == ALL
    assert len({id(change) for change in edit.changes.values()}) == 1
    edit.save(tmp_path / "a.safetensors")
    assert Edit.load(tmp_path / "a.safetensors").to_dict() == edit.to_dict()


class TestBadInput:
    def refuses(self, message: str, call, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"concepts": []}, "concepts: got 0"),
            ({"concepts": ["cat", " cat"]}, "concepts: got 'cat' and ' cat', expected each once"),
            ({"concepts": "cat " * 90}, "concepts: .* does not fit"),
            ({"safe": "Cat"}, "safe: got 'Cat' for 'cat'"),
            ({"safe": ["a", "b"]}, "safe: got 2"),
            ({"safe": "dog " * 90}, "safe: .* does not fit"),
            ({"templates": ()}, "templates: got 0, expected at least 1"),
            ({"templates": ["a photo of {0}"]}, "templates: got 'a photo of .0.'"),
            (
                {"token_weights": {"eos": 1}},
                "token_weights: got 'eos', expected bos, keyword, first_eos, last_eos",
            ),
            ({"token_weights": {"bos": -1}}, r"token_weights\['bos'\]: got -1"),
            ({"token_weights": {"bos": math.nan}}, r"token_weights\['bos'\]: got nan"),
            ({"token_weights": {}}, "token_weights: got {}, expected a positive one"),
            ({"token_weights": {"bos": 0}}, "token_weights: got {'bos': 0}, expected a positive one"),
            ({"preserve": "cat"}, "preserve: got the concept 'cat'"),
            (
                {"preserve": "a dog", "preserve_scale": 0},
                "preserve_scale: got 0.0, expected a positive number",
            ),
            ({"preserve_scale": -1}, "preserve_scale: got -1"),
            ({"lamb": math.inf}, "lamb: got inf"),
            ({"lamb": 0}, "lamb: got 0.0 with too few rows to preserve"),
        ],
    )
    def test_values(self, arguments, message):
        pipe = tiny_pipeline("sd1")
        self.refuses(message, lambda: trce(pipe, **{"concepts": "cat", "safe": "dog", "lamb": 1} | arguments))

    def test_types(self):
        pipe = tiny_pipeline("sd1")
        self.refuses("concepts: got a int", lambda: trce(pipe, [1], "dog"), TypeError)
        self.refuses("templates: got a str", lambda: trce(pipe, "cat", "dog", templates="{}"), TypeError)

    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_families_without_cross_attention(self, family):
        pipe = tiny_pipeline(family)
        self.refuses("is not supported", lambda: trce(pipe, "cat", "dog"), UnsupportedModelError)

    def test_weights_that_are_not_finite(self):
        pipe = tiny_pipeline("sd1")
        next(iter(models.load(pipe).cross_attention.values())).to_k.weight.data[1, 2] = math.nan
        self.refuses("to_k.weight is not finite", lambda: trce(pipe, "cat", "dog", lamb=1))


def test_a_ball_becomes_a_box_and_the_rest_stays():
    """One EOS in fifteen templates reaches captions that are none of them."""
    pipe = testbed.load()
    scenes = [
        world.Scene(object, *place)
        for object in ("ball", "box", "fish", "tent")
        for place in (("red", "beach"), ("blue", "snow"))
    ]
    with trce(pipe, "ball", "box", lamb=1).on(pipe):
        images = pipe(
            [world.full_caption(scene) for scene in scenes],
            num_inference_steps=12,
            guidance_scale=5,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(scenes))],
            output_type="pt",
        ).images
    seen = [scene.object for scene in testbed.load_reader().read(images)]
    assert seen == ["box"] * 4 + ["fish"] * 2 + ["tent"] * 2
