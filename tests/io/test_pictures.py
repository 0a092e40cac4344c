"""Pictures come in as they are meant to be seen."""

import numpy as np
import pytest
import torch
from PIL import Image

from pumice.io import read_image


def test_reads_what_was_saved(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.shape == (3, 5, 7) and found.dtype == torch.float32
    assert torch.equal((found * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (7, 5))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.shape == (3, 7, 5) and found[0, 0, 4] == 1 and found.sum() == 1


def test_grey_and_size(tmp_path):
    Image.new("L", (8, 4), 51).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", size=(2, 6))
    assert found.shape == (3, 2, 6)
    torch.testing.assert_close(found, torch.full((3, 2, 6), 0.2))


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_picture(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"pictures: '.*a.png' cannot be read"):
        read_image(tmp_path / "a.png")
