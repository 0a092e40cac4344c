"""Bright ending: the magnitude where the end token is looked at (Chen et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.models import CrossAttentionLayer, DiffusionModel, watch_attention

from .arguments import check_first_step
from .engine import Rows, Screen
from .metric import Metric


@dataclass(frozen=True)
class BrightEnding(Metric):
    """The magnitude where, in the last step, the picture attends to the end token (arXiv:2410.21665).

    ::

        m   = attention to the first EOS in the last step, mean over heads and the first down block's layers
        BE_t = |(epsilon_cond - epsilon_uncond) m|_2 / mean(m);    score = mean over all steps

    It takes the whole trajectory, and both branches of it: two rows of the denoiser for a prompt, seed and
    step. In models whose first block has no cross-attention (Stable Diffusion XL) the first block that has is
    taken, and the mask is enlarged to the latents.

    Differences from the released code: one trajectory, whose differences are kept until the mask is known,
    instead of two.
    """

    name: ClassVar[str] = "bright_ending"

    def columns(self, screen: Screen) -> tuple[str, ...]:
        check_first_step(screen.model, int(screen.sampler.timesteps[0]))
        return tuple(f"masked magnitude at t={t}" for t in screen.sampler.timesteps.tolist())

    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        screen.unconditional(0)  # not to be seen
        seen: dict[str, Tensor] = {}  # of the latest call: at the end, the conditional one of the last step

        def observe(name: str, probabilities: Tensor) -> None:
            by_token = probabilities.mean(1)  # (B, positions, tokens)
            seen[name] = by_token.gather(2, rows.eos[:, None, None].expand(-1, by_token.shape[1], 1)).squeeze(
                2
            )

        with watch_attention(_first_block(screen.model), observe):
            differences = [
                screen.difference(step.cond, step.uncond, step.index)
                for step in screen.trajectory(rows, len(screen.sampler.timesteps))
            ]
        mask = _as_latents(torch.stack(list(seen.values())).mean(0), screen.noise.shape)
        masked = torch.stack(differences, dim=1) * mask[:, None]
        return masked.flatten(2).norm(dim=2) / mask.mean((1, 2, 3))[:, None]


def _first_block(model: DiffusionModel) -> list[CrossAttentionLayer]:
    layers = list(model.cross_attention.values())
    block = layers[0].name.split(".attentions.")[0]
    return [layer for layer in layers if layer.name.startswith(f"{block}.")]


def _as_latents(attention: Tensor, shape: torch.Size) -> Tensor:
    """(B, positions) as (B, 1, h, w), enlarged where the layer has fewer positions than the latents."""
    _, _, h, w = shape
    scale = round((h * w / attention.shape[1]) ** 0.5)
    mask = attention.reshape(-1, 1, h // scale, w // scale)
    return F.interpolate(mask, (h, w)) if scale > 1 else mask
