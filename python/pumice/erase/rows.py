"""From texts to rows of tokens: what stands where in the encoded concepts, guides and preserved texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pumice.erase.closed_form import Preserved
from pumice.models import DiffusionModel, PromptTokens

Tokens = Literal["last", "all"]

EXPANSION = ("a painting of {}", "an image of {}", "a photo of {}", "a portrait of {}", "a drawing of {}")
"""What a concept is put into besides standing alone, where a method expands prompts."""

_TEXTS_A_CALL = 64


@dataclass(frozen=True, eq=False)
class Encoded:
    """One text: embeds (L, d) and pooled (p,), float64, and where its tokens stand."""

    embeds: Tensor
    pooled: Tensor | None
    tokens: PromptTokens

    @property
    def last(self) -> int:
        """The position of the last content token; that of BOS in an empty text."""
        return self.tokens.eos - 1


class Texts:
    """Texts of one model by themselves, each encoded once, in batches.

    Attributes:
        calls: of the text encoder so far.
    """

    def __init__(self, model: DiffusionModel, *, padded: bool) -> None:
        """padded: whether rows of padding are wanted; without them the encoder has less to do."""
        self._model, self._padded = model, padded
        self._known: dict[str, Encoded] = {}
        self.calls = 0

    @torch.no_grad()
    def encode(self, texts: Iterable[str]) -> None:
        """Encode what is not known yet."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), _TEXTS_A_CALL):
            block = new[start : start + _TEXTS_A_CALL]
            with self._model.frozen():
                found = self._model.encode_prompt(block, padded=self._padded)
            self.calls += 1
            if not all(bool(x.isfinite().all()) for x in (found.embeds, found.pooled) if x is not None):
                raise ValueError(f"pipe: its text embeddings are not finite in {self._model.dtype}")
            pooled = [None] * len(block) if found.pooled is None else list(found.pooled.double())
            for text, embeds, vector, tokens in zip(
                block, found.embeds.double(), pooled, found.tokens, strict=True
            ):
                self._known[text] = Encoded(embeds, vector, tokens)

    def __getitem__(self, text: str) -> Encoded:
        self.encode([text])
        return self._known[text]

    def end(self, beginning: str, in_text: str) -> int:
        """The position of the last token of `beginning` in a text that begins with it."""
        if beginning == in_text:
            return self[in_text].last
        return self._model.tokenize(beginning)[0].eos - 1


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows to edit, what each shall become, and to which concept it belongs.

    Attributes:
        c, g: (m, d) float64.
        of: (m,) int64, the number of the concept.
        pooled: the same two of the pooled embeddings, (texts, p) each, or None.
    """

    c: Tensor
    g: Tensor
    of: Tensor
    pooled: tuple[Tensor, Tensor] | None


def pairs(
    texts: Texts,
    concepts: Sequence[str],
    guides: Sequence[str],
    *,
    tokens: Tokens,
    templates: Sequence[str] = ("{}",),
    name: str = "guide",
) -> Pairs:
    """Rows of each concept in each template, aligned with those of its guide in the same template.

    "last" is the concept's last token on the guide's last token. "all" is the concept's last token and
    everything behind it, EOS and padding too, up to where the shorter of both ends. name: of the guides.
    """
    filled = [
        (number, template.replace("{}", concept), template.replace("{}", guide), template.split("{}")[0])
        for number, (concept, guide) in enumerate(zip(concepts, guides, strict=True))
        for template in templates
    ]
    texts.encode(text for _, c, g, _ in filled for text in (c, g))
    rows_c, rows_g, of, pooled = [], [], [], []
    for number, c, g, start in filled:
        encoded, guide = texts[c], texts[g]
        check_fits(encoded, concepts[number])
        check_fits(guide, guides[number], name)
        a, b = (
            texts.end(start + part, in_text=whole)
            for part, whole in ((concepts[number], c), (guides[number], g))
        )
        count = 1
        if tokens == "all":
            count = len(encoded.embeds) - max(a, b)
        rows_c.append(encoded.embeds[a : a + count])
        rows_g.append(guide.embeds[b : b + count])
        of += [number] * count
        if encoded.pooled is not None and guide.pooled is not None:
            pooled.append((encoded.pooled, guide.pooled))
    return Pairs(
        torch.cat(rows_c),
        torch.cat(rows_g),
        torch.tensor(of),
        (torch.stack([c for c, _ in pooled]), torch.stack([g for _, g in pooled])) if pooled else None,
    )


def preserved_rows(texts: Texts, preserve: Sequence[str], tokens: Tokens) -> Tensor:
    """The last content token of each text, or all of its rows, (p, d)."""
    texts.encode(preserve)
    found = [texts[text] for text in preserve]
    for text, encoded in zip(preserve, found, strict=True):
        check_fits(encoded, text, "preserve")
    if tokens == "last":
        return torch.stack([text.embeds[text.last] for text in found])
    return torch.cat([text.embeds for text in found])


def gram_of(
    model: DiffusionModel, texts: Texts, prompts: Sequence[str], name: str, scale: float = 1.0
) -> Preserved:
    """All tokens of prompts, be they very many; only the count of calls goes to `texts`.

    name: of the argument that the prompts come from.
    """
    gram, count = torch.zeros((), dtype=torch.float64), 0
    for found, calls in in_blocks(model, prompts, padded=True, name=name):
        rows = torch.cat([encoded.embeds for encoded in found])
        gram, count = gram.to(rows) + scale * (rows.T @ rows), count + len(rows)
        texts.calls += calls
    return Preserved(gram, count)


def in_blocks(
    model: DiffusionModel, prompts: Sequence[str], *, padded: bool, name: str
) -> Iterator[tuple[list[Encoded], int]]:
    """Prompts encoded block by block, and the calls that each block took: none of them is kept.

    name: of the argument that the prompts come from.
    """
    for start in range(0, len(prompts), _TEXTS_A_CALL):
        block, texts = prompts[start : start + _TEXTS_A_CALL], Texts(model, padded=padded)
        texts.encode(block)
        for prompt in block:
            check_fits(texts[prompt], prompt, name)
        yield [texts[prompt] for prompt in block], texts.calls


def check_fits(encoded: Encoded, text: str, name: str = "concepts") -> None:
    """Refuse a text whose end the text encoder never sees."""
    if encoded.tokens.truncated:
        raise ValueError(
            f"{name}: {text[:60]!r} is longer than the text encoder takes, "
            f"{encoded.tokens.truncated[-40:]!r} does not fit"
        )
