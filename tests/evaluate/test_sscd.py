import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pumice.evaluate.sscd import sscd


class Descriptor(torch.nn.Module):
    """Of the form of SSCD: one vector a picture, here the means of an 8 x 8 grid of the whole input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


class Picture(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save(network, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(Descriptor(), tmp_path_factory.mktemp("sscd") / "sscd.torchscript.pt")


def smooth(count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for _ in range(count)
    ]
    return small, torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in small])


OFFICIAL = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))


def by_pil(picture, mode):
    """torchvision's transforms, written out."""
    if mode == "official":
        mean, std = OFFICIAL
        picture = picture.resize((320, 320), Image.Resampling.BILINEAR)
    else:
        mean = std = np.full(3, 0.5)
        width, height = picture.size
        scale = 256 / min(width, height)
        picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        left, top = (round((side - 224) / 2) for side in picture.size)
        picture = picture.crop((left, top, left + 224, top + 224))
    x = (np.asarray(picture, np.float64) / 255 - mean) / std
    side = x.shape[0] // 8
    descriptor = x.reshape(8, side, 8, side, 3).mean((1, 3)).transpose(2, 0, 1).flatten()
    return descriptor / np.linalg.norm(descriptor)


@pytest.mark.parametrize("size", [(64, 64), (500, 381), (120, 480)])
@pytest.mark.parametrize("mode", ["official", "wen"])
def test_it_is_the_cosine_of_descriptors_of_pictures_prepared_as_by_pil(path, mode, size):
    pictures, images = smooth(3, *size)
    expected = np.stack([by_pil(picture, mode) for picture in pictures])
    found = sscd(path, mode=mode)(images, images[:2])
    assert found.shape == (3, 2) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected @ expected[:2].T, atol=2e-3)


def test_copies_are_found_at_any_size_and_batch(path):
    _, images = smooth(7, 96, 96)
    larger = torch.nn.functional.interpolate(images, 192, mode="bilinear")
    one = sscd(path, batch_size=1)(images, larger)
    torch.testing.assert_close(sscd(path, batch_size=3)(images, larger), one)
    assert one.argmax(1).tolist() == list(range(7)) and one.diagonal().min() > 0.999 > one.max() - 0.01


def test_out_of_memory_halves_the_batch(path, monkeypatch):
    _, images = smooth(4, 32, 32)
    similarity = sscd(path, batch_size=4)
    expected, cat = similarity(images, images), torch.cat

    def small(parts, *rest):
        if max(len(part) for part in parts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cat(parts, *rest)

    monkeypatch.setattr(torch, "cat", small)
    torch.testing.assert_close(similarity(images, images), expected)


def test_other_files_are_refused_in_one_line(tmp_path):
    weights, text = tmp_path / "weights.pt", tmp_path / "notes.txt"
    torch.save({"a": torch.ones(1)}, weights)
    text.write_text("hello")
    for path, message in (
        (weights, "is not a TorchScript file"),
        (text, "is not a TorchScript file"),
        (tmp_path, "is not a file"),
        (tmp_path / "missing.pt", "is not a file"),
    ):
        with pytest.raises(ValueError, match=rf"^path: .* {message}") as caught:
            sscd(path)
        assert "\n" not in str(caught.value)


def test_other_networks_are_refused(tmp_path):
    similarity = sscd(save(Picture(), tmp_path / "picture.pt"))
    with pytest.raises(ValueError, match=r"^path: .* is not a network that returns one vector a picture"):
        similarity(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


BAD = {
    "bytes": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"^a: got torch.uint8"),
    "a list": ([1], TypeError, "^a: got list"),
    "a single picture": (torch.zeros(3, 8, 8), ValueError, r"^a: got shape \(3, 8, 8\), expected"),
    "no picture": (torch.zeros(0, 3, 8, 8), ValueError, r"^a: got shape \(0, 3, 8, 8\), expected"),
    "values up to 255": (torch.full((1, 3, 8, 8), 255.0), ValueError, "^a: got 255 to 255, expected values"),
    "a NaN": (torch.full((1, 3, 8, 8), float("nan")), ValueError, "^a: got NaN"),
}


@pytest.mark.parametrize(("images", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_pictures(path, images, error, message):
    good = torch.rand(1, 3, 8, 8)
    with pytest.raises(error, match=message):
        sscd(path)(images, good)
    with pytest.raises(error, match=message.replace("^a", "^b")):
        sscd(path)(good, images)


def test_bad_settings(path):
    with pytest.raises(ValueError, match="mode: got 'nemo', expected one of official, wen"):
        sscd(path, mode="nemo")
    with pytest.raises(ValueError, match="batch_size: got 0"):
        sscd(path, batch_size=0)
