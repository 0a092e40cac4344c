"""CodeSR: faces restored, pictures made small, and drawn large again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.models import RowBudget
from pumice.models.arguments import check_number, check_prompt
from pumice.models.upscaler import FACTOR

from .batches import in_batches
from .fitting import fitted
from .pictures import Pictures, resized
from .sampler import Options
from .upscaling import Upscaling

Restorer = Callable[[Tensor], Tensor]

_FIDELITY = 0.5


def codesr(
    images: Any,
    upscaler: Any,
    class_name: str = "person",
    *,
    prompt: str | Sequence[str] | None = None,
    restorer: Restorer | str | PathLike[str] | None = None,
    fidelity: float | None = None,
    noise_level: int = 20,
    num_inference_steps: int = 75,
    guidance_scale: float = 9.0,
    negative_prompt: str | None = None,
    **options: Unpack[Options],
) -> Any:
    """Purify pictures by an upscaler, from a quarter of their sides.

    ::

        x <- upscale(bicubic(restore(x), 1/4))

    The first part of arXiv:2406.18944, called by the names of its two steps, CodeFormer (arXiv:2206.11253)
    and super-resolution. Most of a perturbation is lost in the small picture; the restoration before it keeps
    what makes a face. Of pictures of 512 px the small ones have 128, as the authors'.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        upscaler: a `StableDiffusionUpscalePipeline` or the path of one; its own settings (tiling, attention,
            offloading) hold.
        class_name: what is on the pictures, for the prompt "A photo of a {class_name}", the authors'.
        prompt: another one, or one for each picture.
        restorer: a function of pictures (n, 3, H, W) in [0, 1] that returns them restored, of the same size
            or twice as large: finding, aligning and pasting back faces is its part. Or the path of such a
            function as a TorchScript file: it is a program, open none that you do not trust. Default none, as
            of the authors for all but persons; for those they take CodeFormer.
        fidelity: second input of a file that has two, CodeFormer's w. Default 0.5, the authors'.
        noise_level, num_inference_steps, guidance_scale: default 20, 75 and 9, the pipeline's own.
        negative_prompt: what is drawn away from.
        options: `purify.Options`. Of guided pictures, each is two rows of a pass; by default fewer go into
            one the more pixels they have.

    Returns:
        The purified pictures, in the form in which they came.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for a pipeline of another kind.
    """
    check_prompt("class_name", class_name)
    pictures = Pictures(images)
    upscaling = Upscaling(
        upscaler,
        len(pictures),
        f"A photo of a {class_name}" if prompt is None else prompt,
        noise_level=noise_level,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        **options,
    )
    restore = _opened(restorer, fidelity, upscaling.device)
    rows = pictures.given
    if restore is not None:
        rows = _restored(rows, restore, upscaling.budget(rows))
    made = upscaling([_small(row, was) for row, was in zip(rows, pictures.given, strict=True)])
    return pictures.finish(
        [now[:, : was.shape[1], : was.shape[2]] for now, was in zip(made, pictures.given, strict=True)]
    )


def _small(picture: Tensor, was: Tensor) -> Tensor:
    """A quarter of the sides that the picture had, which are mirrored up to multiples of four."""
    whole = fitted(picture, None, FACTOR * picture.shape[1] // was.shape[1], "native")
    sides = [-(-side // FACTOR) for side in was.shape[1:]]
    return resized(whole, (sides[0], sides[1]))


@torch.no_grad()
def _restored(rows: Sequence[Tensor], restore: Restorer, budget: RowBudget) -> list[Tensor]:
    def work(_: Sequence[int], images: Tensor) -> Tensor:
        found = restore(images)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            said = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"restorer: it returned {said}, expected a floating tensor of pictures")
        shapes = [(*images.shape[:2], *(scale * side for side in images.shape[2:])) for scale in (1, 2)]
        if found.shape not in shapes:
            raise ValueError(
                f"restorer: it made {tuple(found.shape)} of {tuple(images.shape)}, expected the same shape "
                "or twice its sides"
            )
        if not bool(((found > -0.5) & (found < 1.5)).all()):  # networks overshoot a little
            raise ValueError("restorer: it returned values far from [0, 1], expected pictures in that range")
        return found.to(images).clamp(0, 1)

    return in_batches(rows, budget, work)


def _opened(restorer: Any, fidelity: float | None, device: torch.device) -> Restorer | None:
    if fidelity is not None:
        check_number("fidelity", fidelity)
        if not 0 <= fidelity <= 1:
            raise ValueError(f"fidelity: got {fidelity}, expected 0 to 1")
    if isinstance(restorer, str | PathLike):
        return _network(Path(restorer), fidelity, device)
    if fidelity is not None:
        raise ValueError(f"fidelity: got {fidelity}, expected none but for a restorer in a file")
    if restorer is not None and not callable(restorer):
        raise TypeError(f"restorer: got a {type(restorer).__name__}, expected a function or a path")
    return restorer


def _network(path: Path, fidelity: float | None, device: torch.device) -> Restorer:
    if not path.is_file():
        raise ValueError(f"restorer: {str(path)!r} is not a file")
    try:
        with warnings.catch_warnings():  # deprecated, but what restorers are published as
            warnings.simplefilter("ignore", DeprecationWarning)
            network: Any = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"restorer: {str(path)!r} is not a TorchScript file: {reason}") from error
    inputs = network.forward.schema.arguments[1:]
    more: list[Any] = []
    if len(inputs) > 1:
        w = _FIDELITY if fidelity is None else float(fidelity)
        more = [w if str(inputs[1].type) == "float" else torch.tensor(w, device=device)]
    elif fidelity is not None:
        raise ValueError(f"fidelity: got {fidelity}, but the network of {str(path)!r} has one input only")

    def restore(images: Tensor) -> Tensor:
        found = network(images.to(device), *more)
        return found[0] if isinstance(found, tuple) else found

    return restore
