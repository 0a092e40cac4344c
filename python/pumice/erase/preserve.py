"""Texts that are to be read as before: encoded once, and solved for once, for any number of edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import checked_preserve
from pumice.erase.closed_form import Preserved
from pumice.erase.rows import Tokens, in_blocks
from pumice.models import DiffusionModel, fingerprint


class Preserve:
    """Texts to preserve in one model, to be given to `uce` again and again.

    ::

        artists = erase.Preserve(pipe, names)
        edits = [erase.uce(pipe, name, preserve=artists) for name in requests]

    A call that is given texts encodes and factorises them each time; this keeps the Gram matrix of their
    rows, P^T P (d, d), and its factorisations. Any number of texts takes the same memory.

    Args:
        pipe: as for `uce`; the edits have to be of a model with the same weights.
        texts: each counts once, whatever its case and spacing.
        tokens: "last" keeps the last token of each, "all" every row of each and of the empty text; as that of
            the edits.
        base: the model's fingerprint, if that is known.

    Attributes:
        texts: with the empty one first where it is preserved, too.
        tokens: as given.
        calls: of the text encoder.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank or too long texts, and another `tokens`.
        UnsupportedModelError: for families without cross-attention.
    """

    @torch.no_grad()
    def __init__(
        self, pipe: Any, texts: str | Sequence[str], *, tokens: Tokens = "last", base: str | None = None
    ) -> None:
        if tokens not in ("last", "all"):
            raise ValueError(f"tokens: got {tokens!r}, expected 'last' or 'all'")
        found = checked_preserve(texts, (), "texts")
        model = models.load(pipe)
        self.tokens, self.texts = tokens, ("", *found) if tokens == "all" else found
        self.calls = 0
        self._base = base or fingerprint(model)
        self._gram, self._rows, self._pooled = self._grams(model)
        self._scaled: dict[tuple[float, torch.device], Preserved] = {}

    def at(self, scale: float, device: torch.device) -> Preserved | None:
        """gamma P^T P of the rows; None if there are no texts."""
        if not self.texts:
            return None
        if (scale, device) not in self._scaled:
            self._scaled[scale, device] = Preserved(scale * self._gram.to(device), self._rows)
        return self._scaled[scale, device]

    def pooled_at(self, scale: float, device: torch.device) -> Preserved | None:
        """The same of pooled embeddings, for models that have them."""
        if self._pooled is None:
            return None
        return Preserved(scale * self._pooled.to(device), len(self.texts))

    def check(self, base: str, tokens: Tokens) -> None:
        """Raise ValueError unless it is of the model with this fingerprint, and of these tokens."""
        if self._base != base:
            raise ValueError("preserve: it was encoded by a model with other weights than pipe's")
        if self.tokens != tokens:
            raise ValueError(f"preserve: it keeps tokens={self.tokens!r}, expected {tokens!r} as the edit")

    def _grams(self, model: DiffusionModel) -> tuple[Tensor, int, Tensor | None]:
        """P^T P, the number of rows, and the Gram matrix of pooled embeddings."""
        every = self.tokens == "all"
        gram, rows, pooled = torch.zeros((), dtype=torch.float64), 0, None
        for found, calls in in_blocks(model, self.texts, padded=every, name="preserve"):
            p = torch.cat([one.embeds if every else one.embeds[one.last][None] for one in found])
            gram, rows = gram.to(p) + p.T @ p, rows + len(p)
            vectors = [one.pooled for one in found if one.pooled is not None]
            if vectors:
                q = torch.stack(vectors)
                pooled = q.T @ q if pooled is None else pooled + q.T @ q
            self.calls += calls
        return gram, rows, pooled
