"""How alike two pictures are to a copy detector: SSCD (Pizzi et al., CVPR 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.evaluate.preprocess import Preprocessing, check_images
from pumice.models import RowBudget

Mode = Literal["official", "wen"]

_HALF = (0.5, 0.5, 0.5)
_PREPROCESSING = {
    "official": Preprocessing((320, 320), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "wen": Preprocessing(256, 224, _HALF, _HALF),
}


def sscd(
    path: str | PathLike[str],
    *,
    mode: Mode = "official",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Open an SSCD network, and get a function of two batches of pictures that tells how alike they are.

    ::

        similarity[a, b] = <f(x_a), f(x_b)> / (|f(x_a)| |f(x_b)|)

    (Pizzi et al., arXiv:2202.10261.) Above 0.5 a picture counts as replicated in most work on memorization.
    Numbers of different networks and preprocessings cannot be compared: name both.

    Args:
        path: a TorchScript file of the authors (`sscd_disc_mixup.torchscript.pt`, `sscd_disc_large...`). It
            is a program: open none that you do not trust.
        mode: of preprocessing. "official": squeezed to 320 x 320, ImageNet's mean and deviation, as the
            authors do. "wen": shorter side to 256, the middle 224 x 224, to [-1, 1], as in the code of Wen et
            al. (arXiv:2407.21720) and of others who followed it.
        device: where it runs.
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        `similarity(a, b)`: pictures (A, 3, H, W) and (B, 3, H', W') in [0, 1] to (A, B) float32 on the CPU.

    Raises:
        ValueError: for another mode, a file that is missing or no TorchScript, or a network that does not
            return one vector a picture.
    """
    if mode not in _PREPROCESSING:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(_PREPROCESSING)}")
    prepare, network, budget = _PREPROCESSING[mode], _open(Path(path), device), RowBudget(batch_size)

    def describe(images: Tensor) -> Tensor:
        def run(rows: int) -> Tensor:
            return torch.cat([network(prepare(part.to(device))) for part in images.split(rows)])

        found = budget.run(run)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise ValueError(f"path: {str(path)!r} is not a network that returns one vector a picture")
        return F.normalize(found.float()).cpu()

    @torch.no_grad()
    def similarity(a: Tensor, b: Tensor) -> Tensor:
        check_images("a", a)
        check_images("b", b)
        return describe(a) @ describe(b).T

    return similarity


def _open(path: Path, device: torch.device | str) -> Any:
    if not path.is_file():
        raise ValueError(f"path: {str(path)!r} is not a file")
    try:
        with warnings.catch_warnings():  # deprecated, but SSCD is published in no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"path: {str(path)!r} is not a TorchScript file: {reason}") from error
