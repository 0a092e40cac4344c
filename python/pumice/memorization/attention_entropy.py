"""Entropy of the cross-attention (Ren et al., ECCV 2024)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pumice.models import watch_attention

from .engine import Rows, Screen
from .metric import Metric

_LAST = 10  # steps at the end of a trajectory


class _Enough(Exception):
    """What was looked for has been seen; the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class AttentionEntropy(Metric):
    """How spread the attention of a picture is over the tokens of its prompt (arXiv:2403.11052).

    ::

        a_i = attention to token i, mean over positions and heads (and layers)
        form "layer":       E = -sum_i a_i log a_i    of one layer at the first step
        form "trajectory":  D = mean over the last 10 steps of E_t + |mean over them of E'_t - E'_T|

    where E' sums only over the summary tokens, EOS and padding, and E_t is of the mean over all layers.
    Attention is that of the conditional half.

    Attributes:
        form: default "layer", which stops the forward pass at the layer that it needs.
        layer: its place in the order of execution. Default 3, the released code's.
        variant: "paper"; "code" takes the signed difference of E', as the released code does.
    """

    name: ClassVar[str] = "attention_entropy"
    form: Literal["layer", "trajectory"] = "layer"
    layer: int = 3
    variant: Literal["paper", "code"] = "paper"

    def columns(self, screen: Screen) -> tuple[str, ...]:
        if self.form not in ("layer", "trajectory"):
            raise ValueError(f"form: got {self.form!r}, expected 'layer' or 'trajectory'")
        if self.variant not in ("paper", "code"):
            raise ValueError(f"variant: got {self.variant!r}, expected 'paper' or 'code'")
        timesteps = screen.sampler.timesteps.tolist()
        if self.form == "layer":
            count = len(screen.model.cross_attention)
            if not 0 <= self.layer < count:
                raise ValueError(f"layer: got {self.layer}, expected 0 to {count - 1}")
            return (f"entropy at t={timesteps[0]}, layer {self.layer}",)
        if len(timesteps) <= _LAST:
            raise ValueError(
                f"num_inference_steps: got {len(timesteps)}, expected more than the {_LAST} steps averaged"
            )
        return ("entropy", "change of the summary tokens' entropy")

    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        return self._of_layer(screen, rows) if self.form == "layer" else self._of_trajectory(screen, rows)

    def score(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def _of_layer(self, screen: Screen, rows: Rows) -> Tensor:
        layer = list(screen.model.cross_attention.values())[self.layer]
        found: list[Tensor] = []

        def observe(name: str, probabilities: Tensor) -> None:
            found.append(_entropies(probabilities.mean((1, 2))).sum(1, keepdim=True))
            raise _Enough

        with watch_attention([layer], observe), suppress(_Enough):
            screen.predict(screen.noise[rows.seed], 0, rows.prompts)
        return found[0]

    def _of_trajectory(self, screen: Screen, rows: Rows) -> Tensor:
        steps = len(screen.sampler.timesteps)
        positions = torch.arange(rows.prompts.embeds.shape[1], device=screen.model.device)
        summary = positions >= rows.eos[:, None]
        screen.unconditional(0)  # not to be seen
        seen: dict[str, Tensor] = {}  # of the latest call, the conditional one

        def observe(name: str, probabilities: Tensor) -> None:
            seen[name] = probabilities.mean((1, 2))

        whole, parts = [], []
        with watch_attention(screen.model.cross_attention.values(), observe):
            for step in screen.trajectory(rows, steps):
                if step.index == 0 or step.index >= steps - _LAST:
                    entropies = _entropies(torch.stack(list(seen.values())).mean(0))
                    whole.append(entropies.sum(1))
                    parts.append((entropies * summary).sum(1))
        change = torch.stack(parts[1:]).mean(0) - parts[0]
        return torch.stack(
            [torch.stack(whole[1:]).mean(0), change.abs() if self.variant == "paper" else change], dim=1
        )


def _entropies(attention: Tensor) -> Tensor:
    """-a log a, 0 at 0."""
    return torch.special.entr(attention)
