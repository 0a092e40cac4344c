"""Debias: both loops against dense normal equations layer by layer, and the trained testbed balanced."""

from __future__ import annotations

import pytest
import torch

from pumice import models, testbed
from pumice.erase.debias import debias
from pumice.models import UnsupportedModelError
from pumice.testbed import tiny_pipeline
from pumice.testbed.reader import ATTRIBUTES

FEW = {"images": 2, "num_inference_steps": 1, "guidance_scale": 2.0}


class Told:
    """Measures what it was told, one row of ratios a call, and remembers the pictures."""

    def __init__(self, *ratios):
        self.ratios, self.pictures = list(ratios), []

    def __call__(self, images):
        self.pictures.append(images)
        return torch.tensor([self.ratios[len(self.pictures) - 1]] * len(images))


def weights(pipe) -> dict[str, torch.Tensor]:
    parameters = dict(pipe.unet.named_parameters())
    return {
        f"{layer.name}.to_{letter}.weight": parameters[f"{layer.name}.to_{letter}.weight"].detach().clone()
        for layer in models.load(pipe).cross_attention.values()
        for letter in "kv"
    }


def embeds(pipe, text) -> tuple[torch.Tensor, int]:
    with torch.no_grad():
        found = models.load(pipe).encode_prompt(text)
    return found.embeds[0].double(), found.tokens[0].eos - 1


def normal_equations(w, pairs, kept, gamma, lamb):
    """W' = (lambda W + sum v c^T + gamma sum W p p^T) (lambda I + sum c c^T + gamma sum p p^T)^-1."""
    left = lamb * w
    right = lamb * torch.eye(w.shape[1], dtype=torch.float64)
    for v, c in pairs:
        left, right = left + v.T @ c, right + c.T @ c
    for p in kept:
        left, right = left + gamma * w @ p.T @ p, right + gamma * p.T @ p
    return left @ torch.linalg.inv(right)


def check_edited(pipe, edit, expected, tolerance=1e-5):
    before = weights(pipe)
    with edit.on(pipe):
        after = weights(pipe)
    assert set(edit.changes) == set(before)
    for name, weight in after.items():
        difference = expected(before[name].double()) - before[name].double()
        assert difference.norm() > 1e-3 * before[name].norm()
        found = weight.double() - before[name].double()
        assert (found - difference).norm() < tolerance * before[name].norm()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_coefficients_add_up_and_edit_the_original_weights(family):
    pipe = tiny_pipeline(family)
    measure = Told((0.9, 0.1), (0.8, 0.2), (0.75, 0.25), (0.3, 0.7))
    edit = debias(pipe, "doctor", ["man", "woman"], measure=measure, preserve="dog", max_iterations=3, **FEW)
    alpha = 0.4 + 0.3 + 0.25
    (c, last), (man, last_man), (woman, last_woman), (dog, last_dog) = (
        embeds(pipe, text) for text in ("doctor", "man", "woman", "dog")
    )
    c, dog = c[last][None], dog[last_dog][None]
    target = c + alpha * (woman[last_woman] - man[last_man])
    check_edited(pipe, edit, lambda w: normal_equations(w, [(target @ w.T, c)], [dog], 1.0, 0.5))
    assert edit.details["iteration"] == 3
    assert not edit.details["balanced"]
    torch.testing.assert_close(
        torch.tensor(edit.details["history"])[:, 0], torch.tensor(measure.ratios), rtol=0, atol=1e-6
    )
    assert len(set(edit.changes.values())) == 1
    assert edit.details["rank"] == 1
    assert edit.targets == ("doctor",)


def test_the_variant_of_2023_edits_what_it_has_edited():
    pipe = tiny_pipeline("sd1")
    # concepts in turn; the second one is balanced at first, then no longer
    told = [(0.9, 0.1), (0.52, 0.48), (0.85, 0.15), (0.2, 0.8), (0.7, 0.3), (0.45, 0.55)]
    edit = debias(
        pipe,
        ["doctor", "nurse"],
        ["man", "a woman"],
        measure=Told(*told, (0.5, 0.5), (0.0, 1.0)),
        variant="2023",
        tolerance=0.06,
        max_iterations=3,
        preserve="dog",
        lamb=0.1,
        **FEW,
    )
    assert edit.details["iteration"] == 2
    read = {text: embeds(pipe, text) for text in ("doctor", "nurse", "man", "a woman", "dog", "")}
    count = 77 - max(read[text][1] for text in ("doctor", "nurse", "man", "a woman"))
    row = {text: rows[last : last + count] for text, (rows, last) in read.items()}

    def expected(w):
        for step in (told[:2], told[2:4]):
            pairs, kept = [], [read["dog"][0], read[""][0]]
            for concept, ratios in zip(("doctor", "nurse"), step, strict=True):
                if max(abs(0.5 - ratio) for ratio in ratios) < 0.06:
                    kept.append(read[concept][0])
                    continue
                out = row[concept] @ w.T
                for attribute, ratio in zip(("man", "a woman"), ratios, strict=True):
                    u = row[attribute] @ w.T
                    out = out + 0.1 * (0.5 - ratio) * out.norm() * u / u.norm()
                pairs.append((out, row[concept]))
            w = normal_equations(w, pairs, kept, max(0.1, 1 / len(kept)), 0.1)
        return w

    check_edited(pipe, edit, expected)


@pytest.mark.parametrize("variant", ["2025", "2023"])
def test_a_balanced_model_is_left_to_the_bit(variant):
    pipe = tiny_pipeline("sd1")
    measure = Told((0.22, 0.78))
    edit = debias(
        pipe, "doctor", ["man", "woman"], measure=measure, desired=[0.25, 0.75], variant=variant, **FEW
    )
    assert len(measure.pictures) == 1
    assert edit.details["balanced"]
    before = weights(pipe)
    with edit.on(pipe):
        assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())
    assert edit.details["overall_change"] == 0


def test_a_concept_that_misses_nothing_keeps_its_reading():
    """Zero coefficients leave W at the concept, while the other one moves."""
    pipe = tiny_pipeline("sd1")
    measure = Told((0.5, 0.5), (0.9, 0.1), (0.5, 0.5), (0.5, 0.5))
    edit = debias(pipe, ["doctor", "nurse"], ["man", "woman"], measure=measure, lamb=1e-6, **FEW)
    (change,) = set(edit.changes.values())
    moved = {}
    for text in ("doctor", "nurse"):
        rows, last = embeds(pipe, text)
        moved[text] = float((change.up.double() @ (change.down.double() @ rows[last])).norm())
    assert moved["doctor"] < 1e-3 * moved["nurse"]


@pytest.mark.parametrize("variant", ["2025", "2023"])
def test_the_best_edit_is_returned_and_iterations_are_bounded(variant):
    pipe = tiny_pipeline("sd1")
    measure = Told((0.9, 0.1), (0.3, 0.7), (1.0, 0.0), (0.0, 1.0))
    arguments = {"attributes": ["man", "woman"], "variant": variant, **FEW}
    edit = debias(pipe, "doctor", measure=measure, max_iterations=3, **arguments)
    assert len(measure.pictures) == 4
    assert edit.details["iteration"] == 1
    once = debias(pipe, "doctor", measure=Told((0.9, 0.1), (0.3, 0.7)), max_iterations=1, **arguments)
    for name, change in once.changes.items():
        assert torch.equal(edit.changes[name].up, change.up)
    none = debias(pipe, "doctor", measure=Told((0.9, 0.1)), max_iterations=0, **arguments)
    assert none.details["overall_change"] == 0


def draw(pipe, prompt, seeds):
    return pipe(
        [prompt] * len(seeds),
        num_inference_steps=FEW["num_inference_steps"],
        guidance_scale=FEW["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images


def test_it_measures_what_the_edited_pipeline_draws_and_leaves_the_pipeline(monkeypatch):
    pipe = tiny_pipeline("sd1")
    pipe.scheduler.set_timesteps(7)
    remembered, before = dict(vars(pipe)), models.fingerprint(models.load(pipe))
    timesteps, training = pipe.scheduler.timesteps.clone(), pipe.unet.training
    measure = Told((1.0, 0.0), (0.4, 0.6), (0.7, 0.3))
    arguments = {"attributes": ["man", "woman"], "prompt": "a photo of a {}", "max_iterations": 1, "seed": 5}
    edit = debias(pipe, "doctor", measure=measure, **arguments, **FEW)
    assert vars(pipe).keys() == remembered.keys()
    assert all(vars(pipe)[name] is value for name, value in remembered.items())
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert pipe.unet.training == training
    assert models.fingerprint(models.load(pipe)) == before
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, "a photo of a doctor", (5, 6))
    with edit.hook(pipe):
        edited = draw(pipe, "a photo of a doctor", (5, 6))
    torch.testing.assert_close(measure.pictures[0], plain)
    torch.testing.assert_close(measure.pictures[1], edited)
    assert (plain - edited).abs().max() > 1e-4

    real = type(pipe).__call__

    def small(self, prompt, **arguments):
        if len(prompt) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(self, prompt, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", small)
    again = Told((1.0, 0.0), (0.4, 0.6))
    debias(pipe, "doctor", measure=again, **arguments, **FEW)
    torch.testing.assert_close(again.pictures[1], measure.pictures[1])


def test_winners_and_probabilities_are_shares():
    pipe = tiny_pipeline("sd1")
    arguments = {"max_iterations": 0, **FEW}
    found = [
        debias(pipe, "x", ["a", "b", "c"], measure=lambda _, told=told: told, **arguments)
        for told in (torch.tensor([2, 0]), torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 0.0]]))
    ]
    assert found[0].details["history"] == [[[0.5, 0.0, 0.5]]]
    torch.testing.assert_close(torch.tensor(found[1].details["history"]), torch.tensor([[[0.1, 0.15, 0.25]]]))
    for told in (
        torch.tensor([3, 0, 0]),
        torch.tensor([0, 3]),
        torch.tensor([-1, 0]),
        torch.ones(2, 2),
        torch.ones(2, 3),
        -torch.ones(2, 3),
        torch.full((2, 3), torch.nan),
        torch.zeros(2, 3, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="measure: returned"):
            debias(pipe, "x", ["a", "b", "c"], measure=lambda _, told=told: told, **arguments)
    with pytest.raises(TypeError, match="measure: returned a list"):
        debias(pipe, "x", ["a", "b", "c"], measure=lambda _: [0, 1], **arguments)


def test_bad_arguments_are_refused():
    pipe = tiny_pipeline("sd1")
    good = {"concepts": "cat", "attributes": ["red", "blue"], "measure": Told((0.5, 0.5)), **FEW}
    for match, arguments in {
        "variant: got '2024'": {"variant": "2024"},
        "tokens: got 'x'": {"tokens": "x"},
        "prompt: got 'a cat'": {"prompt": "a cat"},
        "images: got 0": {"images": 0},
        "num_inference_steps: got 0": {"num_inference_steps": 0},
        "max_iterations: got -1": {"max_iterations": -1},
        "guidance_scale: got -1": {"guidance_scale": -1},
        "erase_scale: got nan": {"erase_scale": float("nan")},
        "preserve_scale: got -1": {"preserve_scale": -1},
        "lamb: got -1": {"lamb": -1},
        "tolerance: got 0": {"tolerance": 0.0},
        "concepts: got 0": {"concepts": []},
        "attributes: got 1": {"attributes": ["red"]},
        "attributes: got 'red' and 'Red'": {"attributes": ["red", "Red"]},
        "attributes: got 'cat' for": {"attributes": ["red", "cat"]},
        "preserve: got the concept": {"preserve": ["Cat"]},
        "expected 2 shares": {"desired": [1.0]},
        "shares that add up to 1": {"desired": [0.5, 0.6]},
        "desired: got": {"desired": [float("nan"), 1.0]},
    }.items():
        with pytest.raises(ValueError, match=match) as error:
            debias(pipe, **(good | arguments))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="lamb: got 0"):
        debias(pipe, **(good | {"lamb": 0, "measure": Told((1.0, 0.0))}))
    for family in ("sd3", "flux"):
        with pytest.raises(UnsupportedModelError):
            debias(tiny_pipeline(family), **good)
    next(iter(models.load(pipe).cross_attention.values())).to_k.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        debias(pipe, **good)


@pytest.mark.parametrize(
    ("variant", "attributes", "concept"),
    [
        ("2023", ["a red ball", "a blue ball"], "a ball"),
        ("2025", ["a pink ball", "a blue ball"], "a red ball"),
    ],
)
def test_on_trained_weights_the_shares_come_closer(variant, attributes, concept):
    reader = testbed.load_reader()
    index = [ATTRIBUTES["colour"].index(colour) for colour in ("red", "blue")]
    edit = debias(
        testbed.load(),
        concept,
        attributes,
        measure=lambda images: reader(images)["colour"][:, index].softmax(1),
        images=4,
        num_inference_steps=8,
        guidance_scale=5,
        max_iterations=3,
        variant=variant,
        tokens="all",
    )
    history = edit.details["history"]
    before, after = (abs(history[i][0][0] - 0.5) for i in (0, edit.details["iteration"]))
    assert before > 0.1
    assert after < 0.75 * before
