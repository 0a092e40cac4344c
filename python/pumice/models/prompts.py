"""Prompts as a model sees them: embeddings, and which position holds which piece of which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A word of a prompt as the tokenizer splits it, and the positions of its pieces."""

    text: str
    positions: range


@dataclass(frozen=True)
class PromptTokens:
    """Where everything stands in a tokenized prompt of length L: BOS, content, EOS, padding.

    Attributes:
        ids: the L token ids.
        content: positions of the prompt's own tokens, between `bos` and `eos`.
        pads: positions behind `eos`.
        words: the words in order; together their positions are `content`.
        truncated: the end of the prompt that did not fit, "" if all did.
    """

    prompt: str
    ids: tuple[int, ...]
    bos: int
    content: range
    eos: int
    pads: range
    words: tuple[Word, ...]
    truncated: str

    def cut(self, length: int) -> PromptTokens:
        """Without the padding from `length` on."""
        return replace(self, ids=self.ids[:length], pads=range(self.eos + 1, length))


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts: what the denoiser attends to, and the bookkeeping of every prompt.

    Attributes:
        embeds: (B, L, D) in the text encoder's dtype.
        pooled: (B, P), for the families whose denoiser takes a pooled embedding too, else None.
        tokens: one entry a prompt; with two tokenizers, the first one's.
    """

    embeds: Tensor
    pooled: Tensor | None
    tokens: tuple[PromptTokens, ...]

    @property
    def truncated(self) -> list[str]:
        """The text dropped from each prompt, "" where all fitted."""
        return [tokens.truncated for tokens in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | Sequence[int]) -> PromptEmbeds:
        """The prompts at `index`, always as a batch; of a slice a view, as of any tensor."""
        if isinstance(index, slice):
            pooled = None if self.pooled is None else self.pooled[index]
            return PromptEmbeds(self.embeds[index], pooled, self.tokens[index])
        rows = [index] if isinstance(index, int) else list(index)
        return PromptEmbeds(
            self.embeds[rows],
            None if self.pooled is None else self.pooled[rows],
            tuple(self.tokens[row] for row in rows),
        )

    def repeat(self, times: int) -> PromptEmbeds:
        """Every prompt `times` times in a row, as diffusers' num_images_per_prompt orders them."""
        return self[[row for row in range(len(self)) for _ in range(times)]]

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The prompts of all parts, in order."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEmbeds(
            torch.cat([part.embeds for part in parts]),
            torch.cat(pooled) if pooled else None,
            tuple(tokens for part in parts for tokens in part.tokens),
        )


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[PromptTokens, ...]:
    """Token bookkeeping of each prompt, truncated and padded to the tokenizer's `model_max_length`.

    The tokenizer is a fast one of transformers that frames a prompt by one BOS and one EOS, as CLIP's does.
    """
    length = tokenizer.model_max_length
    whole = tokenizer(list(prompts), truncation=False, return_offsets_mapping=True, verbose=False)
    rows = zip(
        prompts, whole["input_ids"], whole["offset_mapping"], map(whole.word_ids, count()), strict=False
    )
    return tuple(_bookkeeping(*row, length, tokenizer.pad_token_id) for row in rows)


def _bookkeeping(
    prompt: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    word_ids: list[int | None],
    length: int,
    pad_id: int,
) -> PromptTokens:
    last = len(ids) - 1  # the EOS of the whole prompt
    eos = min(last, length - 1)
    runs = [list(run) for _, run in groupby(range(1, last), key=word_ids.__getitem__)]
    words = [(run[0], run[-1] + 1) for run in runs]
    return PromptTokens(
        prompt=prompt,
        ids=(*ids[:eos], ids[last], *[pad_id] * (length - eos - 1)),
        bos=0,
        content=range(1, eos),
        eos=eos,
        pads=range(eos + 1, length),
        words=tuple(
            Word(prompt[offsets[first][0] : offsets[end - 1][1]], range(first, min(end, eos)))
            for first, end in words
            if first < eos
        ),
        truncated=prompt[offsets[eos][0] :] if eos < last else "",
    )
