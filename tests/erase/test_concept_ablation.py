"""Concept Ablation: the concept is drawn as its anchor, the anchor stays, and a memorized picture goes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from erase.toy import QUICK, S, Toy
from pumice import models, testbed
from pumice.erase.concept_ablation import SETTINGS, _pairs, concept_ablation
from pumice.models import Added, Edit, Shifted
from pumice.testbed import tiny_pipeline, world
from pumice.training import class_pictures, examples

STILL = {name: value for name, value in QUICK.items() if name != "pending"}  # no trajectories are drawn
ANCHOR_MEAN = -1.0  # of "two"


@pytest.fixture
def gaussian(monkeypatch):
    """Pictures of "two" of the toy world are latents; what is asked to be drawn is written down."""
    asked: dict[str, int] = {}

    class Pictures:
        def __init__(self, model, pictures, prompt):
            self._count = len(pictures)

        def __len__(self):
            return self._count

        def latents(self, index, draws, row, step):
            return ANCHOR_MEAN + S * draws.normal([row], "picture", step, (1, 2, 2))[0]

    def drawn(model, wanted, seed, folder, progress):
        asked.update({prompt: len(numbers) for prompt, numbers in wanted.items()})
        return {prompt: [torch.zeros(3, 2, 2)] * len(numbers) for prompt, numbers in wanted.items()}

    module = sys.modules["pumice.erase.concept_ablation"]  # the package may have the function by that name
    monkeypatch.setattr(module, "Examples", Pictures)
    monkeypatch.setattr(module, "drawn_pictures", drawn)
    return asked


class TestInAWorldOfGaussians:
    @pytest.mark.parametrize("target_model", ["pretrained", "student"])
    def test_the_concept_becomes_the_anchor_and_the_anchor_stays_to_the_bit(self, gaussian, target_model):
        toy = Toy()
        edit = concept_ablation(toy, "one", "two", target_model=target_model, **STILL)
        assert toy.mean("one", edit) == pytest.approx(toy.mean("two"), abs=1e-2)
        assert toy.mean("two", edit) == toy.mean("two")

    def test_the_denoising_loss_leads_to_where_the_pictures_are(self, gaussian):
        """Its optimum is the mean of the pictures; the noise of the loss stays, as does Adam's."""
        toy = Toy()
        edit = concept_ablation(toy, "one", "two", variant="noise", **STILL | {"batch_size": 8})
        assert toy.mean("one", edit) == pytest.approx(ANCHOR_MEAN, abs=0.25)

    def test_the_prior_holds_the_anchor_where_its_pictures_are(self, gaussian):
        """Also where the student is its own target."""
        toy = Toy(means=(1.5, -0.7))  # "two" answers not quite as its pictures say
        for target_model in ("pretrained", "student"):
            edit = concept_ablation(
                toy, "one", "two", target_model=target_model, prior_weight=1.0, **STILL | {"batch_size": 8}
            )
            assert toy.mean("two", edit) == pytest.approx(ANCHOR_MEAN, abs=0.25)
            goal = toy.mean("two", edit if target_model == "student" else None)
            assert toy.mean("one", edit) == pytest.approx(goal, abs=0.1)

    def test_no_more_is_drawn_than_is_reached(self, gaussian):
        concept_ablation(Toy(), "one", "two", steps=3, batch_size=2, learning_rate=0.1)
        assert gaussian == {"two": 6}
        concept_ablation(Toy(), "one", "two", steps=3, batch_size=2, learning_rate=0.1, num_images=4)
        assert gaussian == {"two": 4}

    def test_prompts_share_the_pictures(self, gaussian):
        concept_ablation(
            Toy(), "one", "two", prompts=["a {}", "the {}"], steps=5, batch_size=1, learning_rate=0.1
        )
        assert gaussian == {"a two": 3, "the two": 2}


@pytest.mark.parametrize(
    ("preset", "concept", "anchor", "prompts", "expected"),
    [
        ("object", "grumpy cat", "cat", "a photo of {}", ("a photo of cat", "a photo of grumpy cat")),
        ("style", "varga", "a painting", "{} of trees",
         ("a painting of trees", "a painting of trees, in the style of varga")),
        ("style", "varga", "", "trees", ("trees", "trees, in the style of varga")),
        ("memorization", "the caption", "a wording", "{}, large", ("a wording, large", "the caption")),
        ("nudity", "naked", "dressed", "a {} person", ("a dressed person", "a naked person")),
    ],
)  # fmt: skip
def test_what_is_learned_under_what(preset, concept, anchor, prompts, expected):
    (pair,) = _pairs(preset, [concept], anchor, prompts)
    assert (pair.anchor, pair.wanted) == expected


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


def pictures(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tiny(pipe, concept="cat", anchor="bird", **options) -> Edit:
    given = {"images": {"bird": pictures()}, "steps": 1, "learning_rate": 1e-3, "allow_unknown": True}
    return concept_ablation(pipe, concept, anchor, **given | options)


class TestOnATinyPipeline:
    @pytest.mark.parametrize(
        ("preset", "holds", "count"),
        [("object", (".attn2.to_k.", ".attn2.to_v."), 4), ("style", (".attn2.to_k.", ".attn2.to_v."), 4),
         ("nudity", (".attn1.", ".attn2."), 4), ("memorization", ("",), 2)],
    )  # fmt: skip
    def test_a_preset_is_what_trains_and_how(self, pipe, preset, holds, count):
        edit = concept_ablation(
            pipe, "cat", "bird", preset=preset, images={"bird": pictures()}, steps=1, allow_unknown=True,
            **({"memorized": 1 - pictures(1)} if preset == "memorization" else {}),
        )  # fmt: skip
        assert all(any(part in name for part in holds) for name in edit.changes)
        assert edit.settings["batch_size"] == count
        assert edit.settings["learning_rate"] == pytest.approx(SETTINGS[preset].learning_rate * count)
        assert edit.settings["prior_weight"] == (1.0 if preset == "memorization" else 0.0)
        full = preset == "memorization"
        assert full == any("conv" in name for name in edit.changes)

    def test_a_lora(self, pipe):
        edit = tiny(pipe, rank=2)
        assert edit.changes and all(isinstance(change, Added) for change in edit.changes.values())
        assert all(isinstance(change, Shifted) for change in tiny(pipe).changes.values())

    def test_the_student_is_its_own_target_whether_or_not_passes_are_shared(self, pipe):
        """A prior of no weight to speak of puts both prompts into one pass."""
        one, two = (
            tiny(pipe.to(torch.float64), target_model="student", prior_weight=weight) for weight in (0, 1e-30)
        )
        pipe.to(torch.float32)
        for name, change in one.changes.items():
            torch.testing.assert_close(change.delta, two.changes[name].delta, rtol=1e-4, atol=1e-7)

    def test_what_is_like_the_memorized_picture_is_left_out(self, pipe):
        given = pictures(4)
        options = {"preset": "memorization", "images": {"bird": given}, "batch_size": 1}
        assert tiny(pipe, memorized=1 - given[:1], **options).details["too_similar"] == 0
        assert tiny(pipe, memorized=given[2:3], **options).details["too_similar"] == 1
        edit = tiny(pipe, memorized=given[:1], similar=lambda a, b: a[:, 0, 0, 0], threshold=1.0, **options)
        assert (edit.details["images"], edit.details["too_similar"]) == (4, 0)
        with pytest.raises(ValueError, match=r"^prompts: got 4 anchor pictures, all 0\.5 or more similar"):
            tiny(pipe, memorized=given[:1], similar=lambda a, b: torch.ones(len(a)), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preset": "face"}, "preset: got 'face', expected one of object"),
            ({"variant": "both"}, "variant: got 'both'"),
            ({"target_model": "teacher"}, "target_model: got 'teacher'"),
            ({"anchor": "Cat "}, "anchors: got 'Cat ' for itself"),
            ({"anchor": ["bird", "tree"]}, "anchors: got 2, expected one, or one for each of 1"),
            ({"prompts": "a photo"}, "prompts: got 'a photo', expected one {}"),
            ({"images": {"dog": pictures()}}, "images: got none of 'bird'"),
            ({"images": {"bird": 2 * pictures()}}, r"images: got .* expected values in \[0, 1\]"),
            ({"images": {"bird": pictures()[0]}}, "images: got shape"),
            ({"memorized": pictures()}, "memorized, similar: got some, expected preset='memorization'"),
            ({"preset": "memorization", "memorized": pictures(2)}, "memorized: got 2 pictures, expected 1"),
            (
                {"preset": "memorization", "memorized": pictures(1, 16)},
                r"memorized: got sizes \[\(16, 16\), \(32, 32\)\], expected one size",
            ),
            ({"num_images": 0}, "num_images: got 0"),
            ({"prior_weight": -1.0}, "prior_weight: got -1.0"),
            ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
            ({"parameters": "text"}, "parameters: got 'text'"),
        ],
    )
    def test_bad_input(self, pipe, options, message):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            tiny(pipe, **options)
        assert "\n" not in str(caught.value)

    def test_bad_types(self, pipe):
        for options, message in (
            ({"images": pictures()}, "images: got a Tensor, expected pictures by anchor prompt"),
            ({"images": {"bird": [1]}}, r"images\[0\]: got a int, expected a PIL image or a path"),
            ({"anchor": [3]}, "anchors: got a int, expected strings"),
        ):
            with pytest.raises(TypeError, match=f"^{message}"):
                tiny(pipe, **options)

    def test_other_pictures_are_another_training(self, pipe, tmp_path):
        tiny(pipe, checkpoint=tmp_path)
        with pytest.raises(ValueError, match="is of another training: images was"):
            tiny(pipe, checkpoint=tmp_path, images={"bird": pictures(seed=1)})


def test_on_the_testbed_a_ball_is_drawn_as_a_box():
    """With pictures of the world itself, and the rate that so small a model wants."""
    pipe = testbed.load()
    rng = np.random.default_rng(0)
    boxes = [world.draw(world.Scene("box", "red", "beach", None), rng) for _ in range(8)]
    images = {"a box": torch.stack([torch.from_numpy(box) for box in boxes])}
    edit = concept_ablation(
        pipe, "a ball", "a box", images=images, steps=40, batch_size=4, learning_rate=4e-4
    )
    model = models.load(pipe)
    x = torch.randn(8, *model.latent_shape(), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def answer(text: str) -> Tensor:
        return model.predict_noise(x, 800, model.encode_prompt(text))

    ball, box, star = (answer(text) for text in ("a ball", "a box", "a star"))
    with edit.on(pipe):
        hidden, kept, other = (answer(text) for text in ("a ball", "a box", "a star"))
    apart = (ball - box).norm()
    assert (hidden - box).norm() < 0.6 * apart
    moved = (hidden - ball).norm()
    assert (kept - box).norm() < 0.7 * moved and (other - star).norm() < 0.4 * moved


def test_a_finished_checkpoint_has_the_pictures_that_were_drawn(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_STEPS", 1)
    how = {"images": None, "num_images": 2, "preset": "memorization", "steps": 2, "threshold": 1.0}
    first = tiny(pipe, checkpoint=tmp_path, **how)
    assert len(list(tmp_path.rglob("*.png"))) == 3
    monkeypatch.setattr(class_pictures, "save_lossless", None)  # nothing is left to be drawn
    again = tiny(pipe, checkpoint=tmp_path, **how)
    assert all(torch.equal(change.delta, again.changes[name].delta) for name, change in first.changes.items())
