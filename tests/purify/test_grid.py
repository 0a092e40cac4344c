"""Pictures in boxes and out of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pumice.purify.grid import Grid


def picture(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(256, 256), (257, 300), (512, 512), (383, 641), (1024, 256), (1000, 1024)])
def test_boxes_of_a_picture_are_the_picture(size, corners):
    given, grid = picture(*size), Grid(*size, 256, 128, corners)
    boxes = grid.split(given)
    assert len(boxes) == len(grid) and all(box.shape == (3, 256, 256) for box in boxes)
    assert torch.equal(grid.merge(boxes), given)


def test_512_px_are_nine_boxes_and_the_corners():
    given, grid = picture(512, 512), Grid(512, 512, 256, 128)
    assert grid.places == [(top, left) for top in (0, 128, 256) for left in (0, 128, 256)]
    assert len(grid) == 10 and len(Grid(512, 512, 256, 128, corners=False)) == 9
    last = grid.split(given)[-1]
    assert torch.equal(last[:, :128, :128], given[:, :128, :128])
    assert torch.equal(last[:, :128, 128:], given[:, :128, -128:])
    assert torch.equal(last[:, 128:, :128], given[:, -128:, :128])
    assert torch.equal(last[:, 128:, 128:], given[:, -128:, -128:])


def test_the_last_box_ends_at_the_border():
    assert [left for _, left in Grid(256, 500, 256, 128).places] == [0, 128, 244]
    assert [left for _, left in Grid(256, 513, 256, 128).places] == [0, 128, 256, 257]


@pytest.mark.parametrize("size", [(512, 512), (300, 517)])
def test_the_mean_counts_boxes_and_once_more_in_the_corners(size):
    grid = Grid(*size, 256, 128)
    covering = torch.zeros(size, dtype=torch.int64)
    for top, left in grid.places:
        covering[top : top + 256, left : left + 256] += 1
    assert covering.min() >= 1
    ones = [torch.zeros(1, 256, 256) for _ in grid.places]
    found = grid.merge([*ones, torch.ones(1, 256, 256)])[0]  # the share that the corners' box has
    expected = torch.zeros(size)
    for rows in (slice(None, 128), slice(-128, None)):
        for columns in (slice(None, 128), slice(-128, None)):
            expected[rows, columns] = 1 / (covering[rows, columns] + 1)
    torch.testing.assert_close(found, expected)
