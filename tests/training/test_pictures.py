"""Pictures of every kind are one to what learns them, and each is met as often as the others."""

import hashlib

import pytest
import torch
from PIL import Image

from pumice import models
from pumice.models.draws import Draws
from pumice.testbed import tiny_pipeline
from pumice.training.pictures import check_one_size, digest, in_turn, learnable, of_each


@pytest.fixture(scope="module")
def model():
    return models.load(tiny_pipeline("sd1"))


def levels(height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)


def image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def test_a_tensor_a_pil_image_and_a_file_are_the_same_picture(model, tmp_path):
    pixels = levels(32, 32)
    image(pixels).save(tmp_path / "a.png")
    expected = pixels / 255
    file = tmp_path / "a.png"
    for given in (expected[None], image(pixels), [image(pixels)], file, str(file)):
        (found,) = learnable(given, model)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_files_are_cut_to_the_models_size_and_tensors_stay(model):
    ramp = torch.linspace(0, 255, 48).round().to(torch.uint8).expand(3, 32, 48)
    assert torch.equal(learnable(image(ramp), model)[0], ramp[:, :, 8:40] / 255), "the middle"
    assert torch.equal(learnable(image(ramp.mT), model)[0], ramp[:, :, 8:40].mT / 255)
    (halved,) = learnable(image(ramp.repeat_interleave(2, 1).repeat_interleave(2, 2)), model)
    # antialiased: the neighbours' part at each edge of what was doubled
    torch.testing.assert_close(halved, ramp[:, :, 8:40] / 255, rtol=0, atol=6 / 255)
    assert learnable(torch.rand(2, 3, 16, 24, dtype=torch.float64), model)[0].shape == (3, 16, 24)


ONE, TWO = torch.zeros(1, 3, 32, 32), torch.ones(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (TWO, 1, [TWO]),
        ([TWO], 1, [TWO]),
        ("a.png", 1, ["a.png"]),
        (["a.png", "b.png"], 1, [["a.png", "b.png"]]),
        ([["a.png", "b.png"]], 1, [["a.png", "b.png"]]),
        ([ONE, TWO], 2, [ONE, TWO]),
        (["a.png", ["b.png", "c.png"]], 2, ["a.png", ["b.png", "c.png"]]),
    ],
)
def test_what_belongs_to_which_concept(given, count, expected):
    found = of_each(given, ["cat", "dog"][:count])
    pairs = zip(found, expected, strict=True)
    assert len(found) == count and all(one is two or one == two for one, two in pairs)


@pytest.mark.parametrize(("given", "count"), [([ONE, TWO], 1), (TWO, 2), ("a.png", 2), (["a.png"] * 3, 2)])
def test_others_than_one_for_each_are_refused(given, count):
    got = len(given) if isinstance(given, list) else 1
    with pytest.raises(ValueError, match=f"^masks: got {got}, expected some for each of {count} concepts$"):
        of_each(given, ["cat", "dog"][:count], "masks")


def test_sizes_that_differ_are_refused():
    check_one_size([*TWO, *ONE])
    with pytest.raises(ValueError, match=r"^images: got sizes \[\(16, 16\), \(32, 32\)\], expected one"):
        check_one_size([*TWO, torch.zeros(3, 16, 16)])


def test_a_digest_is_of_shapes_and_values():
    one = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    content = b"".join(b"(3, 4, 6)" + each.numpy().tobytes() for each in one)
    assert digest(one) == digest(list(one)) == hashlib.sha256(content).hexdigest()
    assert digest(one) == digest(one.contiguous(memory_format=torch.channels_last))
    others = (one[:1], one.flip(0), one.reshape(2, 3, 6, 4), one + 1e-6)
    assert len({digest(one), *map(digest, others)}) == 5


def test_every_picture_has_its_turn_in_each_round():
    draws = Draws(["0"], "cpu")
    turns = [in_turn(draws, "order", turn, 5) for turn in range(15)]
    rounds = [turns[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(each) == list(range(5)) for each in rounds) and len(set(map(tuple, rounds))) > 1
