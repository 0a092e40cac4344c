from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pumice.protect.random_noise import random_noise


def images(*shape: int) -> Tensor:
    return 0.25 + 0.5 * torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_every_value_uses_the_budget_up():
    clean = images(3, 3, 21, 33)
    change = random_noise(clean, eps=0.03) - clean
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.03), rtol=0, atol=1e-6)
    assert abs(change.sign().mean()) < 4 / change.numel() ** 0.5


def test_uniform_noise_fills_the_budget_evenly():
    clean = images(2, 3, 64, 64)
    share = (random_noise(clean, eps=0.03, kind="uniform") - clean) / 0.03
    assert share.abs().max() <= 1 + 1e-5
    counts = torch.histc(share, bins=10, min=-1, max=1) / share.numel()
    assert (counts - 0.1).abs().max() < 0.01


def test_neither_pictures_nor_channels_share_their_noise():
    clean = images(2, 3, 64, 64)
    signs = (random_noise(clean, eps=0.03) - clean).sign().flatten(2).flatten(0, 1)
    correlation = signs @ signs.T / signs.shape[1]
    assert (correlation - torch.eye(6)).abs().max() < 0.08


def test_a_batch_is_its_pictures_alone():
    clean = images(3, 3, 16, 8)
    batch = random_noise(clean, eps=0.1, seed=5)
    alone = [random_noise(clean[i : i + 1], eps=0.1, seed=5 + i) for i in range(3)]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(batch, random_noise(clean, eps=0.1, seed=[5, 6, 7]))
    assert not torch.equal(batch, random_noise(clean, eps=0.1, seed=50))


def test_colours_stay_in_range_and_the_mask_holds():
    clean = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    noisy = random_noise(clean, eps=0.2)
    assert noisy.min() == 0 and noisy.max() == 1
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    masked = random_noise(clean, eps=0.2, mask=mask)
    assert torch.equal(masked[..., mask == 0], clean[..., mask == 0])
    assert torch.equal(masked[..., mask == 1], noisy[..., mask == 1])


def test_files_and_pil_images_of_any_size(tmp_path):
    pixels = np.random.default_rng(0).integers(20, 235, (13, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    grey = Image.new("L", (50, 1), 128)
    noisy, noisy_grey = random_noise([tmp_path / "photo.png", grey], eps=0.025)  # 6.375 levels
    change = np.array(noisy, int) - pixels
    assert noisy.size == (7, 13) and noisy_grey.size == (50, 1)
    assert set(np.unique(change)) == {-6, 6}
    assert set(np.unique(np.array(noisy_grey))) == {122, 134}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 8}, ValueError, r"eps: got 8, expected 0 to 1.*8/255"),
        ({"eps": 0.1, "kind": "normal"}, ValueError, "kind: got 'normal'"),
        ({"eps": 0.1, "seed": [1, 2]}, ValueError, "seed: got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        random_noise(images(1, 3, 8, 8), **arguments)
