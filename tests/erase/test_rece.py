"""RECE in its shared form is RECE as published, layer by layer, and finds and closes what UCE leaves open."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from pumice import models, testbed
from pumice.erase import uce
from pumice.erase.arguments import ErasureWarning
from pumice.erase.closed_form import LinearMap, SingularError
from pumice.erase.edits import projections
from pumice.erase.rece import derived, gram_of_weights, rece
from pumice.models import Edit, UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

REGULARIZERS = ("regzero", "standardreg", "surrogatereg", "surrogatereg_2nd", "surrogatereg_both")

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")


@pytest.fixture(scope="module")
def sd1():
    """For tests that leave it as it is."""
    return tiny_pipeline("sd1")


def weights_of(pipe) -> list[torch.Tensor]:
    return [weight.double() for weight in projections(models.load(pipe)).values()]


def rows(pipe, *texts) -> torch.Tensor:
    """All positions of each text, (n, L, d)."""
    with torch.no_grad():
        return models.load(pipe).encode_prompt(texts).embeds.double()


def random_map(d: int, seed: int, size: float = 0.3, rank: int = 3) -> LinearMap:
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, rank), (rank, d))
    )
    return LinearMap(size * up / d**0.5, down)


def per_layer(weights, before, c, g, regularizer, ridge) -> torch.Tensor:
    """The embeddings as published: sums over layers, an explicit inverse; `before`: without edits."""
    eye = torch.eye(c.shape[1], dtype=torch.float64)
    left = sum(w.T @ w for w in weights)
    right = sum(w.T @ old for w, old in zip(weights, before, strict=True))
    extra = torch.zeros_like(c)
    if regularizer == "regzero":
        left = left + ridge * eye
    elif regularizer == "standardreg":
        left, extra = left + ridge * eye, ridge * g
    else:
        gram = left
        if regularizer != "surrogatereg_2nd":
            left, right = left + ridge * gram, right + ridge * gram
        if regularizer != "surrogatereg":
            left, right = left + ridge * eye, right + ridge * eye
    return (c @ right.T + extra) @ torch.linalg.inv(left).T


def edited(weights, c, g, p, *, lamb, preserve_scale) -> list[torch.Tensor]:
    """UCE's edit as published, one explicit solution for each weight."""
    eye = torch.eye(c.shape[1], dtype=torch.float64)
    a = lamb * eye + c.T @ c + preserve_scale * p.T @ p
    return [
        (lamb * w + (g @ w.T).T @ c + preserve_scale * (p @ w.T).T @ p) @ torch.linalg.inv(a) for w in weights
    ]


def kept_maps(monkeypatch) -> list[LinearMap]:
    """A list that the maps of all edits go into, before they are rounded to float32."""
    module, maps = importlib.import_module("pumice.erase.rece"), []
    real = module.edit_of

    def edit_of(model, found, **about):
        maps.extend(found.values())
        return real(model, found, **about)

    monkeypatch.setattr(module, "edit_of", edit_of)
    return maps


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_equals_the_published_loop_over_layers(monkeypatch, family, regularizer):
    pipe = tiny_pipeline(family)
    concepts, guides, keep = ["cat", "a red dog"], ["tree", "a car"], ["a photo of a house"]
    epochs = 1 if regularizer == "surrogatereg" else 3  # it has no ridge, and ever worse a condition
    maps = kept_maps(monkeypatch)
    options = {
        "epochs": epochs,
        "ridge": 0.05,
        "regularizer": regularizer,
        "preserve": keep,
        "preset": "unsafe",
    }
    edit = rece(pipe, concepts, guide=guides, **options)

    model, before = models.load(pipe), weights_of(pipe)
    c, g, blank, kept = (rows(pipe, *texts) for texts in (concepts, guides, [""], keep))
    # UCE aligns a concept's last token with the guide's, and as many rows as both have left
    uce_c, uce_g = [], []
    tokens = zip(model.tokenize(concepts), model.tokenize(guides), c, g, strict=True)
    for of_concept, of_guide, concept, guide in tokens:
        count = 78 - max(of_concept.eos, of_guide.eos)
        uce_c.append(concept[of_concept.eos - 1 :][:count])
        uce_g.append(guide[of_guide.eos - 1 :][:count])
    p = torch.cat([blank[0], kept[0]])
    now = edited(before, torch.cat(uce_c), torch.cat(uce_g), p, lamb=0.1, preserve_scale=0.5)
    p = torch.cat([blank[0], blank[0], kept[0]])  # the empty text once for each concept
    flat_c, flat_g = c.flatten(0, 1), g.flatten(0, 1)
    for epoch in range(epochs):
        new = per_layer(now, before, flat_c, flat_g, regularizer, 0.05)
        for i, (x, y) in enumerate(zip(new.view_as(c), c, strict=True)):
            norm = float(x.norm() / y.norm())
            off = sum((x @ w.T - y @ old.T).square().sum() for w, old in zip(now, before, strict=True))
            miss = float((off / sum((y @ old.T).square().sum() for old in before)).sqrt())
            assert edit.details["derived_norms"][epoch][i] == pytest.approx(norm, rel=1e-7)
            assert edit.details["derived_residual"][epoch][i] == pytest.approx(miss, rel=1e-7)
        now = edited(now, new, flat_g, p, lamb=0.1, preserve_scale=0.1)

    assert len(maps) == len(before) and all(found is maps[0] for found in maps)
    for old, expected in zip(before, now, strict=True):
        torch.testing.assert_close(
            old @ maps[0].dense(), expected, rtol=0, atol=1e-8 * float(expected.norm())
        )
    assert edit.method == "rece" and edit.targets == tuple(concepts) and len(edit.changes) == len(before)
    with edit.on(pipe):
        for got, expected in zip(weights_of(pipe), now, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_derived_embeddings_minimise_their_objective(sd1, regularizer):
    before, ridge = weights_of(sd1), 0.2
    c, g = rows(sd1, "cat")[0, :9], rows(sd1, "tree")[0, :9]
    found = random_map(32, seed=1)
    h = gram_of_weights(projections(models.load(sd1)), c.device)
    new = derived(h, found, c, g, ridge=ridge, regularizer=regularizer).requires_grad_()

    outputs = sum(((found(new) - c) @ w.T).square().sum() for w in before)
    pull = {
        "regzero": new.square().sum(),
        "standardreg": (new - g).square().sum(),
        "surrogatereg": sum((found(new - c) @ w.T).square().sum() for w in before),
        "surrogatereg_2nd": (new - c).square().sum(),
    }
    pull["surrogatereg_both"] = pull["surrogatereg"] + pull["surrogatereg_2nd"]
    (slope,) = torch.autograd.grad(outputs + ridge * pull[regularizer], new)
    assert float(slope.norm()) < 1e-10 * float(c.norm())


def test_without_an_edit_and_a_ridge_nothing_else_draws_the_concept():
    pipe = tiny_pipeline("sd2")
    c = rows(pipe, "cat")[0]
    h = gram_of_weights(projections(models.load(pipe)), c.device)
    none = LinearMap(torch.zeros(48, 0).double(), torch.zeros(0, 48).double())
    assert torch.equal(derived(h, none, c, c, ridge=0.0), c)
    for regularizer in ("surrogatereg", "surrogatereg_2nd", "surrogatereg_both"):
        assert torch.equal(derived(h, none, c, c, ridge=0.7, regularizer=regularizer), c)
    assert float((derived(h, none, c, c, ridge=1e-9) - c).norm() / c.norm()) < 1e-8
    # an edit with an inverse hides nothing: M c' = c
    found = random_map(48, seed=2)
    torch.testing.assert_close(found(derived(h, found, c, c, ridge=0.0)), c, rtol=1e-9, atol=1e-9)


def test_an_equation_without_a_single_solution_is_refused():
    weights = {"a": torch.eye(6)[:4], "b": torch.eye(6)[2:5]}
    h = gram_of_weights(weights, torch.device("cpu"))
    assert torch.equal(h.diagonal(), torch.tensor([1, 1, 2, 2, 1, 0]).double())
    c = torch.ones(2, 6).double()
    for regularizer, ridge in (("regzero", 0.0), ("surrogatereg", 0.1)):
        with pytest.raises(SingularError):
            derived(h, random_map(6, 0), c, c, ridge=ridge, regularizer=regularizer)
    assert derived(h, random_map(6, 0), c, c, ridge=0.1).isfinite().all()


def test_the_default_start_is_uce_on_all_tokens(sd1):
    common = {"guide": "tree", "preserve": ["a house"]}
    begin = uce(sd1, ["cat", "dog"], tokens="all", lamb=0.1, preserve_scale=0.5, **common)
    own, given = rece(sd1, ["cat", "dog"], **common), rece(sd1, ["cat", "dog"], start=begin, **common)
    a, b = (next(iter(edit.changes.values())) for edit in (own, given))
    torch.testing.assert_close(
        a.up @ a.down, b.up @ b.down, rtol=0, atol=1e-5 * float((a.up @ a.down).norm())
    )
    assert own.settings["start"] is None
    assert given.settings["start"] == {"method": "uce", "targets": ["cat", "dog"]}


def test_a_start_keeps_what_it_erased(sd1, tmp_path):
    path = tmp_path / "start.safetensors"
    uce(sd1, "house", tokens="all", guide="tree").save(path)
    edit = rece(sd1, "cat", guide="tree", start=Edit.load(path))
    assert edit.targets == ("house", "cat")


@pytest.mark.parametrize(
    ("preset", "ridge", "epochs", "guide"),
    [
        (None, 0.1, 1, " "),
        ("easy_object", 0.1, 1, " "),
        ("hard_object", 0.001, 1, " "),
        ("artist", 0.001, 1, "art"),
        ("nudity", 0.1, 3, " "),
        ("unsafe", 0.1, 2, " "),
    ],
)
def test_presets_are_the_papers_and_arguments_override_them(sd1, preset, ridge, epochs, guide):
    edit = rece(sd1, "cat", preset=preset)
    assert {"ridge": ridge, "epochs": epochs, "guide": [guide]}.items() <= edit.settings.items()
    assert len(edit.details["derived_norms"]) == len(edit.details["derived_residual"]) == epochs
    edit = rece(sd1, "cat", preset=preset, ridge=0.5, epochs=1, guide="dog")
    assert {"ridge": 0.5, "epochs": 1, "guide": ["dog"]}.items() <= edit.settings.items()


def test_a_ridge_bounds_the_derived_embeddings(sd1):
    strict, loose = (rece(sd1, ["cat", "dog"], guide="tree", ridge=ridge) for ridge in (1e-6, 1.0))
    for i in range(2):
        assert strict.details["derived_residual"][0][i] < 1e-3 < 0.1 < loose.details["derived_residual"][0][i]
        assert loose.details["derived_norms"][0][i] < 1 < strict.details["derived_norms"][0][i]
    json.dumps(strict.to_dict())


def test_more_epochs_than_the_equation_has_digits_for_are_refused():
    options = {"guide": ["box", "moon"], "regularizer": "surrogatereg"}
    assert rece(testbed.load(), ["ball", "fish"], epochs=1, **options).details["rank"] == 126
    with pytest.raises(ValueError, match=r"ridge: got 0\.1 with 'surrogatereg'|lamb: got 0\.1 with too few"):
        rece(testbed.load(), ["ball", "fish"], epochs=3, **options)


def test_an_edit_is_saved_and_comes_off(tmp_path):
    pipe = tiny_pipeline("sdxl")
    before = [weight.clone() for weight in projections(models.load(pipe)).values()]
    edit = rece(pipe, ["cat", "dog"], guide="tree", epochs=2)
    assert edit.details["rank"] <= 80
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    with loaded.on(pipe):
        assert not torch.equal(before[0], next(iter(projections(models.load(pipe)).values())))
    assert all(map(torch.equal, before, projections(models.load(pipe)).values()))


@pytest.mark.parametrize(
    ("concepts", "options", "message"),
    [
        ([], {}, "concepts: got 0, expected at least 1"),
        ("  ", {}, "concepts: got '  '"),
        (["cat", " Cat"], {}, "concepts: got 'cat' and ' Cat', expected each once"),
        ("cat", {"guide": "Cat"}, "guide: got 'Cat' for 'cat'"),
        (["cat", "dog"], {"guide": ["tree"]}, "guide: got 1"),
        ("cat", {"preserve": ["cat"]}, "preserve: got the concept 'cat' itself"),
        ("cat " * 90, {}, "longer than the text encoder takes"),
        ("cat", {"ridge": -1.0}, "ridge: got -1.0, expected a non-negative number"),
        ("cat", {"ridge": float("nan")}, "ridge: got nan"),
        ("cat", {"lamb": float("inf")}, "lamb: got inf"),
        ("cat", {"lamb": 0.0, "preserve_scale": 0.0, "ridge": 1e-9}, "lamb: got 0.0 with too few rows"),
        ("cat", {"erase_scale": -0.1}, "erase_scale: got -0.1"),
        ("cat", {"preserve_scale": -0.1}, "preserve_scale: got -0.1"),
        ("cat", {"epochs": 0}, "epochs: got 0, expected at least 1"),
        ("cat", {"preset": "object"}, "preset: got 'object', expected one of nudity, unsafe"),
        ("cat", {"regularizer": "none"}, "regularizer: got 'none', expected one of regzero"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(sd1, concepts, options, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        rece(sd1, concepts, **options)
    assert message in str(error.value)


def test_texts_that_are_no_strings_are_refused(sd1):
    with pytest.raises(TypeError, match="concepts: got a int"):
        rece(sd1, [3])


def test_a_start_that_does_not_fit_is_refused(sd1):
    with pytest.raises(ValueError, match="fingerprint"):
        rece(sd1, "cat", start=uce(tiny_pipeline("sd1", seed=1), "cat", guide="tree"))
    with pytest.raises(
        ValueError, match="start: got an edit by uce of 14 weights, expected one map for all 14"
    ):
        rece(sd1, "cat", start=uce(sd1, "cat", guide="tree", technique="tensor"))
    edit = uce(sd1, "cat", guide="tree")
    half = Edit(dict(list(edit.changes.items())[:7]), edit.base, "half", ("cat",))
    with pytest.raises(ValueError, match="of 7 weights"):
        rece(sd1, "cat", start=half)


def test_weights_that_are_not_finite_are_refused():
    pipe = tiny_pipeline("sd1")
    next(iter(models.load(pipe).cross_attention.values())).to_k.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        rece(pipe, "cat")


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_other_families_are_refused(family):
    with pytest.raises(UnsupportedModelError):
        rece(tiny_pipeline(family), "cat")


def test_neither_call_nor_error_changes_the_model(monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    pipe.text_encoder.requires_grad_(False)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

    def unchanged() -> bool:
        same = all(torch.equal(before[name], weight) for name, weight in pipe.unet.state_dict().items())
        trained = all(weight.requires_grad for weight in pipe.unet.parameters())
        frozen = not any(weight.requires_grad for weight in pipe.text_encoder.parameters())
        return same and trained and frozen and pipe.unet.training

    rece(pipe, "cat")
    assert unchanged()
    module = importlib.import_module("pumice.erase.rece")
    monkeypatch.setattr(module, "derived", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rece(pipe, "cat")
    assert unchanged()


def seen(pipe, *, prompts=None, embeds=None) -> list[str]:
    """What the reader sees in one picture for each prompt."""
    count = len(prompts or embeds)
    images = pipe(
        prompts,
        prompt_embeds=embeds,
        num_inference_steps=12,
        guidance_scale=5,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="pt",
    ).images
    return [scene.object for scene in testbed.load_reader().read(images)]


def test_finds_the_ball_that_uce_hides_and_erases_it_too():
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    start = uce(pipe, "ball", tokens="all", guide="box", lamb=0.1)
    edit = rece(pipe, "ball", guide="box", start=start)

    model = models.load(pipe)
    c = rows(pipe, "a ball")[0]
    change = next(iter(start.changes.values()))
    h = gram_of_weights(projections(model), c.device)
    new = derived(h, LinearMap(change.up.double(), change.down.double()), c, c, ridge=0.1)
    plain, hidden = (x.float().expand(8, -1, -1) for x in (c, new))
    scenes = [
        world.Scene("ball", colour, place)
        for colour in ("red", "yellow", "blue", "pink")
        for place in ("beach", "snow")
    ]
    captions = [world.full_caption(scene) for scene in scenes]
    with start.on(pipe):
        assert seen(pipe, embeds=plain).count("ball") == 0
        assert seen(pipe, embeds=hidden).count("ball") >= 7  # 8 measured
        left = seen(pipe, prompts=captions).count("ball")
    with edit.on(pipe):
        assert seen(pipe, embeds=hidden).count("ball") == 0
        assert seen(pipe, prompts=captions).count("ball") == 0 < left  # 2 of 8 for UCE


def test_says_that_a_hard_edit_hurts():
    with pytest.warns(ErasureWarning, match="of their norm"):
        rece(testbed.load(), "ball", guide="box", epochs=2)
