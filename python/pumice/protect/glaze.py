"""Glaze (Shan et al., USENIX Security 2023): paintings with the latents of another style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pumice.models import DiffusionModel, GuidedSampler, RowBudget
from pumice.models.arguments import check_number, check_scale, checked_count, checked_prompt, checked_seeds
from pumice.models.draws import Draws
from pumice.models.graph import Graphed

from .arguments import check_autoencoder, checked_models
from .fitting import Size
from .pgd import ROWS
from .pictures import Pictures

Distance = Callable[[Tensor, Tensor], Tensor]

_START = 0.025  # how far at most from the pictures the optimisation begins
_INFERENCE_STEPS, _GUIDANCE_SCALE = 50, 7.5  # of the change of style, diffusers' defaults


def contrast_masked_error(images: Tensor, clean: Tensor) -> Tensor:
    """Squared error that weighs less where it is hidden: in texture.

    ::

        mean of (x - x0)^2 / (v + 0.1^2)        v = variance of x0 in 7 x 7 pixels, mean over channels

    0.05 is an error of 5.7/255 on an even surface and of 12.7/255 where v is 0.2^2 (root mean square).

    Args:
        images: x, (B, 3, H, W) floating in [0, 1].
        clean: x0, shaped as x.

    Returns:
        (B,), differentiable in x.
    """

    def around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False)

    variance = (around(clean**2) - around(clean) ** 2).mean(1, keepdim=True).clamp(min=0)
    return ((images - clean) ** 2 / (variance + 0.1**2)).mean((1, 2, 3))


@torch.inference_mode(False)
def glaze(
    images: Any,
    pipe: Any,
    target: Any = None,
    *,
    style: str | None = None,
    strength: float = 0.5,
    distance: Distance = contrast_masked_error,
    p: float = 0.05,
    alpha: float = 30.0,
    lr: float = 0.005,
    steps: int = 500,
    mask: Any = None,
    size: Size = "resize",
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    recompute: bool = False,
    progress: bool = False,
) -> Any:
    """Perturb pictures so that their latents are those of the same pictures in another style.

    ::

        min over x of  mean (E(x) - E(y))^2 + alpha * max(distance(x, x0) - p, 0)

    by Adam, y being x0 in the style, E the mean of the encoder's posterior before scaling (Shan et al.,
    arXiv:2302.04222, whose code is closed; numbers are those of IMPRESS' re-implementation, Cao et al.,
    NeurIPS 2023). Each picture is optimised as if alone; one pass of the encoder a step, forward and
    backward. Targets are made and encoded once.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose losses are summed.
        target: y, one for each picture and of its size, in the form of `images`.
        style: instead of `target`, a prompt such as "an oil painting by van Gogh": y is what img2img makes of
            x0 with the (first) model. Glaze wants a style that differs much from the pictures'.
        strength: of img2img, as of diffusers. Default 0.5.
        distance: how visible a change is, differentiable, from two batches (B, 3, H, W) in [0, 1] to (B,).
            Glaze takes LPIPS, whose weights do not come with this package; the default is no LPIPS but
            `contrast_masked_error`, which needs no network and has a scale of its own.
        p: the distance from which on a change costs. Default 0.05, Glaze's for LPIPS.
        alpha: the cost of a distance beyond it. Default 30.
        lr: of Adam, in the unit of the pictures. Default 0.005, 0.01 of pictures in [-1, 1].
        steps: default 500.
        mask, size, seed, batch_size, recompute, progress: as of `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came. There is no largest change of a value, and
        `p` is a price, not a bound: distances end near it.

    Starts at x0 + U(-0.025, 0.025), the re-implementation's U(-p, p) of pictures in [-1, 1]. That one draws a
    new sample of both posteriors at each step, where the means are taken here.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    if (target is None) == (style is None):
        raise ValueError("target, style: expected one of them")
    check_number("strength", strength)
    if not 1 / _INFERENCE_STEPS <= strength <= 1:
        raise ValueError(f"strength: got {strength}, expected {1 / _INFERENCE_STEPS} to 1")
    if not callable(distance):
        raise TypeError(f"distance: got a {type(distance).__name__}, expected a function of two batches")
    for name, value in (("p", p), ("alpha", alpha), ("lr", lr)):
        check_scale(name, value)
    steps = checked_count("steps", steps)
    models = checked_models(pipe)
    pictures = Pictures(images, models, size=size, mask=mask)
    for model in models:
        check_autoencoder(model, pictures.working)
    seeds = checked_seeds(seed, pictures.given)
    draws = Draws([f"{seeds[of]}/{part}" for of, part in pictures.parts], models[0].device)
    if style is None:
        targets = _given(target, pictures, models, size)
    else:
        targets = _in_style(style, pictures, models[0], strength, draws)
    latents = [_encoded(model, targets) for model in models]
    groups: dict[torch.Size, list[int]] = {}
    for number, picture in enumerate(pictures.working):
        groups.setdefault(picture.shape, []).append(number)
    work = Graphed(_gradient(models, distance, p, alpha, recompute))
    budget = RowBudget(ROWS if batch_size is None else checked_count("batch_size", batch_size))
    done = list(pictures.working)
    with ExitStack() as exits:
        for model in models:
            exits.enter_context(model.frozen(data_gradient=True))
        bar = exits.enter_context(tqdm(total=steps * len(groups), unit="step", disable=not progress))
        for numbers in groups.values():
            clean, allowed, *z_y = (
                torch.stack([rows[number] for number in numbers]).to(models[0].device)
                for rows in (pictures.working, pictures.masks, *latents)
            )
            start = _START * (2 * draws.uniform(numbers, "start", 0, clean.shape[1:]) - 1)
            x = (clean + start * allowed).clamp(0, 1)
            optimizer = torch.optim.Adam([x], lr=lr)
            for _ in range(steps):
                x.grad = budget.run(partial(_batched, work, (x, clean, allowed, *z_y)))
                optimizer.step()
                x.clamp_(0, 1)
                bar.update()
            for number, picture in zip(numbers, x, strict=True):
                done[number] = picture
    return pictures.finish(done, None)


def _gradient(
    models: Sequence[DiffusionModel], distance: Distance, p: float, alpha: float, recompute: bool
) -> Callable[..., Tensor]:
    def gradient(x: Tensor, clean: Tensor, allowed: Tensor, *targets: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            found = distance(leaf, clean)
            if found.shape != (len(x),):
                raise ValueError(f"distance: got shape {tuple(found.shape)}, expected ({len(x)},)")
            cost = alpha * (found - p).clamp(min=0).sum()
        (total,) = torch.autograd.grad(cost, leaf)
        for model, z_y in zip(models, targets, strict=True):
            # the sum's gradient, made that of the mean afterwards: half precision would lose it
            pull = model.vjp(x, partial(_apart, z_y), recompute=recompute)
            total = total + pull / (z_y[0].numel() * model.vae.config.scaling_factor**2)
        return total * allowed

    return gradient


def _apart(z_y: Tensor, z: Tensor) -> Tensor:
    return 2 * (z - z_y)


def _batched(work: Callable[..., Tensor], tensors: Sequence[Tensor], rows: int) -> Tensor:
    return torch.cat([work(*part) for part in zip(*(each.split(rows) for each in tensors), strict=True)])


@torch.no_grad()
def _encoded(model: DiffusionModel, targets: Sequence[Tensor]) -> list[Tensor]:
    with model.frozen():
        return [model.encode_image(y[None].to(model.device))[0] for y in targets]


@torch.no_grad()
def _in_style(
    style: str, pictures: Pictures, model: DiffusionModel, strength: float, draws: Draws
) -> list[Tensor]:
    """What img2img makes of each picture: DDIM with guidance, from its noised latents."""
    sampler = GuidedSampler(model, _INFERENCE_STEPS, _GUIDANCE_SCALE)
    first = _INFERENCE_STEPS - int(_INFERENCE_STEPS * strength)
    prompt = checked_prompt(model, style, "style")
    found = []
    with model.frozen():
        empty = model.unconditional()
        for number, picture in enumerate(pictures.working):
            z = model.encode_image(picture[None].to(model.device))
            noise = draws.normal([number], "style", 0, z.shape[1:])
            x = model.add_noise(z, noise, sampler.t[first])
            for index in range(first, _INFERENCE_STEPS):
                t = sampler.t[index]
                cond, uncond = (model.predict(x, t, embeds).to(x.dtype) for embeds in (prompt, empty))
                x = sampler.step(index, x, cond, uncond).sample
            found.append(model.decode_latents(x)[0])
    return found


def _given(target: Any, pictures: Pictures, models: Sequence[DiffusionModel], size: Size) -> list[Tensor]:
    """The targets, as the pictures themselves meet the models."""
    targets = Pictures(target, models, size=size, name="target")
    if [y.shape for y in targets.working] != [x.shape for x in pictures.working]:
        raise ValueError(
            f"target: got {targets.given} of {_sizes(targets)}, expected one for each picture, "
            f"{pictures.given} of {_sizes(pictures)}"
        )
    return targets.working


def _sizes(pictures: Pictures) -> str:
    return ", ".join(dict.fromkeys(f"{x.shape[1]} x {x.shape[2]}" for x in pictures.working))
