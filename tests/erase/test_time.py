"""TIME: which token becomes which, the closed form against explicit inverses, and what is drawn then."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from pumice import models, testbed
from pumice.erase.edits import projections
from pumice.erase.time import AUGMENTATIONS, corresponding, time
from pumice.models import UnsupportedModelError
from pumice.testbed import tiny_pipeline, world

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")


@pytest.fixture(scope="module")
def sd1():
    """For tests that leave it as it is."""
    return tiny_pipeline("sd1")


def places(source: str, destination: str) -> list[int]:
    return corresponding(*models.load(tiny_pipeline("sd1")).tokenize([source, destination]))


def test_words_that_the_destination_adds_are_left_out():
    #            BOS the dog   BOS the big red dog
    assert places("the dog", "the big red dog") == [0, 1, 4, *range(5, 77), 76, 76]
    assert places("dog", "a dog on the dog")[:3] == [0, 2, 6]  # the first one, and EOS


def test_both_articles_are_one():
    assert places("an car", "a big car")[:4] == [0, 1, 3, 4]
    assert places("a car", "an red car")[:4] == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="destinations: got 'the red car' for 'a car'"):
        places("a car", "the red car")


def test_other_words_correspond_by_their_place():
    assert places("a photo of a cat", "a photo of a dog") == list(range(77))
    assert places("red cat", "dog tree") == list(range(77))


def test_pieces_of_words_correspond_from_their_end():
    model = models.load(tiny_pipeline("sd1"))
    source, destination = model.tokenize(["a bull", "a cat"])  # b u l l
    assert len(source.words[1].positions) == 4
    assert corresponding(source, destination)[:8] == [0, 1, 2, 2, 2, 2, 3, 4]
    back = corresponding(destination, source)
    assert back[:5] == [0, 1, 5, 6, 7] and len(back) == 77 and back[-4:] == [76] * 4


@pytest.mark.parametrize("destination", ["a photo of a dog", "dog", ""])
def test_prompts_that_correspond_in_no_way_are_refused(destination):
    with pytest.raises(ValueError, match="expected its words with others added, or as many words"):
        places("a cat", destination)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("templates", [(), AUGMENTATIONS])
def test_solves_each_layers_own_equation(monkeypatch, family, templates):
    pipe = tiny_pipeline(family)
    model = models.load(pipe)
    before = {name: weight.double() for name, weight in projections(model).items()}
    module, maps = importlib.import_module("pumice.erase.time"), []
    real = module.edit_of

    def edit_of(model, found, **about):
        maps.extend(found.values())  # before they are rounded to float32
        return real(model, found, **about)

    monkeypatch.setattr(module, "edit_of", edit_of)
    sources, destinations = ["a cat", "house on the sea"], ["a red cat", "house by the beach"]
    edit = time(pipe, sources, destinations, lamb=0.3, templates=templates)

    eye = torch.eye(next(iter(before.values())).shape[1], dtype=torch.float64)
    a, rights = 0.3 * eye, {name: 0.3 * weight for name, weight in before.items()}
    for source, destination in zip(sources, destinations, strict=True):
        for template in ("{}", *templates):
            pair = [template.format(source), template.format(destination)]
            with torch.no_grad():
                c, g = model.encode_prompt(pair).embeds.double()
            g = g[corresponding(*model.tokenize(pair))]
            a = a + c.T @ c
            rights = {name: right + (g @ before[name].T).T @ c for name, right in rights.items()}
    expected = {name: right @ torch.linalg.inv(a) for name, right in rights.items()}

    assert len(maps) == len(before) and all(found is maps[0] for found in maps)
    for name, weight in before.items():
        norm = float(expected[name].norm())
        torch.testing.assert_close(weight @ maps[0].dense(), expected[name], rtol=0, atol=1e-10 * norm)
    assert edit.method == "time" and edit.targets == tuple(sources) and edit.changes.keys() == before.keys()
    assert edit.settings == {
        "destinations": destinations,
        "lamb": 0.3,
        "templates": ["{}", *templates],
    }
    json.dumps(edit.to_dict())
    with edit.on(pipe):
        for name, weight in projections(model).items():
            norm = float(expected[name].norm())
            torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-5 * norm)
    assert all(torch.equal(before[name], weight.double()) for name, weight in projections(model).items())


def test_a_great_ridge_is_no_edit(sd1):
    edit = time(sd1, "a cat", "a red cat", lamb=1e12)
    assert edit.details["overall_change"] < 1e-8 and edit.details["residual"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("sources", "destinations", "options", "message"),
    [
        ([], [], {}, "sources: got 0, expected at least 1"),
        ("", "a cat", {}, "sources: got ''"),
        (["a cat", "A  cat"], "a red cat", {}, "sources: got 'a cat' and 'A  cat', expected each once"),
        ("a cat", "a Cat", {}, "destinations: got 'a Cat' for 'a cat'"),
        (["a cat", "a dog"], ["a red cat"], {}, "destinations: got 1"),
        ("a cat", " ", {}, "destinations: got ' ' for 'a cat'"),
        ("cat " * 90, "dog " * 90, {}, "longer than the text encoder takes"),
        ("cat", "cat " * 90, {}, "destinations: 'cat cat"),
        ("a cat", "a red cat", {"lamb": 0.0}, "lamb: got 0.0, expected a positive number"),
        ("a cat", "a red cat", {"lamb": float("nan")}, "lamb: got nan"),
        ("a cat", "a red cat", {"templates": ["a photo"]}, "templates: got 'a photo'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(sd1, sources, destinations, options, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        time(sd1, sources, destinations, **options)
    assert message in str(error.value)


def test_what_is_no_list_of_strings_is_refused(sd1):
    with pytest.raises(TypeError, match="sources: got a int"):
        time(sd1, [3], "a cat")
    with pytest.raises(TypeError, match="templates: got a str"):
        time(sd1, "a cat", "a red cat", templates="a photo of {}")


def test_weights_that_are_not_finite_are_refused():
    pipe = tiny_pipeline("sd1")
    next(iter(models.load(pipe).cross_attention.values())).to_v.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="is not finite"):
        time(pipe, "a cat", "a red cat")


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_other_families_are_refused(family):
    with pytest.raises(UnsupportedModelError):
        time(tiny_pipeline(family), "a cat", "a red cat")


def test_replaces_a_word_and_says_what_was_left_open():
    pipe, reader = testbed.load(), testbed.load_reader()
    pipe.set_progress_bar_config(disable=True)

    def seen(prompts: list[str]) -> list[world.Scene]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        options = {"num_inference_steps": 12, "guidance_scale": 5, "output_type": "pt"}
        return reader.read(pipe(prompts, generator=generators, **options).images)

    scenes = [
        world.Scene("ball", colour, place)
        for colour in ("red", "yellow", "blue", "pink")
        for place in ("beach", "snow")
    ]
    captions = [world.full_caption(scene) for scene in scenes]
    assert [scene.object for scene in seen(captions)].count("ball") == 8
    with time(pipe, "a photo of a ball", "a photo of a box").on(pipe):
        assert [scene.object for scene in seen(captions)].count("ball") == 0

    before = [scene.colour for scene in seen(["a star"] * 8)].count("blue")
    with time(pipe, "a star", "a blue star").on(pipe):
        after = seen(["a star"] * 8)
    assert before <= 4 and [scene.colour for scene in after].count("blue") >= 7
    assert [scene.object for scene in after].count("star") >= 6  # 7 measured
