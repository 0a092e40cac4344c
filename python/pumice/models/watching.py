"""What cross-attention looks at, seen from outside: hooks, no other attention processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import CrossAttentionLayer


@contextmanager
def watch_attention(
    layers: Iterable[CrossAttentionLayer], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside the block, every call of a layer tells `observe` its name and what it attends to.

    ::

        softmax(q k^T / sqrt(d) + mask),   (B, heads, positions, tokens) float32

    The layer then computes its output as ever, by the processor it has: the product of q and k, a small share
    of a denoiser's work, is done twice. An exception of `observe` leaves the forward pass.
    """
    handles = [
        layer.module.register_forward_pre_hook(partial(_tell, layer.name, observe), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(
    name: str,
    observe: Callable[[str, Tensor], None],
    attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    observe(name, _probabilities(attention, *args, **kwargs))


def _probabilities(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    text = encoder_hidden_states
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    query, key = (
        projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for projected in (attention.to_q(hidden_states), attention.to_k(text))
    )
    logits = (query @ key.transpose(-1, -2)).float() * attention.scale
    if attention_mask is not None:
        logits = logits + attention_mask.float()[:, None]
    return logits.softmax(-1)
