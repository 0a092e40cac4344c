"""TIME: what a prompt leaves unsaid is edited, or what it says is replaced (Orgad et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from pumice import models
from pumice.erase.arguments import check_scale, checked_guides, checked_templates, checked_texts, too_few_rows
from pumice.erase.closed_form import SingularError, solve
from pumice.erase.edits import edit_of, projections, residual
from pumice.erase.rows import Texts
from pumice.models import Edit, PromptTokens

AUGMENTATIONS = ("A photo of {}", "An image of {}", "A picture of {}")
"""What source and destination are put into besides standing alone, as the published pipeline has it."""


@torch.no_grad()
def time(
    pipe: Any,
    sources: str | Sequence[str],
    destinations: str | Sequence[str],
    *,
    lamb: float = 0.1,
    templates: Sequence[str] = AUGMENTATIONS,
) -> Edit:
    """Edit every key and value projection so that a source prompt is read as its destination prompt.

    ::

        W' = argmin  sum_i |W' c_i - W c*_i|^2 + lambda |W' - W|^2

    (Orgad et al., arXiv:2303.08084.) c_i is the embedding at each position of the source, BOS, EOS and
    padding included, c*_i that of the corresponding position of the destination, see `corresponding`. Nothing
    is preserved: the method is the baseline that later ones improve on.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        sources: prompts that leave something open, "a pack of roses", or name what is to be erased.
        destinations: what each is to be read as, one for all or one for each: the source with more words, "a
            pack of blue roses", or, to erase, as many other words.
        lamb: lambda, positive. Default 0.1, the paper's.
        templates: texts with one "{}", into which source and destination are put too, each in the same.
            Default `AUGMENTATIONS`; () for the prompts alone.

    Returns:
        An `Edit` with one map for all layers, at most of rank d.

    Differences from the published pipeline: one float64 factorisation for all layers, and distinct texts are
    encoded once; several sources are edited in one solution; destinations may replace words.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long sources, a destination that is its own source or has no
            corresponding tokens, other templates, lamb <= 0, or weights that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    sources = checked_texts("sources", sources)
    destinations = checked_guides(destinations, sources, "destinations")
    templates = tuple(dict.fromkeys(("{}", *checked_templates("templates", templates))))
    lamb = check_scale("lamb", lamb, positive=True)
    model = models.load(pipe)
    weights = projections(model)
    texts = Texts(model, padded=True)
    filled = [
        (template.replace("{}", source), template.replace("{}", destination))
        for source, destination in zip(sources, destinations, strict=True)
        for template in templates
    ]
    texts.encode(text for pair in filled for text in pair)
    c = torch.cat([texts[source].embeds for source, _ in filled])
    g = torch.cat(
        [
            texts[destination].embeds[corresponding(texts[source].tokens, texts[destination].tokens)]
            for source, destination in filled
        ]
    )
    try:
        found = solve(c, g, lamb=lamb)
    except SingularError as error:
        raise too_few_rows(lamb, error) from error
    return edit_of(
        model,
        dict.fromkeys(weights, found),
        method="time",
        concepts=sources,
        settings={"destinations": list(destinations), "lamb": lamb, "templates": list(templates)},
        texts=texts,
        residual=residual(found, c, g),
    )


def corresponding(source: PromptTokens, destination: PromptTokens) -> list[int]:
    """For each position of the source, the corresponding one of the destination.

    A destination that has all tokens of the source, in order, may add others, which nothing corresponds to;
    "a" and "an" are one token. One that has not, but has as many words, corresponds word by word, the last
    pieces of two words to each other. From EOS on, positions correspond by their distance from EOS, those
    that the destination lacks to its last one.

    Raises:
        ValueError: if the destination corresponds in neither way, or a prompt is too long.
    """
    for name, tokens in (("sources", source), ("destinations", destination)):
        if tokens.truncated:
            raise ValueError(
                f"{name}: {tokens.prompt[:60]!r} is longer than the text encoder takes, "
                f"{tokens.truncated[-40:]!r} does not fit"
            )
    content = _in_order(source, destination)
    if content is None:
        content = _by_word(source, destination)
    last = len(destination.ids) - 1
    behind = [min(destination.eos + distance, last) for distance in range(len(source.ids) - source.eos)]
    return [destination.bos, *content, *behind]


def _in_order(source: PromptTokens, destination: PromptTokens) -> list[int] | None:
    """The first places where the destination has the source's tokens one after the other, or None."""
    there = iter(zip(_names(destination), destination.content, strict=True))
    found = [next((at for other, at in there if other == name), None) for name in _names(source)]
    places = [at for at in found if at is not None]
    return places if len(places) == len(found) else None


def _names(tokens: PromptTokens) -> list[Hashable]:
    """What each content token is called: its id, but "a" for both articles."""
    articles = {
        word.positions[0]
        for word in tokens.words
        if word.text.casefold() in ("a", "an") and len(word.positions) == 1
    }
    return ["a" if at in articles else tokens.ids[at] for at in tokens.content]


def _by_word(source: PromptTokens, destination: PromptTokens) -> list[int]:
    """The same piece of the same word counted from its end, or the word's first piece."""
    if len(source.words) != len(destination.words):
        raise ValueError(
            f"destinations: got {destination.prompt!r} for {source.prompt!r}, expected its words with others "
            "added, or as many words"
        )
    return [
        other.positions[max(0, piece + len(other.positions) - len(word.positions))]
        for word, other in zip(source.words, destination.words, strict=True)
        for piece in range(len(word.positions))
    ]
