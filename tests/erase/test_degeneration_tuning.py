"""Degeneration-Tuning: what a scrambled grid keeps and loses, and what is learned from it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from erase.toy import QUICK, S, Toy
from pumice.erase.degeneration_tuning import degeneration_tuning, scrambled_grid
from pumice.testbed import tiny_pipeline

STILL = {name: value for name, value in QUICK.items() if name != "pending"}  # no trajectories are drawn


def patches(picture: Tensor, grid: int) -> list[bytes]:
    height, width = (side // grid for side in picture.shape[1:])
    cut = picture.unfold(1, height, height).unfold(2, width, width)  # (3, grid, grid, h, w)
    return [
        cut[:, row, column].contiguous().numpy().tobytes() for row in range(grid) for column in range(grid)
    ]


class TestScrambledGrid:
    @pytest.mark.parametrize(("grid", "size"), [(2, (8, 8)), (4, (16, 32)), (8, (8, 24))])
    def test_it_is_a_permutation_of_the_patches(self, grid, size):
        images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
        found = scrambled_grid(images, grid)
        assert found.shape == images.shape
        for before, after in zip(images, found, strict=True):
            assert sorted(patches(before, grid)) == sorted(patches(after, grid))
            assert patches(before, grid) != patches(after, grid)

    def test_each_picture_and_each_seed_has_its_order(self):
        images = torch.rand(1, 3, 32, 32).repeat(2, 1, 1, 1)
        found = scrambled_grid(images)
        assert not torch.equal(found[0], found[1])
        assert torch.equal(found, scrambled_grid(images)) and not torch.equal(
            found, scrambled_grid(images, seed=1)
        )
        assert torch.equal(found[:1], scrambled_grid(images[:1]))

    def test_of_one_patch_it_is_the_picture(self):
        images = torch.rand(2, 3, 6, 6)
        assert torch.equal(scrambled_grid(images, 1), images)

    def test_low_frequencies_go_and_the_power_stays(self):
        """Of a slow wave; what is finer than a patch stays where it was in the spectrum."""
        x = torch.linspace(0, 1, 65)[:-1]
        slow, fine = (0.5 + 0.4 * torch.sin(2 * torch.pi * k * x) for k in (1, 16))
        for wave, low, high in ((slow, 0.0, 0.4), (fine, 0.99, 1.01)):
            before = wave.expand(16, 3, 64, 64)
            after = scrambled_grid(before, 8)
            spectrum = [torch.fft.fft2(each - each.mean()).abs().square() for each in (before, after)]
            assert float(spectrum[0].sum()) == pytest.approx(float(spectrum[1].sum()), rel=1e-4)
            k = int(spectrum[0][0, 0, 0, :33].argmax())
            share = float(spectrum[1][:, :, 0, k].mean() / spectrum[0][:, :, 0, k].mean())
            assert low <= share <= high

    @pytest.mark.parametrize(
        ("grid", "message"), [(3, "grid: got 3 for pictures of 32x32"), (0, "grid: got 0")]
    )
    def test_grids_that_do_not_fit(self, grid, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            scrambled_grid(torch.rand(1, 3, 32, 32), grid)


@pytest.fixture
def gaussian(monkeypatch):
    """In the toy world, scrambled pictures are N(0.4, s^2) and others N(-1, s^2), of which "two" is one."""
    module = sys.modules["pumice.erase.degeneration_tuning"]  # the package may have the function by that name

    class Pictures:
        def __init__(self, model, pictures, prompt, *, weight):
            self.prompt, self.weight = prompt, weight
            self._mean = float(pictures[0].mean())

        def latents(self, index, draws, row, step):
            return self._mean + S * draws.normal([row], "picture", step, (1, 2, 2))[0]

    monkeypatch.setattr(module, "Examples", Pictures)
    monkeypatch.setattr(module, "scrambled_grid", lambda images, grid, seed: images + 1.4)
    monkeypatch.setattr(module, "_check_grid", lambda *_: None)
    monkeypatch.setattr(
        module,
        "drawn_pictures",
        lambda model, wanted, seed, folder, progress: {
            text: [torch.full((3, 2, 2), -1.0)] * len(numbers) for text, numbers in wanted.items()
        },
    )


class TestInAWorldOfGaussians:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_the_concept_becomes_its_scrambled_pictures_and_the_others_stay(self, gaussian, batch_size):
        """The noise of the loss stays, as does Adam's; with an odd batch, kinds of rows take turns."""
        toy = Toy()
        how = STILL | {"batch_size": batch_size, "steps": 300, "learning_rate": 0.05}
        edit = degeneration_tuning(toy, "one", prior_prompts="two", parameters="xattn", **how)
        assert toy.mean("one", edit) == pytest.approx(0.4, abs=0.4)
        assert toy.mean("two", edit) == pytest.approx(-1.0, abs=0.4)

    def test_without_a_prior_the_others_are_not_read(self, gaussian):
        toy = Toy()
        edit = degeneration_tuning(toy, "one", prior_prompts="two", prior_weight=0.0, **STILL | {"steps": 20})
        assert toy.mean("two", edit) == toy.mean("two") and toy.mean("one", edit) < 1.2


def test_what_is_drawn_and_learned(monkeypatch):
    """Of each prompt its share, as many as are reached; scrambled for the concept alone."""
    module, asked, met = sys.modules["pumice.erase.degeneration_tuning"], [], []
    real = module.scrambled_grid

    def drawn(model, wanted, seed, folder, progress):
        asked.append(({text: [*numbers] for text, numbers in wanted.items()}, seed))
        return {text: [*torch.rand(len(numbers), 3, 32, 32)] for text, numbers in wanted.items()}

    monkeypatch.setattr(module, "drawn_pictures", drawn)
    monkeypatch.setattr(module, "scrambled_grid", lambda *args: met.append(args) or real(*args))
    edit = degeneration_tuning(
        tiny_pipeline("sd1"), "cat", prompts=["a {}", "the {}"], prior_prompts="a dog", steps=3, batch_size=2,
        grid=4, allow_unknown=True, learning_rate=1e-3,
    )  # fmt: skip
    assert asked == [({"a cat": [0, 1], "the cat": [2]}, 0), ({"a dog": [0, 1, 2]}, 1)]
    assert [(len(images), grid) for images, grid, _ in met] == [(2, 4), (1, 4)]
    assert edit.details["images"] == 6 and edit.settings["parameters"] == "full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a photo"]}, "prompts: got 'a photo', expected templates with one {}"),
        ({"prompts": "a photo"}, "prompts: got 'a photo', expected templates with one {}"),
        ({"prompts": []}, "prompts: got 0, expected at least 1"),
        ({"prior_prompts": " Cat"}, "prior_prompts: got 'cat', which is to be erased"),
        ({"prior_prompts": []}, "prior_prompts: got 0"),
        ({"grid": 1}, "grid: got 1, expected at least 2"),
        ({"grid": 7}, "grid: got 7 for pictures of 32x32, expected a divisor of both"),
        ({"num_images": 0}, "num_images: got 0"),
        ({"prior_weight": -1.0}, "prior_weight: got -1.0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        degeneration_tuning(tiny_pipeline("sd1"), "cat", allow_unknown=True, **options)
    assert "\n" not in str(caught.value)
