"""Who is on a picture of the testbed's world, and how clean it is: the judges of personalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pumice.testbed import world

EMBEDDING = 64
NOTICEABLE = 4 / 255  # standard deviation that the contrast is measured by, besides the picture's own


class IdentityNet(nn.Module):
    """A small convolutional network: an embedding by which creatures are recognized, and a quality score.

    Trained on creatures other than the subjects, so that it knows those as ArcFace knows a face it has not
    seen. `forward` takes pictures (B, 3, 64, 64) in [0, 1] and returns embeddings (B, 64) of length one and
    the logits (B,) of the quality.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 80)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Conv2d(6, first, 5, stride=2, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 3, stride=stride, padding=1)
            )
            for before, after, stride in [
                (first, first, 1),
                (first, second, 2),
                (second, second, 1),
                (second, third, 2),
                (third, third, 1),
            ]
        )
        self.norm = nn.GroupNorm(8, third)
        self.embedding = nn.Linear(2 * third, EMBEDDING)
        # Damage is seen in the fine texture, so the quality looks at every stage.
        self.quality_head = nn.Sequential(
            nn.Linear(4 * (first + second + third), 16), nn.SiLU(), nn.Linear(16, 1)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(torch.cat([images * 2 - 1, _contrast(images)], dim=1))
        texture = [_pool(F.silu(hidden))]
        for stage in self.stages:
            new = stage(hidden)
            hidden = hidden + new if new.shape == hidden.shape else new
            texture.append(_pool(F.silu(hidden)))
        embeddings = self.embedding(_pool(F.silu(self.norm(hidden))))
        return F.normalize(embeddings, dim=1), self.quality_head(torch.cat(texture, dim=1)).squeeze(1)

    @torch.no_grad()
    def identity_score(self, images: Tensor, references: Tensor) -> Tensor:
        _check(images, "images")
        _check(references, "references")
        mean = self(references)[0].mean(0)
        return F.cosine_similarity(self(images)[0], mean[None])

    @torch.no_grad()
    def quality(self, images: Tensor) -> Tensor:
        _check(images, "images")
        return self(images)[1].sigmoid()


def _contrast(images: Tensor) -> Tensor:
    """Difference to the local mean in local standard deviations: faint patterns show in flat parts, too."""
    mean = F.avg_pool2d(images, 7, stride=1, padding=3, count_include_pad=False)
    difference = images - mean
    variance = F.avg_pool2d(difference.square(), 7, stride=1, padding=3, count_include_pad=False)
    # 1e-8: the root has a gradient where a picture is flat, too
    return difference / ((variance + 1e-8).sqrt() + NOTICEABLE)


def _pool(hidden: Tensor) -> Tensor:
    return torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)


def _check(images: Tensor, name: str) -> None:
    shape = (3, world.SIZE, world.SIZE)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: got {kind}, expected a floating tensor in [0, 1]")
    if images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise ValueError(f"{name}: got shape {tuple(images.shape)}, expected (B, 3, 64, 64)")
    if not bool(((images > -0.001) & (images < 1.001)).all()):
        found = "NaN" if bool(images.isnan().any()) else f"{images.min():.3g} to {images.max():.3g}"
        raise ValueError(f"{name}: got {found}, expected values in [0, 1]")
