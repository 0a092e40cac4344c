"""IMPRESS (Cao et al., NeurIPS 2023): a picture that the autoencoder passes on as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pumice import models
from pumice.models import DiffusionModel, RowBudget, frozen, vae
from pumice.models.arguments import check_scale, checked_count, checked_seeds
from pumice.models.draws import Draws
from pumice.models.graph import Graphed

from .batches import in_batches
from .fitting import fitted, unfitted
from .pictures import Pictures

Perceptual = Callable[[Tensor], Sequence[Tensor]]
"""From pictures (B, 3, H, W) in [0, 1] to feature maps (B, C, h, w), differentiable."""

ROWS = 8  # of a pass: running out of a CPU's memory cannot be caught

_LEAST_RATE, _ADAM_EPS = 1e-5, 1e-5  # of the authors' code
_LEVELS, _CONTRAST = 3, 0.1


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Details of pictures at several scales, each divided by how much of them there is around it.

    ::

        b / (0.1 + mean of |b| in 5 x 5 pixels)      b = x - up(down(x)) at 3 scales, and what is left at last

    after the normalized Laplacian pyramid (Laparra et al., Human Vision and Electronic Imaging 2016), with
    2 x 2 means and bilinear interpolation; divided so that `impress`' distance is a mean over channels.

    Args:
        images: (B, 3, H, W) in [0, 1], of at least 8 px a side.

    Returns:
        4 maps (B, 3, h, w), differentiable.
    """
    maps, rest = [], images
    for _ in range(_LEVELS):
        smaller = F.avg_pool2d(rest, 2)
        up = F.interpolate(smaller, size=rest.shape[2:], mode="bilinear", align_corners=False)
        maps.append(rest - up)
        rest = smaller
    return [_normalized(band) / math.sqrt(band.shape[1]) for band in (*maps, rest)]


def _normalized(band: Tensor) -> Tensor:
    around = F.avg_pool2d(band.abs(), 5, stride=1, padding=2, count_include_pad=False)
    return band / (_CONTRAST + around)


@torch.inference_mode(False)
def impress(
    images: Any,
    pipe: Any,
    *,
    steps: int = 3000,
    learning_rate: float = 0.01,
    alpha: float = 0.1,
    p: float = 0.1,
    noise: float = 0.1,
    perceptual: Perceptual = laplacian_pyramid,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Any:
    """Purify pictures by making them consistent: the autoencoder is to give back what it got.

    ::

        min over x'  mean (D(E(x')) - x')^2 + alpha max(d(x', x) - p, 0)            pictures in [-1, 1]
        d(x', x) = sum over feature maps f of the mean over positions of |f(x') - f(x)|^2

    by Adam with eps 1e-5, its rate falling along a cosine to 1e-5, from x' = x + noise N(0, 1), E the mean of
    the posterior (Cao et al., arXiv:2310.19248; defaults are those of the released code). Its setting for
    PhotoGuard is steps=1000, learning_rate=0.005, alpha=0.01, noise=0.05, that for Glaze noise=0.

    Pictures are optimised together, each as if alone. Networks are frozen, no gradient of a weight is
    computed, and the features of x once.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths; mirrored up to what the autoencoder takes, and
            to multiples of 8 px at least.
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel, whose autoencoder is used.
        steps: default 3000.
        learning_rate: of Adam, in the [-1, 1] that the authors count in, as `noise`. Default 0.01.
        alpha: what a distance beyond `p` costs. Default 0.1.
        p: the distance from which on it costs. Default 0.1.
        noise: standard deviation of where it begins. Default 0.1.
        perceptual: the feature maps. The authors' d is LPIPS, whose weights do not come with this package:
            give a function of its maps, normalised and multiplied by the square roots of its weights, and d
            is LPIPS. The default is no LPIPS but `laplacian_pyramid`, which needs no network and has a scale
            of its own: about 0.06 for random signs of 8/255 and 0.1 for those of 11/255, measured on the
            testbed's pictures. A module is frozen meanwhile.
        seed: of picture 0, one more for each further picture; or a list with one for each.
        batch_size: pictures of a pass; halved on out-of-memory. Default None, 8.
        progress: show a bar.

    Returns:
        The purified pictures, in the form in which they came.

    Differences from the released code, which keeps pictures in half precision: x' is float32, and it begins
    inside the range of pictures.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: if the model's family is not supported.
    """
    steps = checked_count("steps", steps)
    check_scale("learning_rate", learning_rate, positive=True)
    for name, value in (("alpha", alpha), ("p", p), ("noise", noise)):
        check_scale(name, value)
    if not callable(perceptual):
        raise TypeError(f"perceptual: got a {type(perceptual).__name__}, expected a function of pictures")
    model = models.load(pipe)
    pictures = Pictures(images)
    most = ROWS if batch_size is None else checked_count("batch_size", batch_size)
    budget = RowBudget(min(most, len(pictures)))
    seeds = checked_seeds(seed, len(pictures))
    draws = Draws([f"{each}/0" for each in seeds], model.device)
    multiple = max(model.vae_scale_factor, 2**_LEVELS)  # for the pyramid, too
    rows = [fitted(picture, None, multiple, "native") for picture in pictures.given]
    gradient = Graphed(_gradient(model, perceptual, alpha, p))

    def optimised(numbers: Sequence[int], given: Tensor) -> Tensor:
        given = given.to(model.device)
        constants = _features(perceptual, given)
        start = given * 2 - 1 + noise * draws.normal(numbers, "start", 0, given.shape[1:])
        x = start.clamp(-1, 1)
        optimizer = torch.optim.Adam([x], lr=learning_rate, eps=_ADAM_EPS)
        passed = bar.n
        try:
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = _rate(learning_rate, step / steps)
                x.grad = gradient(x, *constants)
                optimizer.step()
                x.clamp_(-1, 1)
                bar.update(len(x))
        except RuntimeError:
            bar.n = passed  # out of memory, it begins again
            raise
        return x / 2 + 0.5

    others = [perceptual] if isinstance(perceptual, nn.Module) else []
    with (
        torch.no_grad(),
        model.frozen(data_gradient=True),
        frozen(others, data_gradient=True),
        tqdm(total=steps * len(rows), unit="step", disable=not progress) as bar,
    ):
        done = in_batches(rows, budget, optimised)
    return pictures.finish(
        [unfitted(now, was, "native") for now, was in zip(done, pictures.given, strict=True)]
    )


def _rate(first: float, passed: float) -> float:
    return _LEAST_RATE + (first - _LEAST_RATE) * (1 + math.cos(math.pi * passed)) / 2


def _gradient(model: DiffusionModel, perceptual: Perceptual, alpha: float, p: float) -> Callable[..., Tensor]:
    def gradient(x: Tensor, *constants: Tensor) -> Tensor:
        leaf, size = x.detach().requires_grad_(), x[0].numel()
        with torch.enable_grad():
            pictures = leaf / 2 + 0.5
            latents = model.encode_image(pictures)
            passed = vae.decode(model.vae, latents, upcast=model.upcast_vae).to(x.dtype) * 2 - 1
            pairs = zip(_features(perceptual, pictures), constants, strict=True)
            distance = torch.stack([(now - was).square().sum(1).mean((1, 2)) for now, was in pairs]).sum(0)
            # sums, made means afterwards: half precision would lose them
            loss = (passed - leaf).square().sum() + alpha * size * (distance - p).clamp(min=0).sum()
        (found,) = torch.autograd.grad(loss, leaf)
        return found / size

    return gradient


def _features(perceptual: Perceptual, pictures: Tensor) -> list[Tensor]:
    maps = perceptual(pictures)
    whole = isinstance(maps, list | tuple) and len(maps)
    if not whole or not all(isinstance(each, Tensor) and each.ndim == 4 for each in maps):
        raise ValueError(f"perceptual: it gave a {type(maps).__name__}, expected feature maps (B, C, h, w)")
    return list(maps)
