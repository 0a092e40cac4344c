"""Unified Concept Editing against its published formula, layer by layer, and on the trained testbed."""

from __future__ import annotations

import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from pumice import testbed
from pumice.erase import ErasureWarning, uce, uce_sweep
from pumice.erase.rows import EXPANSION
from pumice.models import Edit, UnsupportedModelError, load
from pumice.testbed import tiny_pipeline, world
from pumice.testbed.world import Scene

FAMILIES = ("sd1", "sd2", "sdxl")
POOLED = "add_embedding.linear_1.weight"

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def exact(request):
    """A pipeline in float64, which no test here changes for good."""
    return tiny_pipeline(request.param).to(torch.float64)


@pytest.fixture(scope="module")
def sd1():
    return tiny_pipeline("sd1")


def embeds(pipe, text: str) -> Tensor:
    found = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return found[0][0].detach()


def last(pipe, text: str) -> int:
    """The last content token, BOS in an empty text."""
    return sum(pipe.tokenizer(text)["attention_mask"]) - 2


def last_row(pipe, text: str) -> Tensor:
    return embeds(pipe, text)[last(pipe, text)][None]


def all_rows(pipe, concept: str, guide: str) -> tuple[Tensor, Tensor]:
    a, b = last(pipe, concept), last(pipe, guide)
    count = 77 - max(a, b)
    return embeds(pipe, concept)[a : a + count], embeds(pipe, guide)[b : b + count]


def published(
    w: Tensor, pairs: list[tuple[Tensor, Tensor]], kept: Tensor, *, eta=1.0, gamma=1.0, lamb=0.5, tensor=False
) -> Tensor:
    """One layer's W' from each concept's rows c and its guide's rows g, as the paper writes it."""
    left = lamb * w + gamma * (kept @ w.T).T @ kept
    a = lamb * torch.eye(w.shape[1], dtype=w.dtype) + gamma * kept.T @ kept
    for c, g in pairs:
        target = g @ w.T
        if tensor:
            u = c @ w.T / (c @ w.T).norm()
            target = target - (u * target).sum() * u
        left, a = left + eta * target.T @ c, a + eta * c.T @ c
    return left @ torch.linalg.inv(a)


def projections(pipe) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone()
        for name, weight in pipe.unet.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


def check(pipe, edit: Edit, pairs, kept: Tensor | None = None, **scales) -> None:
    """Every projection is the published one, to the rounding of the edit's float32 factors."""
    before = projections(pipe)
    kept = pairs[0][0][:0] if kept is None else kept
    with edit.on(pipe):
        after = projections(pipe)
    assert edit.changes.keys() - {POOLED} == before.keys()
    for name, w in before.items():
        expected = published(w, pairs, kept, **scales)
        assert (expected - w).norm() > 1e-3 * w.norm()
        assert (after[name] - expected).norm() < 2e-6 * (expected - w).norm(), name


class TestLastToken:
    def test_several_concepts_with_their_guides(self, exact):
        edit = uce(exact, ["zebra", "cat"], guide=["dog", "a red tree"])
        pairs = [
            (last_row(exact, concept), last_row(exact, guide))
            for concept, guide in (("zebra", "dog"), ("cat", "a red tree"))
        ]
        check(exact, edit, pairs)

    def test_preserving_and_every_scale(self, exact):
        edit = uce(exact, "zebra", preserve=["a horse", "dog"], erase_scale=2.0, preserve_scale=0.3, lamb=0.1)
        kept = torch.cat([last_row(exact, text) for text in ("a horse", "dog")])
        pairs = [(last_row(exact, "zebra"), embeds(exact, "")[:1])]
        check(exact, edit, pairs, kept, eta=2.0, gamma=0.3, lamb=0.1)

    def test_what_is_preserved_twice_counts_once(self, sd1):
        edit = uce(sd1, "cat", preserve=["a dog", "tree", "A  dog"])
        assert same_changes(edit, uce(sd1, "cat", preserve=["A  dog", "tree"]))

    def test_more_concepts_than_half_the_dimensions(self, exact):
        concepts = [f"{colour} {thing}" for colour in "red green blue black".split() for thing in
                    "cat dog horse bird car house tree flower person woman man city".split()]  # fmt: skip
        edit = uce(exact, concepts, preserve="sea")
        pairs = [(last_row(exact, concept), embeds(exact, "")[:1]) for concept in concepts]
        check(exact, edit, pairs, last_row(exact, "sea"))
        assert edit.report()["rank"] == min(48, exact.unet.config.cross_attention_dim)

    @pytest.mark.parametrize("guide", ["", " "])
    def test_a_blank_guide_is_the_embedding_of_the_beginning(self, exact, guide):
        check(exact, uce(exact, "cat", guide=guide), [(last_row(exact, "cat"), embeds(exact, "")[:1])])

    def test_in_the_middle_of_a_sentence(self, exact):
        edit = uce(exact, "zebra", guide="dog", expand=["a {} in a red house"])
        pairs = [
            (last_row(exact, "zebra"), last_row(exact, "dog")),
            (embeds(exact, "a zebra in a red house")[6:7], embeds(exact, "a dog in a red house")[2:3]),
        ]
        check(exact, edit, pairs)
        assert edit.report()["rank"] == 2

    def test_a_template_that_is_the_concept_alone_counts_once(self, sd1):
        edit = uce(sd1, "cat", expand=["{}", "a photo of {}", "{}"])
        assert edit.report()["rank"] == 2 and same_changes(edit, uce(sd1, "cat", expand=["a photo of {}"]))

    def test_expanded(self, sd1):
        edit = uce(sd1, "cat", guide="dog", expand=True)
        assert edit.settings["templates"] == ["{}", *EXPANSION]
        again = uce(sd1, "cat", guide="dog", expand=EXPANSION)
        assert edit.report()["rank"] == 6 and same_changes(edit, again)


class TestAllTokens:
    def test_several_concepts_with_their_guides(self, exact):
        """With nothing else to preserve, all tokens of the empty text are, at weight 1."""
        edit = uce(exact, ["zebra", "cat"], guide=["dog", " "], tokens="all")
        pairs = [all_rows(exact, "zebra", "dog"), all_rows(exact, "cat", "")]
        check(exact, edit, pairs, embeds(exact, ""))
        assert edit.settings["preserve_scale"] == 1

    @pytest.mark.parametrize(("count", "gamma"), [(1, 1 / 2), (3, 1 / 4), (12, 0.1)])
    def test_the_weight_of_preserving_goes_down_with_the_texts(self, count, gamma):
        pipe = tiny_pipeline("sd1").to(torch.float64)
        names = "dog horse bird car house tree flower person woman man city sea".split()[:count]
        edit = uce(pipe, "cat", tokens="all", preserve=names, lamb=0.1)
        kept = torch.cat([embeds(pipe, text) for text in ("", *names)])
        check(pipe, edit, [all_rows(pipe, "cat", "")], kept, gamma=gamma, lamb=0.1)

    def test_in_the_middle_of_a_sentence(self, exact):
        edit = uce(exact, "cat", guide="a red zebra", tokens="all", expand=["the {} at sea"])
        c, g = embeds(exact, "the cat at sea"), embeds(exact, "the a red zebra at sea")
        pairs = [all_rows(exact, "cat", "a red zebra"), (c[2 : 2 + 69], g[8 : 8 + 69])]
        check(exact, edit, pairs, embeds(exact, ""))


class TestTensor:
    @pytest.mark.parametrize("tokens", ["last", "all"])
    def test_every_layer_takes_away_what_points_along_the_concept(self, exact, tokens):
        names = (("zebra", "dog"), ("cat", "tree"))
        edit = uce(exact, ["zebra", "cat"], guide=["dog", "tree"], technique="tensor", tokens=tokens)
        if tokens == "all":
            pairs, kept = [all_rows(exact, *both) for both in names], embeds(exact, "")
        else:
            pairs, kept = [tuple(last_row(exact, text) for text in both) for both in names], None
        check(exact, edit, pairs, kept, tensor=True)

    def test_a_concepts_templates_are_its_rows(self, exact):
        edit = uce(exact, "cat", guide="dog", technique="tensor", expand=["a red {}"])
        rows = [
            torch.cat([last_row(exact, template.format(text)) for template in ("{}", "a red {}")])
            for text in ("cat", "dog")
        ]
        check(exact, edit, [tuple(rows)], tensor=True)

    def test_in_the_limit_the_new_output_is_orthogonal_to_the_old(self, exact):
        c = last_row(exact, "zebra")
        before = projections(exact)
        angles = []
        for lamb in (10.0, 1.0, 1e-6):
            with uce(exact, "zebra", guide="dog", technique="tensor", lamb=lamb).on(exact):
                after = projections(exact)
            angles.append(
                max(
                    float((c @ w.T * (c @ after[name].T)).sum() / (c @ w.T).square().sum())
                    for name, w in before.items()
                )
            )
        assert angles[0] > angles[1] > angles[2] and abs(angles[2]) < 1e-5

    def test_its_residual_is_to_its_own_target(self, exact):
        assert uce(exact, "zebra", guide="dog", technique="tensor", lamb=1e-8).report()["residual"] < 1e-6


class TestGuides:
    def test_of_a_kind_of_concept(self, sd1):
        for kind, guide in (("object", ""), ("unsafe", ""), ("art", "art")):
            edit = uce(sd1, ["cat", "dog"], concept_type=kind)
            assert edit.settings["guide"] == [guide] * 2
            assert same_changes(edit, uce(sd1, ["cat", "dog"], guide=guide))
        assert uce(sd1, "cat", concept_type="art", guide="dog").settings["guide"] == ["dog"]

    def test_one_serves_all(self, sd1):
        assert same_changes(
            uce(sd1, ["cat", "dog"], guide="tree"), uce(sd1, ["cat", "dog"], guide=["tree", "tree"])
        )


def same_changes(one: Edit, other: Edit) -> bool:
    return one.changes.keys() == other.changes.keys() and all(
        torch.equal(change.up, other.changes[name].up) and torch.equal(change.down, other.changes[name].down)
        for name, change in one.changes.items()
    )


@pytest.fixture(scope="module")
def xl():
    return tiny_pipeline("sdxl").to(torch.float64)


class TestPooled:
    """The second way of a text into Stable Diffusion XL, 40 numbers before 48 of picture sizes."""

    def vector(self, xl, text):
        return load(xl).encode_prompt(text).pooled[0].detach()

    def test_it_is_left_unless_asked_for(self, xl):
        assert POOLED not in uce(xl, "cat").changes
        assert not uce(xl, "cat").settings["pooled"] and uce(xl, "cat", pooled=True).settings["pooled"]

    @pytest.mark.parametrize("tokens", ["last", "all"])
    def test_is_edited_by_the_same_equation(self, xl, tokens):
        edit = uce(xl, ["cat", "zebra"], guide="dog", pooled=True, preserve=["sea"], lamb=0.2, tokens=tokens)
        before = xl.unet.get_parameter(POOLED).detach().clone()
        with edit.on(xl):
            after = xl.unet.get_parameter(POOLED).detach().clone()
        texts = ["sea"] if tokens == "last" else ["", "sea"]
        kept = torch.stack([self.vector(xl, text) for text in texts])
        pairs = [(self.vector(xl, c)[None], self.vector(xl, "dog")[None]) for c in ("cat", "zebra")]
        w = before[:, :40]
        expected = published(w, pairs, kept, gamma=1.0 if tokens == "last" else 0.5, lamb=0.2)
        assert (after[:, :40] - expected).norm() < 2e-6 * (expected - w).norm()
        assert torch.equal(after[:, 40:], before[:, 40:])

    def test_in_the_limit_the_concept_enters_as_its_guide(self, xl):
        layer = xl.unet.add_embedding.linear_1
        sizes = torch.randn(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cat, dog = (torch.cat([self.vector(xl, text), sizes]) for text in ("cat", "dog"))
        with torch.no_grad():
            wanted, gap = layer(dog), layer(dog) - layer(cat)
            with uce(xl, "cat", guide="dog", pooled=True, lamb=1e-9).on(xl):
                found = layer(cat)
        assert (found - wanted).norm() < 1e-5 * gap.norm()

    def test_weights_that_are_not_finite_are_refused(self):
        pipe = tiny_pipeline("sdxl")
        pipe.unet.get_parameter(POOLED).data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"pipe: its weight {POOLED} is not finite"):
            uce(pipe, "cat", pooled=True)

    def test_a_family_without_one_is_refused(self, sd1):
        with pytest.raises(UnsupportedModelError, match="pooled: got True, but the model takes no pooled"):
            uce(sd1, "cat", pooled=True)


class TestSweep:
    @pytest.mark.parametrize("tokens", ["last", "all"])
    @pytest.mark.parametrize("swept", [{"erase_scale": (0.1, 1.0, 5.0)}, {"lamb": (0.01, 0.5, 10.0)}])
    def test_each_is_what_uce_makes(self, sd1, tokens, swept):
        ((name, values),) = swept.items()
        common = {"guide": ["dog", ""], "preserve": ["tree"], "tokens": tokens}
        for value, edit in zip(values, uce_sweep(sd1, ["cat", "zebra"], **common, **swept), strict=True):
            alone = uce(sd1, ["cat", "zebra"], **common, **{name: value})
            assert edit.settings == alone.settings
            assert edit.targets == alone.targets and edit.base == alone.base and edit.method == "uce"
            for key, number in alone.report().items():
                rel = 0.2 if key == "condition_number" else 1e-3
                assert edit.report()[key] == pytest.approx(number, rel=rel), key
            for weight, change in alone.changes.items():
                found = edit.changes[weight]
                torch.testing.assert_close(found.up @ found.down, change.up @ change.down, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("values", [torch.tensor([0.25, 0.5]), np.array([0.25, 0.5], dtype=np.float32)])
    def test_values_from_anywhere_can_be_saved(self, sd1, values, tmp_path):
        for edit in uce_sweep(sd1, "cat", lamb=values):
            edit.save(tmp_path / "edit.safetensors")
            assert Edit.load(tmp_path / "edit.safetensors").to_dict() == edit.to_dict()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "erase_scale, lamb: expected one of them to be a sequence"),
            (
                {"lamb": [0.5], "erase_scale": [1.0]},
                "erase_scale, lamb: expected one of them to be a sequence",
            ),
            ({"lamb": [0.5, 0.0]}, "lamb: got 0.0, expected a positive number"),
            ({"lamb": [0.5], "erase_scale": -1.0}, "erase_scale: got -1.0, expected a non-negative"),
            ({"erase_scale": [1.0, float("nan")]}, "erase_scale: got nan, expected a non-negative"),
        ],
    )
    def test_bad_values(self, sd1, arguments, message):
        with pytest.raises(ValueError, match=message):
            uce_sweep(sd1, "cat", **arguments)


LONG = "cat " * 80

BAD = [
    ({"concepts": ""}, "concepts: got '', expected texts that are not empty"),
    ({"concepts": ["dog", " \t\n"]}, r"concepts: got ' \\t\\n', expected texts that are not empty"),
    ({"concepts": []}, "concepts: got 0, expected at least 1"),
    ({"concepts": ["cat", "dog", " CAT"]}, "concepts: got 'cat' and ' CAT', expected each once"),
    ({"concepts": LONG}, "concepts: .* is longer than the text encoder takes"),
    ({"guide": "Cat "}, "guide: got 'Cat ' for 'cat', expected something else"),
    ({"concepts": "art", "concept_type": "art"}, "guide: got 'art' for 'art'"),
    ({"concepts": ["cat", "dog"], "guide": ["tree"]}, "guide: got 1, expected one, or one for each of 2"),
    ({"guide": LONG}, "guide: .* is longer than the text encoder takes"),
    ({"preserve": "CAT"}, "preserve: got the concept 'CAT' itself"),
    ({"preserve": ["dog", ""]}, "preserve: got '', expected texts that are not empty"),
    ({"preserve": "dog " * 80}, "preserve: .* is longer than the text encoder takes"),
    ({"concept_type": "thing"}, "concept_type: got 'thing', expected one of object, art, unsafe"),
    ({"technique": "project"}, "technique: got 'project', expected 'replace' or 'tensor'"),
    ({"tokens": "first"}, "tokens: got 'first', expected 'last' or 'all'"),
    ({"expand": ["a cat"]}, "expand: got 'a cat', expected templates with one {}"),
    ({"expand": ["{} and {}"]}, "expand: got '{} and {}', expected templates with one {}"),
    ({"lamb": 0}, "lamb: got 0.* with too few rows to preserve"),
    ({"lamb": 0.0, "preserve": ["dog", "tree"]}, "lamb: got 0.0 with too few rows to preserve"),
    ({"lamb": 0.0, "technique": "tensor"}, "lamb: got 0.0 with too few rows to preserve"),
]
BAD += [
    ({name: value}, f"{name}: got {value}, expected a non-negative number")
    for name in ("erase_scale", "preserve_scale", "lamb")
    for value in (-0.1, float("nan"), float("inf"))
]
BAD_TYPES = [
    ({"concepts": ["cat", 3]}, "concepts: got a int, expected strings"),
    ({"concepts": b"cat"}, "concepts: got a "),
    ({"concepts": None}, "concepts: got a NoneType"),
    ({"concepts": ["cat", "dog"], "guide": ["tree", None]}, "guide: got a NoneType, expected strings"),
    ({"preserve": [3.5]}, "preserve: got a float, expected strings"),
    ({"expand": "a {}"}, "expand: got a str, expected a list of templates"),
    ({"lamb": "0.5"}, "lamb: got "),
    ({"erase_scale": None}, "erase_scale: got "),
]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message", "error"),
        [(*case, ValueError) for case in BAD] + [(*case, TypeError) for case in BAD_TYPES],
        ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
    )
    def test_says_what_is_wrong_in_one_line(self, sd1, arguments, message, error):
        before = {name: weight.clone() for name, weight in sd1.unet.state_dict().items()}
        with pytest.raises(error, match=f"^{message}") as caught:
            uce(sd1, **{"concepts": "cat"} | arguments)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(before[name], weight) for name, weight in sd1.unet.state_dict().items())

    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_families_without_cross_attention(self, family):
        with pytest.raises(UnsupportedModelError, match="Pipeline is not supported") as caught:
            uce(tiny_pipeline(family), "cat")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, value):
        pipe = tiny_pipeline("sd1")
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
        pipe.unet.get_parameter(name).data[3, 4] = value
        with pytest.raises(ValueError, match=f"^pipe: its weight {name} is not finite$"):
            uce(pipe, "cat")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda unet: unet.fuse_qkv_projections(), "fused.* call unfuse_qkv_projections"),
            (
                lambda unet: unet.add_adapter(LoraConfig(target_modules=["to_k"])),
                "LoRA adapter is attached; call unload_lora_weights",
            ),
            (lambda unet: unet.to(torch.float8_e4m3fn), "expected float16 or wider"),
            (lambda unet: unet.mid_block.to("meta"), "offloaded .* remove the offload hooks"),
        ],
        ids=["fused", "LoRA", "quantised", "offloaded"],
    )
    def test_layers_that_cannot_be_edited(self, spoil, message):
        pipe = tiny_pipeline("sd1")
        spoil(pipe.unet)
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            uce(pipe, "cat")
        assert "\n" not in str(caught.value)


class TestWarnings:
    @pytest.mark.parametrize("preserve", ["a photo of a cat", "A CAT, asleep", "dog and cat"])
    def test_preserving_what_speaks_of_a_concept(self, sd1, preserve):
        with pytest.warns(ErasureWarning, match="preserve: .* speaks of 'Cat', which is to be erased"):
            uce(sd1, "Cat", preserve=preserve)

    def test_words_that_only_begin_alike_are_not_meant(self, sd1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            uce(sd1, "cat", preserve=["a catalogue", "concatenate"], lamb=20.0)


def test_without_a_ridge_enough_to_preserve_will_do():
    """All tokens of a few texts span the space, in which no layer norm leaves a direction out."""
    pipe = tiny_pipeline("sdxl").to(torch.float64)
    names = "dog horse bird car house tree flower person".split()
    edit = uce(pipe, "cat", tokens="all", preserve=names, lamb=0.0)
    kept = torch.cat([embeds(pipe, text) for text in ("", *names)])
    check(pipe, edit, [all_rows(pipe, "cat", "")], kept, gamma=1 / 9, lamb=0.0)


def test_it_says_what_it_did(sd1):
    edit = uce(sd1, ["cat", "dog"], preserve=["tree"], lamb=0.2)
    assert edit.method == "uce" and edit.targets == ("cat", "dog")
    given = {"guide": ["", ""], "preserve": ["tree"], "lamb": 0.2, "erase_scale": 1.0, "preserve_scale": 1.0}
    chosen = {"technique": "replace", "tokens": "last", "templates": ["{}"], "pooled": False}
    assert edit.settings == given | chosen


def test_defaults_are_the_released_codes():
    defaults = {name: parameter.default for name, parameter in inspect.signature(uce).parameters.items()}
    assert defaults["erase_scale"] == 1 and defaults["lamb"] == 0.5 and defaults["tokens"] == "last"
    assert defaults["technique"] == "replace" and defaults["expand"] is False and not defaults["pooled"]


def test_the_callers_model_and_random_numbers_stay(sd1):
    sd1.unet.train()
    sd1.text_encoder.train()
    before = {name: weight.clone() for name, weight in sd1.unet.state_dict().items()}
    state = torch.random.get_rng_state()
    try:
        uce(sd1, "cat", tokens="all")
        assert sd1.unet.training and sd1.text_encoder.training
    finally:
        sd1.unet.eval()
        sd1.text_encoder.eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(weight.requires_grad for weight in sd1.unet.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in sd1.unet.state_dict().items())


def test_a_model_given_by_its_folder(sd1, tmp_path):
    sd1.save_pretrained(tmp_path / "model")
    edit = uce(tmp_path / "model", "cat", guide="dog")
    assert same_changes(edit, uce(sd1, "cat", guide="dog"))
    with edit.on(sd1):
        pass
    with pytest.raises(ValueError, match=r"pipe: the pipeline .* give it: save_lora\(path, pipe\)"):
        edit.save_lora(tmp_path / "lora.safetensors")
    edit.save_lora(tmp_path / "lora.safetensors", sd1)


def test_a_trained_model_no_longer_draws_the_object_and_still_draws_the_others():
    pipe, reader = testbed.load(), testbed.load_reader()
    balls = itertools.product(("red", "orange", "yellow"), ("beach", "forest"))
    scenes = [Scene("ball", colour, place) for colour, place in balls]
    scenes += [Scene(name, "red", "beach") for name in list(world.OBJECTS)[1:7]]

    def objects():
        images = pipe(
            [world.full_caption(scene) for scene in scenes],
            num_inference_steps=12,
            guidance_scale=5,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(scenes))],
            output_type="pt",
        ).images
        return [scene.object for scene in reader.read(images)]

    before = objects()
    with uce(pipe, "ball", tokens="all", guide="box").on(pipe):
        after = objects()
    assert before[:6].count("ball") >= 5 and after[:6].count("ball") <= 1 and after[:6].count("box") >= 5
    assert sum(a == b for a, b in zip(after[6:], before[6:], strict=True)) >= 5
