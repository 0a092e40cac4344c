"""Who is on a picture of the testbed's world, and how clean it is: the judges of personalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pumice.testbed import world

EMBEDDING = 64
NOTICEABLE = 4 / 255  # standard deviation that the contrast is measured by, besides the picture's own


class IdentityNet(nn.Module):
    """A small convolutional network that recognizes creatures and sees damage.

    It learned from creatures other than the subjects, so it knows those as ArcFace (arXiv:1801.07698) knows a
    face that it has not seen. `forward` takes pictures (B, 3, 64, 64) in [0, 1] and returns embeddings
    (B, 64) of length one and the logits (B,) of the quality; gradients flow to the pictures.
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
        """How much each picture shows the creature of the references.

        score_b = <e_b, m> / |m|, m the mean of the references' embeddings, all embeddings of length one.
        Measured on the six subjects, 40 pictures each and 8 references, mean (5 and 95 % quantiles):

            the same subject              0.95 (0.91, 0.98); after the autoencoder 0.93 (0.86, 0.97)
            another subject               -0.03 (-0.31, 0.32)
            200 ordinary pictures         0.00 (-0.30, 0.42); drawn by the model 0.01 (-0.29, 0.39)
            the memorized pictures        -0.07 (-0.38, 0.22)

        Noise of +-16/255 leaves 0.94 of the same subject: what lowers the score is another look, not damage.

        Args:
            images: (B, 3, 64, 64) floating, in [0, 1].
            references: (R, 3, 64, 64) of one creature, the same; a few are enough.

        Returns:
            (B,) in [-1, 1].

        Raises:
            TypeError: if either is not a floating tensor.
            ValueError: for another shape, no picture, a NaN or values out of range.
        """
        _check(images, "images")
        _check(references, "references")
        mean = self(references)[0].mean(0)
        return F.cosine_similarity(self(images)[0], mean[None])

    @torch.no_grad()
    def quality(self, images: Tensor) -> Tensor:
        """How free of damage each picture is: the counterpart of a no-reference quality score.

        It learned 1 / (1 + (d / (4/255))^2) for pictures at a root mean square distance d from an undamaged
        twin. Softness, colours and an artist's bands are no damage. Measured means:

            subjects 0.95, after the autoencoder 0.85; ordinary pictures 0.96, in an artist's style 0.78
            (tanaka) to 0.90 (lindqvist), drawn by the model 0.81; memorized pictures 0.85
            random signs of 1, 2, 4, 8, 16/255: 0.90, 0.74, 0.40, 0.16, 0.06; wavy patterns of that amplitude
            and periods of 4 to 12 px: at 4/255 0.26 to 0.35, at 8/255 0.10 to 0.13
            outlines that stray by 1, 2, 3 px: 0.48, 0.17, 0.09

        Args:
            images: (B, 3, 64, 64) floating, in [0, 1].

        Returns:
            (B,) in [0, 1].

        Raises as `identity_score`.
        """
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
