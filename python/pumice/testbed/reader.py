"""The attribute reader: tells object, colour, place and style of a picture of the testbed's world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pumice.testbed import world

ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "object": tuple(world.OBJECTS),
    "colour": tuple(world.COLOURS),
    "place": tuple(world.PLACES),
    "style": (None, *world.STYLES),
}


class Reader(nn.Module):
    """A small convolutional classifier with one head for each attribute.

    `forward` takes pictures (B, 3, 64, 64) in [0, 1] and returns logits by attribute name.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width)
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 3, stride=stride, padding=1)
            )
            for before, after, stride in [
                (widths[0], widths[0], 1),
                (widths[0], widths[1], 2),
                (widths[1], widths[1], 1),
                (widths[1], widths[2], 2),
                (widths[2], widths[2], 1),
            ]
        )
        self.norm = nn.GroupNorm(8, widths[2])
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * widths[2], len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.stem(images * 2 - 1)
        for stage in self.stages:
            new = stage(hidden)
            hidden = hidden + new if new.shape == hidden.shape else new
        hidden = F.silu(self.norm(hidden))
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[world.Scene]:
        """The likeliest scene of each picture."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return [
            world.Scene(**{name: ATTRIBUTES[name][best[name][i]] for name in ATTRIBUTES})
            for i in range(len(images))
        ]

    def accuracy(self, images: Tensor, scenes: Sequence[world.Scene]) -> dict[str, float]:
        """By attribute, the share of the pictures that show what their scene says."""
        seen = self.read(images)
        return {
            name: sum(getattr(a, name) == getattr(b, name) for a, b in zip(seen, scenes, strict=True))
            / len(scenes)
            for name in ATTRIBUTES
        }


def targets(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """Class indices of scenes by attribute name."""
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        for name, values in ATTRIBUTES.items()
    }
