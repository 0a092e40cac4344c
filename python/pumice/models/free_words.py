"""Words whose token embeddings are given, not those of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .model import DiffusionModel
from .prompts import PromptTokens

STAND_IN = "*"  # one token in every vocabulary of CLIP's kind


def stand_ins(tokens: int) -> str:
    """What a prompt has in the place of a word of so many tokens."""
    return " ".join([STAND_IN] * tokens)


def places(prompt: PromptTokens) -> list[int]:
    """Where a prompt has stand-ins that are words of their own."""
    return [place for word in prompt.words if word.text == STAND_IN for place in word.positions]


def initial_vectors(model: DiffusionModel, initial: str, tokens: int) -> list[Tensor]:
    """What each text encoder reads in the place of a word at first, (tokens, d) float32.

    initial: a text of as many tokens, or else their mean in every place.
    """
    found = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        pieces = tokenizer(initial, add_special_tokens=False).input_ids
        if not pieces:
            raise ValueError(f"initial: got {initial!r}, expected a word")
        table = encoder.get_input_embeddings().weight.detach()
        known = table[torch.tensor(pieces, device=table.device)].float()
        found.append(known.clone() if len(known) == tokens else known.mean(0).repeat(tokens, 1))
    return found


@contextmanager
def reading(
    model: DiffusionModel, at: Sequence[Sequence[Sequence[int]]], vectors: Sequence[Tensor]
) -> Iterator[None]:
    """Inside the block each text encoder reads `vectors` at some places of the B prompts of a call.

    Args:
        at: (B, tokens), one a text encoder.
        vectors: (tokens, d) or (B, tokens, d), one a text encoder; gradients flow to them.
    """
    with ExitStack() as stack:
        for encoder, own, found in zip(model.text_encoders, at, vectors, strict=True):
            layer = encoder.get_input_embeddings()
            stack.callback(layer.register_forward_hook(partial(_replace, own, found)).remove)
        yield


def _replace(
    at: Sequence[Sequence[int]],
    vectors: Tensor,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    columns = torch.tensor(at, device=output.device)
    rows = torch.arange(len(columns), device=output.device)[:, None]
    return output.index_put((rows, columns), vectors.to(output).expand(len(columns), -1, -1))
