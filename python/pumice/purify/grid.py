"""A picture as overlapping boxes of a model's own size, and one picture of all its corners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Boxes of `side` px every `stride` px, the last ones flush with the border.

    Pictures that are smaller than a box are to be continued before.

    Attributes:
        height, width: of the picture, at least `side`.
        side, stride: of the boxes.
        corners: whether there is one more box, made of the four corners of side / 2 px: they are seen once
            more, with other neighbours.
    """

    height: int
    width: int
    side: int
    stride: int
    corners: bool = True

    @property
    def places(self) -> list[tuple[int, int]]:
        """(top, left) of the boxes."""
        return [(top, left) for top in self._starts(self.height) for left in self._starts(self.width)]

    def __len__(self) -> int:
        return len(self.places) + self.corners

    def split(self, picture: Tensor) -> list[Tensor]:
        """(3, height, width) to boxes (3, side, side)."""
        side, half = self.side, self.side // 2
        found = [picture[:, top : top + side, left : left + side] for top, left in self.places]
        if self.corners:
            rows = torch.cat((picture[:, :half], picture[:, -half:]), dim=1)
            found.append(torch.cat((rows[..., :half], rows[..., -half:]), dim=2))
        return found

    def merge(self, boxes: list[Tensor]) -> Tensor:
        """Boxes to the picture, the mean where several lie on a pixel; boxes that agree come back exactly."""
        side, half = self.side, self.side // 2
        total, count = self._zeros(boxes[0]), self._zeros(boxes[0])
        for (top, left), box in zip(self.places, boxes, strict=False):
            total[:, top : top + side, left : left + side] += box
            count[:, top : top + side, left : left + side] += 1
        if self.corners:
            for rows in (slice(None, half), slice(-half, None)):
                for columns in (slice(None, half), slice(-half, None)):
                    total[:, rows, columns] += boxes[-1][:, rows, columns]
                    count[:, rows, columns] += 1
        return (total / count).to(boxes[0])

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[0], self.height, self.width, dtype=torch.float64)

    def _starts(self, length: int) -> list[int]:
        starts = list(range(0, length - self.side, self.stride))
        return [*starts, length - self.side]
