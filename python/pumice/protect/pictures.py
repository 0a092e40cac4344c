"""Pictures as people have them, as a model takes them, and as they are given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pumice.io import open_pictures, within_budget
from pumice.models import DiffusionModel
from pumice.models.arguments import check_images
from pumice.ops.pgd_step import Norm

from .arguments import warn
from .fitting import Size, fit, stride


class Pictures:
    """What a method perturbs of the pictures that it was given, and how they are given back.

    Tensors are perturbed as they are. PIL images and files of any size meet the model as `size` says
    (`fitting.fit`); their changes are brought to the pictures' own size, and those of 8 bits that come back
    obey the budget, too. Transparency stays; colours of transparent pixels change like all others, as
    programs that learn from pictures drop transparency.

    Args:
        images: (B, 3, H, W) floating, in [0, 1]; or a PIL image, a path, or a list of them.
        models: that the pictures are to be passed through.
        size: how PIL images and files meet the first model: "resize", "tiles" or "native".
        mask: where pictures may change, at their own size: (H, W), (1, H, W), (1, 1, H, W), (B, 1, H, W), a
            PIL image, or a list with one for each; bool or in [0, 1], which changes are multiplied by.
        name: of the argument that `images` were, for errors.

    Attributes:
        given: how many pictures came.
        working: what is perturbed, (3, h, w) float32 in [0, 1] each.
        masks: where, (1, h, w) float32 in [0, 1] each.
        parts: of each working picture: of which given one it is, and which part of it.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        images: Any,
        models: Sequence[DiffusionModel],
        *,
        size: Size = "resize",
        mask: Any = None,
        name: str = "images",
    ) -> None:
        if size not in get_args(Size):
            raise ValueError(f"size: got {size!r}, expected one of {', '.join(get_args(Size))}")
        self._tensor = _checked(name, images, models) if isinstance(images, Tensor) else None
        self._files = open_pictures(images, name) if self._tensor is None else []
        self._single = not isinstance(images, list | tuple)
        clean = [each.pixels.float() / 255 for each in self._files] if self._tensor is None else self._tensor
        self.given = len(clean)
        self._masks = _masks(mask, [(each.shape[1], each.shape[2]) for each in clean])
        how: Size = size if self._tensor is None else "native"
        self._fits = [
            fit(each.shape[1], each.shape[2], models, how, name if self._single else f"{name}[{number}]")
            for number, each in enumerate(clean)
        ]
        self.working: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.parts: list[tuple[int, int]] = []
        for number, picture in enumerate(clean):
            parts = self._fits[number].parts(picture)
            self.working += parts
            self.masks += self._fits[number].masks(self._masks[number])
            self.parts += [(number, part) for part in range(len(parts))]

    def finish(self, perturbed: Sequence[Tensor], eps: float | None, norm: Norm = "linf") -> Any:
        """The given pictures, perturbed, in the form in which they came.

        Args:
            perturbed: the working pictures, in [0, 1].
            eps: the budget, which pictures of 8 bits obey, too; None for none.
            norm: of the budget: the largest change of a value, or the norm of a picture's whole change.

        Returns:
            (B, 3, H, W) float32 on the device of the given ones; or a PIL image, or a list of them, with the
            metadata of what was given in `info` (`io.save_lossless` writes all of it).
        """
        if self._tensor is not None:
            now = torch.stack(list(perturbed)).to(self._tensor)
            return self._tensor.lerp(now, torch.stack(self._masks).to(now))  # exact where masks are 0 or 1
        if eps is not None and norm == "linf" and 0 < eps < 1 / 255:
            warn(f"eps: got {eps:g}, less than one of 255 levels: pictures of 8 bits stay as they are")
        changes: list[list[Tensor]] = [[] for _ in range(self.given)]
        for (number, _), now, clean in zip(self.parts, perturbed, self.working, strict=True):
            changes[number].append(now.to(clean) - clean)
        done = [self._finished(number, changes[number], eps, norm) for number in range(self.given)]
        return done[0] if self._single else done

    def _finished(self, number: int, changes: Sequence[Tensor], eps: float | None, norm: Norm) -> Image.Image:
        picture = self._files[number]
        change = self._fits[number].whole(changes) * self._masks[number]
        if eps is not None and norm == "l2":  # a larger picture, or several tiles, have a larger norm
            change = change * (eps / change.norm().clamp(min=1e-12)).clamp(max=1)
            change, eps = (255 * change).trunc() / 255, None  # what rounds away would leave the ball
        return picture.with_pixels(within_budget(picture.pixels / 255 + change, picture.pixels, eps))


def _checked(name: str, images: Tensor, models: Sequence[DiffusionModel]) -> Tensor:
    if images.dtype == torch.uint8:
        raise TypeError(f"{name}: got torch.uint8, expected a floating tensor in [0, 1], {name} / 255")
    check_images(name, images)
    (height, width), step = images.shape[2:], stride(models)
    if height % step or width % step:
        raise ValueError(
            f"{name}: got {height} x {width}, expected a positive multiple of {step} each way; "
            "PIL images and paths may have any size"
        )
    return images.detach().float()


def _masks(mask: Any, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    if mask is None:
        return [torch.ones(1, *size) for size in sizes]
    if isinstance(mask, Tensor) and mask.ndim == 4 and len(mask) == 1:
        mask = mask[0]
    each = isinstance(mask, list | tuple) or (isinstance(mask, Tensor) and mask.ndim == 4)
    masks = list(mask) if each else [mask] * len(sizes)
    if len(masks) != len(sizes):
        raise ValueError(f"mask: got {len(masks)}, expected one, or one for each of {len(sizes)} pictures")
    return [_mask(mask, *size) for mask, size in zip(masks, sizes, strict=True)]


def _mask(mask: Any, height: int, width: int) -> Tensor:
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert("L"))).float() / 255
    if not isinstance(mask, Tensor) or not (mask.is_floating_point() or mask.dtype == torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask: got {kind}, expected a tensor, bool or floating, or a PIL image")
    found = mask[None] if mask.ndim == 2 else mask
    if found.shape != (1, height, width):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected its picture's {height} x {width}")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("mask: got values out of range, expected 0 to 1")
    return found.detach().float().cpu()
