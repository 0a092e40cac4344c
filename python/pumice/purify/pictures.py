"""Pictures as people have them, and given back in the same form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pumice.io import open_pictures
from pumice.models.arguments import check_images


class Pictures:
    """What a method was given, and what it made of it in the form in which that came.

    Args:
        images: (B, 3, H, W) floating, in [0, 1]; or a PIL image, a path, or a list of them, of any size.

    Attributes:
        given: (3, H, W) float32 in [0, 1] each.
        tensor: whether they came as one.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, images: Any, name: str = "images") -> None:
        self._single = not isinstance(images, list | tuple)
        self._tensor: Tensor | None = None
        if isinstance(images, Tensor):
            check_images(name, images)
            self._tensor = images
            self.given = list(images.detach().float())
        else:
            self._files = open_pictures(images, name)
            self.given = [each.pixels.float() / 255 for each in self._files]

    def __len__(self) -> int:
        return len(self.given)

    @property
    def tensor(self) -> bool:
        return self._tensor is not None

    def finish(self, pictures: Sequence[Tensor]) -> Any:
        """The results, (3, H, W) in [0, 1] each, as the given ones came.

        Returns:
            (B, 3, H, W), typed as the given tensor and on its device; or PIL images of 8 bits, with the
            transparency and metadata of what was given.

        Raises:
            ValueError: for one that is not finite.
        """
        for number, each in enumerate(pictures):
            if not bool(torch.stack(each.aminmax()).isfinite().all()):  # one pass
                raise ValueError(
                    f"images[{number}]: its result is not finite; networks of a wider dtype may do"
                )
        if self._tensor is not None:
            return torch.stack([each.to(self._tensor) for each in pictures]).clamp_(0, 1)
        done = [
            file.with_pixels((each.clamp(0, 1) * 255).round().to("cpu", torch.uint8))
            for file, each in zip(self._files, pictures, strict=True)
        ]
        return done[0] if self._single else done


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) of another size, bicubic without aliasing, in [0, 1]."""
    if picture.shape[1:] == size:
        return picture
    return interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def mirrored(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) continued below and to the right by its mirror image, (3, *size)."""
    for dim, side in ((1, size[0]), (2, size[1])):
        length = picture.shape[dim]
        place = torch.arange(side, device=picture.device) % (2 * length)
        picture = picture.index_select(dim, torch.minimum(place, 2 * length - 1 - place))
    return picture
