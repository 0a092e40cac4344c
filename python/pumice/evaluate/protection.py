"""Does it protect? How far pictures moved for a model, and what it still learns from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice import models
from pumice.evaluate.drawing import ORIGINAL
from pumice.evaluate.learnability import Learning, learnability
from pumice.evaluate.preprocess import check_images
from pumice.evaluate.scores import checked_scores, mean
from pumice.evaluate.visibility import visibility
from pumice.models import DiffusionModel

Judge = Callable[[Tensor], Tensor]
"""From pictures (N, 3, H, W) in [0, 1] to scores (N,)."""


@dataclass(frozen=True, eq=False)
class Displacement:
    """How far B pictures moved from their originals as the model sees them, each (B,) float64 on the CPU.

    Attributes:
        latent: |mu(x) - mu(x0)| / |mu(x0)|, of the means of the encoder's posterior.
        loss: the denoising loss of x, a mean over a grid of timesteps and noises.
        original_loss: that of x0 on the same grid.
    """

    latent: Tensor
    loss: Tensor
    original_loss: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("latent", "loss", "original_loss")}


@dataclass(frozen=True, eq=False)
class Protection:
    """What protected pictures look like and what is learned from them.

    Attributes:
        rows: one a set of pictures, of plain numbers; None is what was not measured. The first, "none", is
            the model that was not personalized: what its drawings score is the least that can be expected.

            - name
            - psnr, ssim, max_change, lpips: against the clean pictures (`Visibility.mean`)
            - displacement, loss_change: means of `Displacement.latent` and of loss / original_loss - 1
            - training_loss: mean over the last quarter of the steps
            - identity, identity_low, identity_high: mean over all drawn pictures, and its normal 95 %
              interval
            - quality, quality_low, quality_high: the same
            - identity_lost, quality_lost, each with _low, _high: share of what the clean pictures have, per
              cent, from differences of pictures that were drawn from the same noise
        scores: by name, for each judge its scores (R, P, D) of the drawn pictures.
        drawn: by name, (R, P, D, 3, H, W) uint8 on the CPU.
        settings: of the run.
    """

    rows: tuple[dict[str, Any], ...]
    scores: dict[str, dict[str, Tensor]]
    drawn: dict[str, Tensor]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, without the pictures."""
        return {
            "rows": [dict(row) for row in self.rows],
            "scores": {
                name: {judge: values.tolist() for judge, values in found.items()}
                for name, found in self.scores.items()
            },
            "settings": dict(self.settings),
        }

    def table(self) -> list[tuple[str, ...]]:
        """`rows` to be read, under a line of titles; "-" is what was not measured."""
        columns = {
            "psnr": ("PSNR", ".1f"),
            "ssim": ("SSIM", ".3f"),
            "lpips": ("LPIPS", ".3f"),
            "displacement": ("displacement", ".3f"),
            "identity": ("identity", ".3f"),
            "quality": ("quality", ".3f"),
            "identity_lost": ("identity lost", ".1f"),
            "quality_lost": ("quality lost", ".1f"),
        }
        columns = {key: how for key, how in columns.items() if any(row[key] is not None for row in self.rows)}
        lines = [("pictures", *(title for title, _ in columns.values()))]
        for row in self.rows:
            cells = [(row[key], how) for key, (_, how) in columns.items()]
            lines.append((row["name"], *("-" if value is None else f"{value:{how}}" for value, how in cells)))
        return lines


@torch.no_grad()
def latent_displacement(
    images: Tensor,
    originals: Tensor,
    pipe: Any,
    prompt: str = "a photo",
    *,
    timesteps: int = 10,
    seed: int = 0,
) -> Displacement:
    """Measure how far pictures moved for the model: in its latents, and for its denoiser.

    ::

        latent = |mu(x) - mu(x0)| / |mu(x0)|
        loss   = mean over k of |network(z_t, t_k, c) - target|^2 / (C h w)     z = mu(x), noise n_k

    with t_k in the middle of each of `timesteps` equal parts of the schedule and one noise n_k for each, the
    same for x and x0 and for all pictures.

    Args:
        images: (B, 3, H, W) floating, in [0, 1].
        originals: of the same shape.
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        prompt: c, what the pictures are called.
        timesteps: how many; all of a picture's are one batch of the denoiser.
        seed: of the noises.

    Returns:
        A `Displacement`.

    Raises:
        TypeError: if pictures are no floating tensors, or the prompt no string.
        ValueError: for other shapes or values, and for a number out of range.
    """
    check_images("images", images)
    check_images("originals", originals)
    if images.shape != originals.shape:
        raise ValueError(
            f"originals: got shape {tuple(originals.shape)}, expected {tuple(images.shape)}, as images"
        )
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: got a {type(prompt).__name__}, expected a string")
    if operator.index(timesteps) < 1:
        raise ValueError(f"timesteps: got {timesteps}, expected at least 1")
    model = models.load(pipe)
    last = model.schedule.num_train_timesteps
    t = ((torch.arange(timesteps) + 0.5) * last / timesteps).long().to(model.device)
    noise = torch.randn(
        timesteps,
        *model.latent_shape(*images.shape[2:]),
        generator=torch.Generator().manual_seed(operator.index(seed)),
    ).to(model.device)
    with model.frozen():
        embeds = model.encode_prompt(prompt)

        def see(picture: Tensor) -> tuple[Tensor, Tensor]:
            z = model.encode_image(picture[None])
            rows = z.expand(timesteps, -1, -1, -1)
            output = model.predict(model.add_noise(rows, noise, t), t, embeds).to(z.dtype)
            return z.double(), (output - model.schedule.target(rows, noise, t)).square().mean().double()

        found = []
        for picture, original in zip(images, originals, strict=True):
            (z, loss), (z0, original_loss) = see(picture), see(original)
            found.append(torch.stack([(z - z0).norm() / z0.norm(), loss, original_loss]))
    return Displacement(*torch.stack(found, dim=1).cpu())


def protection(
    pipe: Any,
    pictures: Mapping[str, Tensor],
    prompt: str,
    prompts: Sequence[str] = (),
    *,
    identity: Judge,
    quality: Judge | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    clean: str = "clean",
    **options: Unpack[Learning],
) -> Protection:
    """Set protections against each other: what is seen of them, and what a model still learns.

    Each set of pictures is learned by copies of the model of its own (`learnability`), and judges look at
    what they draw. Read a protection beside noise of the same budget: only what that does not do is
    protection.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        pictures: by name, sets of (N, 3, H, W) floating in [0, 1], all of the same N pictures: as they are,
            with noise, protected by each method.
        prompt, prompts: as of `learnability`.
        identity: whether drawn pictures show the subject, such as the cosine of face embeddings to those of
            other pictures; what shows somebody else should score about 0.
        quality: how clean drawn pictures are.
        lpips: as of `visibility`.
        clean: the name of the set that the others are compared with.
        options: `Learning`, as of `learnability`.

    Returns:
        A `Protection`. Intervals take pictures for independent; those of one copy are not quite.

    Raises:
        TypeError: if pictures come without names, or are no floating tensors.
        ValueError: if there is no set of the name `clean`, for sets of different shapes, if what a judge
            returns does not fit, and as `learnability`.
    """
    _check_sets(pictures, clean)
    model = models.load(pipe)
    originals = pictures[clean]
    changes = {name: _change(images, originals, model, prompt, lpips) for name, images in pictures.items()}
    judges = {"identity": identity} | ({} if quality is None else {"quality": quality})
    drawn, losses, scores = {}, {}, {}
    for name in (ORIGINAL, *pictures):
        own: Learning = {**options, "steps": 0} if name == ORIGINAL else options
        learned = learnability(model, pictures.get(name, originals), prompt, prompts, **own)
        drawn[name], losses[name] = learned.pictures, learned.losses
        scores[name] = {judge: _judged(judge, see, learned.pictures) for judge, see in judges.items()}
    rows = []
    for name in drawn:
        row = {"name": name} | changes.get(name, dict.fromkeys(changes[clean]))
        row["training_loss"] = _last_quarter(losses[name])
        for judge in ("identity", "quality"):
            found, base = (scores[which].get(judge, torch.empty(0)) for which in (name, clean))
            row |= mean(judge, found.flatten()) | share_lost(judge, found, base)
        rows.append(row)
    return Protection(tuple(rows), scores, drawn, {**learned.settings, "clean": clean})


def share_lost(judge: str, scores: Tensor, clean: Tensor) -> dict[str, float | None]:
    """How much of the scores of clean pictures is gone, per cent, and its normal 95 % interval.

    ::

        R = 1 - mean(scores) / mean(clean)
        interval: R +- 1.96 std((1 - R) clean - scores) / (sqrt(n) mean(clean))

    Both are of pictures that were drawn from the same noise, one by one; the interval is that of a ratio of
    means, by the delta method. None if the clean ones have nothing to lose.
    """
    base = float(clean.mean()) if clean.numel() else 0.0
    if base <= 0:
        return mean(f"{judge}_lost", torch.empty(0))
    lost = 1 - float(scores.mean()) / base
    beside = ((1 - lost) * clean - scores).flatten() / base  # of mean 0
    return mean(f"{judge}_lost", 100 * (lost + beside))


def _change(
    images: Tensor,
    originals: Tensor,
    model: DiffusionModel,
    prompt: str,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, float | None]:
    moved = latent_displacement(images, originals, model, prompt)
    return {
        **visibility(images, originals, lpips=lpips).mean(),
        "displacement": float(moved.latent.mean()),
        "loss_change": float((moved.loss / moved.original_loss).mean() - 1),
    }


def _judged(name: str, judge: Judge, drawn: Tensor) -> Tensor:
    """(R, P, D) float64, copy by copy."""
    count = drawn[0, :, :, 0, 0, 0].numel()
    scores = [checked_scores(name, judge(one.flatten(0, 1) / 255), count) for one in drawn]
    return torch.stack(scores).view(drawn.shape[:3])


def _last_quarter(losses: Tensor) -> float | None:
    last = losses[:, losses.shape[1] * 3 // 4 :]
    return float(last.mean()) if last.numel() else None


def _check_sets(pictures: Mapping[str, Tensor], clean: str) -> None:
    if not isinstance(pictures, Mapping) or not all(isinstance(name, str) for name in pictures):
        raise TypeError(f"pictures: got a {type(pictures).__name__}, expected sets of pictures by name")
    if clean not in pictures or ORIGINAL in pictures:
        raise ValueError(f"pictures: got {list(pictures)}, expected {clean!r} and no {ORIGINAL!r}")
    for name, images in pictures.items():
        check_images(f"pictures[{name!r}]", images)
        if images.shape != pictures[clean].shape:
            raise ValueError(
                f"pictures: got shape {tuple(images.shape)} for {name!r}, "
                f"expected {tuple(pictures[clean].shape)}, as {clean!r}"
            )
