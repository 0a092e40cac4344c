"""Texts that a concept may be preserved by or turned into: near it, and at all distances from it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from pumice.erase.arguments import normalized, speaks_of
from pumice.models import DiffusionModel, RowBudget
from pumice.models.arguments import checked_count, checked_prompt

FREQUENT = 3000
SAME = 1e-2
"""How near an embedding is to that of a concept, relative to its norm, for the two to be one."""

_ROUNDS = 300  # of k-means, as scikit-learn's

Vocabulary = str | PathLike[str] | Sequence[str] | None


def candidates(
    model: DiffusionModel,
    concepts: Sequence[str],
    vocabulary: Vocabulary = None,
    *,
    nearest: int = 1000,
    centres: int = 100,
    rows: int = 64,
) -> list[tuple[str, ...]]:
    """For each concept some texts that stand for all distances at which a vocabulary lies from it.

    Distances are L2, of whole embeddings, (L D,) vectors. Of the nearest texts those are taken that lie
    closest to the centres of a k-means over the distances, numbers (Bui et al., arXiv:2410.15618). Left out
    is what has other characters than the letters a to z and spaces, what speaks of a concept, and what is
    read like one.

    Args:
        model: that reads them.
        concepts: that are erased.
        vocabulary: texts, or a file of one a line. Default: the first 3000 whole words of three letters or
            more in the tokenizer's vocabulary, which is sorted by how often they occurred together; they
            stand for the paper's 3000 frequent English words, and endings such as "ing" are among them.
        nearest: how many are clustered. Default 1000, of the paper for objects and artists.
        centres: how many are taken of each concept. Default 100, of the paper; fewer if texts lie at equal
            distances.
        rows: of a pass of the text encoder.

    Returns:
        The texts of each concept, nearest first.

    Raises:
        TypeError: for a vocabulary that has something else than strings.
        ValueError: for an empty one, one that cannot be read, and if every candidate is a concept itself.
    """
    nearest, centres = checked_count("nearest", nearest), checked_count("centres", centres)
    erased = [checked_prompt(model, concept).embeds.float().flatten() for concept in concepts]
    words = [
        word
        for word in _words(model, vocabulary)
        if not any(speaks_of(word, concept) for concept in concepts)
    ]
    distances = _distances(model, words, erased, rows)
    near = SAME * torch.stack([embeds.norm() for embeds in erased]).cpu()
    apart = (distances > near).all(1).nonzero().flatten()
    if not len(apart):
        raise ValueError("vocabulary: every candidate is the concept itself, expected others")
    found = []
    for of in distances[apart].T:
        values, order = of.sort(stable=True)
        picked = representatives(values[:nearest], centres)
        found.append(tuple(words[apart[order[place]]] for place in picked.tolist()))
    return found


def representatives(values: Tensor, count: int) -> Tensor:
    """Indices, ascending, of what is nearest to each of `count` centres of k-means over numbers (n,).

    Lloyd's algorithm from evenly spaced quantiles, without random numbers; two centres may have one nearest.
    """
    x = values.double()
    if len(x) <= count:
        return torch.arange(len(x))
    ordered = x.sort().values
    means = ordered[(torch.arange(count) * 2 + 1) * len(x) // (2 * count)]
    for _ in range(_ROUNDS):
        of = torch.bucketize(ordered, (means[1:] + means[:-1]) / 2)
        sizes = torch.bincount(of, minlength=count)
        sums = torch.zeros_like(means).index_add(0, of, ordered)
        before, means = means, torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
        if torch.equal(means, before):
            break
    return (x[:, None] - means).abs().argmin(0).unique()


def _words(model: DiffusionModel, vocabulary: Vocabulary) -> list[str]:
    """Each once, of letters and spaces alone."""
    if vocabulary is None:
        ids = model.tokenizers[0].get_vocab()
        whole = (token.removesuffix("</w>") for token in sorted(ids, key=ids.get) if token.endswith("</w>"))
        return [word for word in whole if re.fullmatch("[a-z]{3,}", word)][:FREQUENT]
    if isinstance(vocabulary, str | PathLike):
        try:
            given: Sequence[str] = Path(vocabulary).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"vocabulary: {os.fspath(vocabulary)!r} cannot be read ({reason})") from error
    elif isinstance(vocabulary, Sequence) and not isinstance(vocabulary, bytes):
        given = vocabulary
    else:
        raise TypeError(f"vocabulary: got a {type(vocabulary).__name__}, expected strings, or a file of them")
    found: dict[str, str] = {}
    for word in given:
        if not isinstance(word, str):
            raise TypeError(f"vocabulary: got a {type(word).__name__}, expected strings")
        if re.fullmatch("[a-z ]+", key := normalized(word)):
            found.setdefault(key, word.strip())
    if not found:
        got = f"{len(given)} texts with other characters" if given else "an empty list"
        raise ValueError(f"vocabulary: got {got}, expected words of the letters a to z")
    return [*found.values()]


@torch.no_grad()
def _distances(model: DiffusionModel, words: Sequence[str], erased: Sequence[Tensor], rows: int) -> Tensor:
    """|E_word - E_concept|, (words, concepts) float32 on the CPU; embeddings are not kept."""
    budget, found = RowBudget(rows), [torch.zeros(0, len(erased))]
    done = 0

    def some(most: int) -> Tensor:
        embeds = model.encode_prompt(words[done : done + most]).embeds.float().flatten(1)
        # not cdist, whose matrix products lose what is near
        return torch.stack([(embeds - concept).norm(dim=1) for concept in erased], 1).cpu()

    with model.frozen():
        while done < len(words):
            found.append(budget.run(some))
            done += len(found[-1])
    return torch.cat(found)
