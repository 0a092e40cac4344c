"""MACE's closed forms: the shared map and the low-rank fusion against the normal equations of each layer."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch

from pumice import models, testbed
from pumice.erase import uce
from pumice.erase.arguments import ErasureWarning
from pumice.erase.mace import PROMPTS, STYLE_PROMPTS, mace_fuse, mace_refine
from pumice.io.lora import read_lora
from pumice.models import Added, Edit, UnsupportedModelError, fingerprint
from pumice.testbed import tiny_pipeline, world

mace = sys.modules["pumice.erase.mace"]  # whose name the function has

FAMILIES = ("sd1", "sd2", "sdxl")
FEW = ("a photo of {} in the city", "{} in the house", "two people look at {}")
KEPT = ("a photo of a house", "a red tree in the snow")
CELEBRITIES = ("a man in the city", "a woman")

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.arguments.ErasureWarning")


def projections(pipe) -> dict[str, torch.Tensor]:
    layers = models.load(pipe).cross_attention.values()
    return {
        f"{layer.name}.to_{letter}.weight": getattr(layer, f"to_{letter}").weight.detach().double()
        for layer in layers
        for letter in "kv"
    }


def embedded(pipe, text: str) -> torch.Tensor:
    return models.load(pipe).encode_prompt(text).embeds[0].detach().double()


def gram(pipe, texts) -> torch.Tensor:
    rows = torch.cat([embedded(pipe, text) for text in texts])
    return rows.T @ rows


def context(pipe, template: str, text: str, width: int) -> torch.Tensor:
    """Rows of all tokens but those of `text`, and no more padding than a text of `width` tokens has."""
    tokenizer = pipe.tokenizer
    start = len(tokenizer(template.split("{}")[0]).input_ids) - 1
    length = len(tokenizer(text).input_ids) - 2
    rows = embedded(pipe, template.replace("{}", text))
    at = [*range(start), *range(start + length, len(rows) - max(width - length, 0))]
    return rows[at]


def captured(monkeypatch, call):
    """What a call gives to the last function that still has it in float64."""
    kept, real = {}, mace.edit_of
    monkeypatch.setattr(
        mace, "edit_of", lambda of, found, **about: kept.update(found) or real(of, found, **about)
    )
    edit = call()
    monkeypatch.undo()
    return edit, kept


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def factors(
    pipe, rank: int, seed: int = 0, share: float = 1.0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random LoRA of the projections, of all or the first of them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in list(projections(pipe).items())[: math.ceil(share * len(projections(pipe)))]:
        o, d = weight.shape
        up = torch.randn(o, rank, generator=generator) / 10
        found[name.removesuffix(".weight")] = up, torch.randn(rank, d, generator=generator)
    return found


@pytest.mark.parametrize("templates", [PROMPTS, STYLE_PROMPTS])
def test_thirty_distinct_templates_with_one_place_for_the_concept(templates):
    assert len(set(templates)) == 30 and all(template.count("{}") == 1 for template in templates)


class TestRefine:
    @pytest.mark.parametrize("variant", ["paper", "code"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_the_solution_of_each_layers_own_equation(self, family, variant, monkeypatch):
        pipe = tiny_pipeline(family).to(torch.float64)  # texts are encoded in other batches here
        s, w, lamb = 0.3, 2.5, 5.0
        edit, maps = captured(
            monkeypatch,
            lambda: mace_refine(
                pipe, ["a red cat", "dog"], ["house", "a big ship"], prompts=FEW, lamb=lamb, preserve=KEPT,
                domain=CELEBRITIES, preserve_scale=s, domain_scale=w, variant=variant,
            ),
        )  # fmt: skip
        pairs = [(a, b, t) for a, b in (("a red cat", "house"), ("dog", "a big ship")) for t in FEW]
        widths = {text: len(pipe.tokenizer(text).input_ids) - 2 for pair in pairs for text in pair[:2]}
        c = torch.cat([context(pipe, t, a, widths[b]) for a, b, t in pairs])
        g = torch.cat([context(pipe, t, b, widths[a]) for a, b, t in pairs])
        s = s * s if variant == "code" else s
        kept = s * (gram(pipe, KEPT) + w * gram(pipe, CELEBRITIES))
        left = c.T @ c + kept + lamb * torch.eye(c.shape[1], dtype=torch.float64)
        weights = projections(pipe)
        assert maps.keys() == weights.keys() == edit.changes.keys()
        for name, weight in weights.items():
            right = weight @ (g.T @ c + kept + lamb * torch.eye(c.shape[1], dtype=torch.float64))
            expected = torch.linalg.solve(left, right.T).T
            assert off(weight @ maps[name].dense() - weight, expected - weight) < 1e-10
        with edit.on(pipe):
            assert off(projections(pipe)[name], expected) < 1e-6

    def test_pieces_that_both_share_are_context(self):
        texts = mace.Texts(models.load(tiny_pipeline("sd1")), padded=True)
        c, g = mace._context(texts, ["a red cat"], ["a red dog"], ["a photo of {} in the city"])
        cat = texts["a photo of a red cat in the city"]
        one = cat.tokens.words[5].positions
        assert cat.tokens.words[5].text == "cat" and cat.tokens.words[4].text == "red"
        assert len(c) == len(cat.embeds) - len(one)
        torch.testing.assert_close(c[: one.start], g[: one.start])
        assert (c[one.start :] - g[one.start :]).norm(dim=1).min() > 1e-3

    def test_a_concept_inside_its_mapping_concept(self):
        texts = mace.Texts(models.load(tiny_pipeline("sd1")), padded=True)
        c, g = mace._context(texts, ["cat"], ["cat cat"], ["a {}"])
        assert len(c) == len(g) == 77 - 1
        torch.testing.assert_close(c[:3], g[:3])

    def test_fewer_tokens_than_dimensions_become_what_they_should(self):
        """What stands before the concept stays: a causal encoder knows nothing of the concept there."""
        pipe = tiny_pipeline("sdxl")
        edit = mace_refine(pipe, "cat", "dog", prompts=["a photo of {}"], lamb=1e-7)
        change = next(iter(edit.changes.values()))
        rows, targets = embedded(pipe, "a photo of cat"), embedded(pipe, "a photo of dog")
        mapped = rows + rows @ change.down.double().T @ change.up.double().T
        assert off(mapped[:4], rows[:4]) < 1e-3 and off(mapped[5:], targets[5:]) < 1e-3
        assert off(rows[5:], targets[5:]) > 0.05

    def test_a_large_lambda_leaves_the_model(self):
        pipe = tiny_pipeline("sd1")
        edit = mace_refine(pipe, "cat", "dog", lamb=1e12)
        assert edit.report()["overall_change"] < 1e-6

    def test_one_map_and_the_rank_of_the_rows(self):
        pipe = tiny_pipeline("sdxl")
        edit = mace_refine(pipe, "cat", "dog", prompts=["{}"])
        assert len({id(change) for change in edit.changes.values()}) == 1
        assert edit.report()["rank"] == 76
        assert mace_refine(pipe, "cat", "dog").report()["rank"] == 80

    @pytest.mark.parametrize(
        ("preset", "count", "lamb", "s", "w"),
        [
            (None, 1, 100, 0, 0),
            ("object", 3, 100, 0, 0),
            ("nudity", 4, 0, 7e-7, 0),
            ("celebrity", 1, 0, 1e-4, 8e3),
            ("celebrity", 5, 0, 1e-4, 5e4),
            ("celebrity", 6, 0, 1e-4, 8e4),
            ("celebrity", 11, 0, 1e-4, 2e5),
            ("celebrity", 101, 0, 1e-4, 2e5),
            ("artist", 2, 0, 1e-4, 8e4),
        ],
    )
    def test_presets_are_the_papers(self, preset, count, lamb, s, w):
        settings = mace._Given(
            [str(i) for i in range(count)], None, preset, None, (), (), None, None
        ).settings
        assert [settings[key] for key in ("lamb", "preserve_scale", "domain_scale")] == [lamb, s, w]
        assert settings["prompts"] == list(STYLE_PROMPTS if preset == "artist" else PROMPTS)

    def test_arguments_override_the_preset(self):
        pipe = tiny_pipeline("sd1")
        edit = mace_refine(pipe, "cat", "dog", preset="celebrity", lamb=3, domain=KEPT, preserve_scale=0.5)
        assert [edit.settings[key] for key in ("lamb", "preserve_scale", "domain_scale")] == [3, 0.5, 8e3]

    def test_the_model_stays_and_the_edit_is_what_it_says(self, tmp_path):
        pipe = tiny_pipeline("sd2")
        before = fingerprint(models.load(pipe))
        edit = mace_refine(pipe, ["cat", "dog"], "house", prompts=FEW)
        assert fingerprint(models.load(pipe)) == before == edit.base
        assert edit.method == "mace_refine" and edit.targets == ("cat", "dog")
        assert edit.settings["mapping"] == ["house", "house"] and edit.report()["encoder_calls"] == 2
        edit.save(tmp_path / "a.safetensors")
        assert Edit.load(tmp_path / "a.safetensors").to_dict() == edit.to_dict()

    def test_many_preserved_texts_are_read_in_blocks(self):
        pipe = tiny_pipeline("sd1")
        texts = [f"a house and {i} trees" for i in range(70)]
        edit = mace_refine(pipe, "cat", "dog", prompts=FEW, lamb=1, preserve=texts, preserve_scale=0.01)
        assert edit.report()["encoder_calls"] == 1 + 2 + 1
        model, counted = models.load(pipe), mace.Texts(models.load(pipe), padded=True)
        found = mace.gram_of(model, counted, texts, "preserve", 0.01)
        assert found.rows == 70 * 77 and off(found.gram, 0.01 * gram(pipe, texts)) < 1e-10


class TestFuse:
    @pytest.mark.parametrize(("refined", "rank"), [(None, 1), (None, 3), ("low", 1), ("full", 3)])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_shortcut_is_the_explicit_formula(self, family, refined, rank, monkeypatch):
        pipe = tiny_pipeline(family).to(torch.float64)  # texts are encoded in other batches here
        s, w, lamb = 0.3, 2.5, 5.0
        loras = {"cat": factors(pipe, rank), "dog": factors(pipe, rank, seed=1, share=0.5)}
        first = None
        if refined:
            first = mace_refine(pipe, ["cat", "dog"], "house", prompts=FEW if refined == "full" else ["{}"])
        found, real = {}, mace.relative_change

        def relative_change(factors):
            for name, weight, up, down in factors:
                found[name] = up, down
                yield name, weight, up, down

        monkeypatch.setattr(mace, "relative_change", lambda factors: real(relative_change(factors)))
        edit = mace_fuse(
            pipe, loras, refined=first, prompts=FEW, lamb=lamb, preserve=KEPT, domain=CELEBRITIES,
            preserve_scale=s, domain_scale=w,
        )  # fmt: skip
        grams = {c: gram(pipe, [template.replace("{}", c) for template in FEW]) for c in loras}
        kept = s * (gram(pipe, KEPT) + w * gram(pipe, CELEBRITIES))
        eye = torch.eye(len(kept), dtype=torch.float64)
        left = sum(grams.values()) + kept + lamb * eye
        originals = projections(pipe)
        assert found.keys() == originals.keys() and list(edit.changes) == list(originals)
        for name, original in originals.items():
            weight = original
            if first is not None:
                change = first.changes[name]
                weight = original @ (eye + change.up.double() @ change.down.double())
            right = original @ kept + lamb * weight
            for concept, lora in loras.items():
                up, down = lora.get(name.removesuffix(".weight"), (torch.zeros(1), torch.zeros(1)))
                trained = weight + (up.double() @ down.double() if up.ndim == 2 else 0)
                right = right + trained @ grams[concept]
            expected = torch.linalg.solve(left, right.T).T
            up, down = found[name]
            assert off(up @ down, expected - original) < 1e-10
            # the term that the preserved texts of the original model add is not small
            if first is not None:
                without = expected - torch.linalg.solve(left, ((original - weight) @ kept).T).T
                assert off(without - original, expected - original) > 0.01
        with edit.on(pipe):
            assert off(projections(pipe)[name], expected) < 1e-5

    def test_the_rank_is_that_of_the_loras(self):
        pipe = tiny_pipeline("sdxl")
        loras = {"cat": factors(pipe, 1), "dog": factors(pipe, 2, seed=1, share=0.5)}
        edit = mace_fuse(pipe, loras, prompts=FEW)
        assert [change.rank for change in edit.changes.values()] == [3] * 11 + [1] * 11
        assert all(isinstance(change, Added) for change in edit.changes.values())
        assert edit.report()["rank"] == 3 and edit.report()["encoder_calls"] == 2
        few = {layer: pair for layer, pair in loras["dog"].items() if layer.endswith("to_v")}
        edit = mace_fuse(pipe, {"dog": few}, prompts=FEW)
        assert edit.changes.keys() == {f"{layer}.weight" for layer in few}

    def test_the_rank_with_the_refinement_is_at_most_that_of_the_weight(self):
        pipe = tiny_pipeline("sd1")
        edit = mace_fuse(
            pipe, {"cat": factors(pipe, 3)}, refined=mace_refine(pipe, "cat", "dog"), prompts=FEW
        )
        for name, weight in projections(pipe).items():
            assert edit.changes[name].rank == min(weight.shape)

    def test_each_lora_acts_on_its_own_prompts(self):
        """Without anything to preserve, and with more tokens than dimensions, one LoRA is itself."""
        pipe = tiny_pipeline("sd1")
        lora, prompt = factors(pipe, 2), embedded(pipe, FEW[0].replace("{}", "cat")).float()
        edit = mace_fuse(pipe, {"cat": lora}, prompts=FEW, lamb=1e-6)
        for name, change in edit.changes.items():
            up, down = lora[name.removesuffix(".weight")]
            assert off(prompt @ change.down.T @ change.up.T, prompt @ down.T @ up.T) < 1e-4

    def test_without_a_lora_of_weight_the_refinement_is_left(self):
        pipe = tiny_pipeline("sd1")
        first = mace_refine(pipe, "cat", "dog", prompts=FEW)
        nothing = {layer: (0 * up, down) for layer, (up, down) in factors(pipe, 1).items()}
        edit = mace_fuse(pipe, {"cat": nothing}, refined=first, prompts=FEW)
        with first.on(pipe):
            expected = projections(pipe)
        with edit.on(pipe):
            for name, weight in projections(pipe).items():
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        assert edit.targets == ("cat",) and edit.settings["refined"]

    @pytest.mark.parametrize("format", ["diffusers", "kohya"])
    def test_loras_from_files(self, format, tmp_path):
        pipe = tiny_pipeline("sdxl")
        lora = factors(pipe, 2)
        Edit.made(
            models.load(pipe),
            {f"{layer}.weight": Added(up, down) for layer, (up, down) in lora.items()},
            method="by hand",
            targets=(),
        ).save_lora(tmp_path / "cat.safetensors", format=format)
        a = mace_fuse(pipe, {"cat": tmp_path / "cat.safetensors"}, prompts=FEW)
        b = mace_fuse(pipe, {"cat": lora}, prompts=FEW)
        for name, change in a.changes.items():
            assert torch.equal(change.up, b.changes[name].up) and torch.equal(
                change.down, b.changes[name].down
            )

    def test_is_saved_as_a_lora_and_as_an_edit(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        first = mace_refine(pipe, "cat", "dog", prompts=FEW)
        edit = mace_fuse(pipe, {"cat": factors(pipe, 3), "dog": factors(pipe, 1, seed=2)}, refined=first)
        edit.save_lora(tmp_path / "lora.safetensors")
        for layer, (up, down) in read_lora(tmp_path / "lora.safetensors", pipe.unet).items():
            change = edit.changes[f"{layer}.weight"]
            torch.testing.assert_close(up @ down, change.up @ change.down, rtol=0, atol=1e-6)
        edit.save(tmp_path / "edit.safetensors")
        loaded = Edit.load(tmp_path / "edit.safetensors")
        assert loaded.to_dict() == edit.to_dict() and loaded.method == "mace_fuse"
        assert loaded.targets == ("cat", "dog")

    def test_reports_how_far_it_went(self):
        pipe = tiny_pipeline("sd1")
        before = fingerprint(models.load(pipe))
        edit = mace_fuse(pipe, {"cat": factors(pipe, 1)}, prompts=FEW, lamb=2)
        assert fingerprint(models.load(pipe)) == before
        report, weights = edit.report(), projections(pipe)
        changed = {name: (change.up @ change.down).double() for name, change in edit.changes.items()}
        for name, share in report["relative_change"].items():
            assert share == pytest.approx(float(changed[name].norm() / weights[name].norm()), rel=1e-5)
        squares = [sum(float(x.square().sum()) for x in of.values()) for of in (changed, weights)]
        assert report["overall_change"] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-5)
        a = gram(pipe, [template.replace("{}", "cat") for template in FEW]) + 2 * torch.eye(32)
        assert report["condition_number"] == pytest.approx(float(torch.linalg.cond(a)), rel=0.2)

    def test_a_change_of_much_is_warned_about(self):
        pipe = tiny_pipeline("sd1")
        large = {layer: (100 * up, down) for layer, (up, down) in factors(pipe, 1).items()}
        with pytest.warns(ErasureWarning, match="changes the weights by"):
            mace_fuse(pipe, {"cat": large}, prompts=FEW)


class TestBadInput:
    def refuses(self, message: str, call, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"concepts": ()}, "concepts: got 0"),
            ({"concepts": " "}, "concepts: got ' '"),
            ({"concepts": ["cat", "Cat"]}, "concepts: got 'cat' and 'Cat', expected each once"),
            ({"concepts": "cat " * 90}, "concepts: .* does not fit"),
            ({"mapping": "CAT"}, "mapping: got 'CAT' for 'cat'"),
            ({"mapping": ["a", "b"]}, "mapping: got 2"),
            ({"mapping": "dog " * 90}, "mapping: .* does not fit"),
            ({"prompts": []}, "prompts: got 0, expected at least 1"),
            ({"prompts": ["a photo"]}, "prompts: got 'a photo', expected templates with one {}"),
            ({"prompts": ["{} and {}"]}, "prompts: got '{} and {}'"),
            ({"preset": "style"}, "preset: got 'style', expected one of object, nudity, celebrity, artist"),
            ({"variant": "released"}, "variant: got 'released', expected 'paper' or 'code'"),
            ({"lamb": -1}, "lamb: got -1"),
            ({"lamb": math.nan}, "lamb: got nan"),
            ({"preserve": ["cat"], "preserve_scale": 1}, "preserve: got the concept 'cat'"),
            ({"preserve": ["dog"]}, "preserve_scale: got 0.0, expected a positive number"),
            ({"preserve": ["dog " * 90], "preserve_scale": 1}, "preserve: .* does not fit"),
            ({"domain": ["dog"], "preserve_scale": 1}, "domain_scale: got 0.0, expected a positive number"),
            ({"domain": ["dog", ""]}, "domain: got '', expected texts that are not empty"),
            ({"preserve_scale": math.inf}, "preserve_scale: got inf"),
            ({"domain_scale": -2}, "domain_scale: got -2"),
        ],
    )
    def test_refine(self, arguments, message):
        pipe = tiny_pipeline("sd1")
        self.refuses(message, lambda: mace_refine(pipe, **{"concepts": "cat", "mapping": "dog"} | arguments))

    def test_types(self):
        pipe = tiny_pipeline("sd1")
        self.refuses("concepts: got a int", lambda: mace_refine(pipe, [3], "dog"), TypeError)
        self.refuses("prompts: got a str", lambda: mace_refine(pipe, "cat", "dog", prompts="{}"), TypeError)
        self.refuses("loras: got a list", lambda: mace_fuse(pipe, ["cat"]), TypeError)
        lora = factors(pipe, 1)
        self.refuses(
            "refined: got a str, expected an Edit",
            lambda: mace_fuse(pipe, {"cat": lora}, refined="a"),
            TypeError,
        )
        layer = next(iter(lora))
        whole = {layer: tuple(factor.int() for factor in lora[layer])}
        self.refuses("are not floating tensors", lambda: mace_fuse(pipe, {"cat": whole}), TypeError)

    def test_no_ridge_and_too_few_rows(self):
        pipe = tiny_pipeline("sdxl")
        message = "lamb: got 0.0 with too few rows to preserve"
        self.refuses(message, lambda: mace_refine(pipe, "cat", "dog", prompts=["{}"], lamb=0))
        self.refuses(message, lambda: mace_fuse(pipe, {"cat": factors(pipe, 1)}, prompts=["{}"], lamb=0))

    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_families_without_cross_attention(self, family):
        pipe = tiny_pipeline(family)
        self.refuses("is not supported", lambda: mace_refine(pipe, "cat", "dog"), UnsupportedModelError)
        lora = factors(tiny_pipeline("sd1"), 1)
        self.refuses("is not supported", lambda: mace_fuse(pipe, {"cat": lora}), UnsupportedModelError)

    def test_weights_that_are_not_finite(self):
        pipe = tiny_pipeline("sd1")
        lora = factors(pipe, 1)
        layer = next(iter(models.load(pipe).cross_attention.values()))
        layer.to_v.weight.data[0, 0] = math.nan
        self.refuses("to_v.weight is not finite", lambda: mace_refine(pipe, "cat", "dog"))
        self.refuses("to_v.weight is not finite", lambda: mace_fuse(pipe, {"cat": lora}))

    def test_loras_that_do_not_fit(self, tmp_path):
        pipe = tiny_pipeline("sd1")
        lora = factors(pipe, 2)
        layer, (up, down) = next(iter(lora.items()))
        bad = [
            ({}, "loras: got no layers for 'cat'"),
            ({"conv_in": (up, down)}, "changes 'conv_in', expected to_k and to_v of cross-attention"),
            ({layer.replace("attn2", "attn1"): (up, down)}, "attn1.*expected to_k and to_v"),
            ({layer: (up[:, :1], down)}, r"got up \(16, 1\) and down \(2, 32\), expected \(16, r\)"),
            ({layer: (down, up)}, r"expected \(16, r\) and \(r, 32\)"),
            ({layer: (up[:, :0], down[:0])}, r"expected \(16, r\) and \(r, 32\)"),
            ({layer: (up * math.nan, down)}, "are not finite"),
            (tmp_path / "none.safetensors", "path: .* cannot be read as a LoRA"),
        ]
        for wrong, message in bad:
            self.refuses(message, lambda wrong=wrong: mace_fuse(pipe, {"cat": wrong}))
        self.refuses("loras: got 0", lambda: mace_fuse(pipe, {}))
        self.refuses("loras: .* does not fit", lambda: mace_fuse(pipe, {"cat " * 90: lora}))

    def test_a_refinement_that_is_none(self):
        pipe, other = tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)
        lora = {"cat": factors(pipe, 1)}
        elsewhere = mace_refine(other, "cat", "dog", prompts=FEW)
        self.refuses("fingerprint", lambda: mace_fuse(pipe, lora, refined=elsewhere))
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
        change = {name: Added(torch.ones(32, 1), torch.ones(1, 32))}
        foreign = Edit.made(models.load(pipe), change, method="by hand", targets=())
        self.refuses("refined: got an edit by by hand that", lambda: mace_fuse(pipe, lora, refined=foreign))


class TestTrained:
    """A ball becomes a box, by other tokens alone, and by a LoRA of all."""

    def shown(self, pipe, objects, edit=None) -> list[bool]:
        """Whether the reader sees each object, drawn in four scenes."""
        places = (("red", "beach"), ("blue", "snow"), ("green", "city"), ("yellow", "cave"))
        scenes = [world.Scene(object, *place) for object in objects for place in places]
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(scenes))]
        if edit is not None:
            edit.apply(pipe)
        images = pipe(
            [world.full_caption(scene) for scene in scenes], num_inference_steps=12, guidance_scale=5,
            generator=generators, output_type="pt",
        ).images  # fmt: skip
        if edit is not None:
            edit.remove(pipe)
        seen = testbed.load_reader().read(images)
        return [a.object == b.object for a, b in zip(seen, scenes, strict=True)]

    def test_refined(self):
        pipe = testbed.load()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the default goes not too far
            edit = mace_refine(pipe, "ball", "box")
        seen = self.shown(pipe, ("ball", "box", "fish"), edit)
        assert sum(seen[:4]) < 3 and sum(seen[4:]) > 6
        assert 0 < edit.report()["residual"] < 0.6

    def test_fused(self, tmp_path):
        pipe = testbed.load()
        for concept, guide in (("ball", "box"), ("star", "tent")):
            uce(pipe, concept, guide=guide, tokens="all", expand=PROMPTS[:6]).save_lora(
                tmp_path / f"{concept}.safetensors", rank=4
            )
        loras = {concept: tmp_path / f"{concept}.safetensors" for concept in ("ball", "star")}
        edit = mace_fuse(pipe, loras, lamb=1)
        assert edit.report()["rank"] == 8
        seen = self.shown(pipe, ("ball", "star", "fish"), edit)
        assert sum(seen[:8]) < 4 and sum(seen[8:]) > 2
