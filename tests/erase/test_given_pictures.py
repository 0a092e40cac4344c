"""Erasers take tensors, PIL images and paths, and make the same edit of each."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pumice import models
from pumice.erase.concept_ablation import concept_ablation
from pumice.erase.embedding import learn_word
from pumice.erase.few_shot import few_shot
from pumice.erase.few_shot_ascent import few_shot_ascent
from pumice.erase.forget_me_not import forget_me_not
from pumice.erase.mace_lora import mace_lora
from pumice.testbed import tiny_pipeline

QUICK = {"steps": 1, "learning_rate": 1e-3, "allow_unknown": True}


def memorized(pipe, concept, images, **how):
    """The first picture is memorized, and all are the anchor's."""
    one = images[:1] if isinstance(images, torch.Tensor) else images[0]
    similar = {"similar": lambda images, one: (images == one).flatten(1).all(1).float()}
    given = {"preset": "memorization", "images": {"dog": images}, "memorized": one, **similar}
    edit = concept_ablation(pipe, concept, "dog", **given, **how)
    assert edit.details["too_similar"] == 1
    return edit


METHODS = {
    "few_shot": lambda *given, **how: few_shot(*given, word_steps=1, **how),
    "few_shot_ascent": few_shot_ascent,
    "forget_me_not": forget_me_not,
    "mace_lora": mace_lora,
    "concept_ablation": memorized,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Two pictures, black and white so that they are masks, too."""
    folder = tmp_path_factory.mktemp("pictures")
    white = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.7
    pil = [Image.fromarray(each.numpy()).convert("RGB") for each in white]
    for number, each in enumerate(pil):
        each.save(folder / f"{number}.png")
    tensors = white.float()[:, None].repeat(1, 3, 1, 1)
    return {"tensors": tensors, "pil": pil, "paths": sorted(folder.iterdir())}


def tensors(edit):
    return {
        f"{name}.{part}": value
        for name, change in edit.changes.items()
        for part, value in vars(change).items()
        if isinstance(value, torch.Tensor)
    }


def same(one, two):
    a, b = tensors(one), tensors(two)
    alike = one.settings == two.settings and a.keys() == b.keys()
    return alike and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_of_every_kind_the_edit_is_the_same(method, kinds):
    model, erase = models.load(tiny_pipeline("sd1")), METHODS[method]
    expected = erase(model, "cat", kinds["tensors"], **QUICK)
    assert same(erase(model, "cat", kinds["pil"], **QUICK), expected)
    assert same(erase(model, "cat", kinds["paths"], **QUICK), expected)


def test_of_several_concepts_each_has_its_own(kinds):
    model, (one, two) = models.load(tiny_pipeline("sd1")), kinds["paths"]
    expected = forget_me_not(model, ["cat", "dog"], [kinds["tensors"][:1], kinds["tensors"]], **QUICK)
    assert same(forget_me_not(model, ["cat", "dog"], [one, [one, two]], **QUICK), expected)


def test_masks_too(kinds):
    model = models.load(tiny_pipeline("sd1"))
    expected = mace_lora(model, "cat", kinds["tensors"], kinds["tensors"][:, 0], **QUICK)
    for kind in ("pil", "paths"):
        assert same(mace_lora(model, "cat", kinds[kind], kinds[kind], **QUICK), expected)
    everywhere = mace_lora(model, "cat", kinds["tensors"], **QUICK)
    assert not same(everywhere, expected)
    with pytest.raises(ValueError, match=r"^masks: got shape \(1, 32, 32\), expected \(2, 32, 32\)"):
        mace_lora(model, "cat", kinds["pil"], kinds["pil"][:1], **QUICK)
    with pytest.raises(ValueError, match=r"^masks: 'no.png' cannot be read"):
        mace_lora(model, "cat", kinds["pil"], "no.png", **QUICK)


def test_a_word(kinds):
    model = models.load(tiny_pipeline("sd1"))
    words = [learn_word(model, given, initial="cat", steps=1, batch_size=2) for given in kinds.values()]
    assert all(torch.equal(each.vectors[0], words[0].vectors[0]) for each in words)
