"""TRCE, stage 1: the EOS of a malicious prompt becomes that of a safe one (Chen et al., ICCV 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import (
    check_scale,
    checked_guides,
    checked_preserve,
    checked_templates,
    checked_texts,
    too_few_rows,
)
from pumice.erase.closed_form import SingularError, solve
from pumice.erase.edits import edit_of, projections, residual
from pumice.erase.rows import Texts, check_fits, gram_of
from pumice.models import Edit

Token = Literal["bos", "keyword", "first_eos", "last_eos"]

TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "a painting of {}",
    "a drawing of {}",
    "a film still of {}",
    "a poster of {}",
    "a detailed image of {}",
    "a blurred photo of {}",
    "an old photo of {}",
    "a photo of {} at night",
    "a photo of {} in a room",
    "a photo of {} outdoors",
    "a picture of {} seen from behind",
    "two pictures of {}",
    "somebody painted {}",
)
"""What concepts and safe texts are put into."""

TOKEN_WEIGHTS: Mapping[Token, float] = MappingProxyType({"first_eos": 1.0})
"""The paper's: of all tokens the first EOS alone."""


@torch.no_grad()
def trce(
    pipe: Any,
    concepts: str | Sequence[str],
    safe: str | Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    token_weights: Mapping[Token, float] = TOKEN_WEIGHTS,
    preserve: str | Sequence[str] = (),
    preserve_scale: float = 0.01,
    lamb: float = 0.0,
) -> Edit:
    """Edit every key and value projection so that a concept's EOS is read as that of a safe text.

    ::

        W' = argmin  sum_i w_i |W' c_i - W g_i|^2 + gamma sum_j |W' p_j - W p_j|^2 + lambda |W' - W|^2

    (Chen et al., arXiv:2503.07389, stage 1, textual semantic erasure.) c_i is a token of a concept in a
    template, g_i the same token of the safe text in the same template, p_j are all tokens of the preserved
    texts. The words themselves are left as they are: EOS, behind them, has gathered what they say together,
    also where none of them names the concept. Stage 2, which trains on trajectories, is no closed form and is
    not part of this edit.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is to be erased, in as many wordings as there are, each once; the paper has 20.
        safe: what each becomes, in a context as similar as possible, one for all or one for each.
        templates: texts with one "{}", into which both are put. Default `TEMPLATES`.
        token_weights: w by token: "bos", "keyword" (the last token of the concept, and of the safe text),
            "first_eos" and "last_eos" (the last position, padding as it may be). Those that are not named, or
            have 0, are left out. Default `TOKEN_WEIGHTS`, the paper's: "first_eos" 1.
        preserve: texts that are to be read as before, all their tokens. The paper's are the captions of COCO;
            without as many tokens as there are dimensions, lamb has to be positive.
        preserve_scale: gamma. Default 0.01, as released.
        lamb: lambda. Default 0, as released.

    Returns:
        An `Edit`. Its rank is the number of edited rows, and at most d: 15 a concept by default.

    Differences from the released code: one float64 factorisation for all layers, and distinct texts are
    encoded once; the templates are others; concepts and safe texts are given, no language model makes them.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long concepts, a concept that is its own safe text or
            preserved, templates without their one "{}", negative scales or weights, no positive weight,
            lamb = 0 without enough preserved rows, or weights of the model that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    concepts = checked_texts("concepts", concepts)
    guides = checked_guides(safe, concepts, "safe")
    templates = checked_templates("templates", templates, least=1)
    weights = _checked_weights(token_weights)
    kept = checked_preserve(preserve, concepts)
    preserve_scale = check_scale("preserve_scale", preserve_scale, positive=bool(kept))
    lamb = check_scale("lamb", lamb)
    model = models.load(pipe)
    projected = projections(model)
    texts = Texts(model, padded="last_eos" in weights)
    c, g = _weighted(texts, concepts, guides, templates, weights)
    preserved = gram_of(model, texts, kept, "preserve", preserve_scale) if kept else None
    try:
        found = solve(c, g, lamb=lamb, preserved=preserved)
    except SingularError as error:
        raise too_few_rows(lamb, error) from error
    return edit_of(
        model,
        dict.fromkeys(projected, found),
        method="trce",
        concepts=concepts,
        settings={
            "safe": list(guides),
            "templates": list(templates),
            "token_weights": weights,
            "preserve": list(kept),
            "preserve_scale": preserve_scale,
            "lamb": lamb,
        },
        texts=texts,
        residual=residual(found, c, g),
    )


def _checked_weights(token_weights: Mapping[Token, float]) -> dict[Token, float]:
    """The positive ones."""
    unknown = next((token for token in token_weights if token not in get_args(Token)), None)
    if unknown is not None:
        raise ValueError(f"token_weights: got {unknown!r}, expected {', '.join(get_args(Token))}")
    weights = {token: check_scale(f"token_weights[{token!r}]", w) for token, w in token_weights.items()}
    weights = {token: weight for token, weight in weights.items() if weight}
    if not weights:
        raise ValueError(f"token_weights: got {dict(token_weights)}, expected a positive one")
    return weights


def _weighted(
    texts: Texts,
    concepts: Sequence[str],
    guides: Sequence[str],
    templates: Sequence[str],
    weights: Mapping[Token, float],
) -> tuple[Tensor, Tensor]:
    """Rows sqrt(w) c and sqrt(w) g, (m, d) each: so weighed, they solve the equation without weights."""
    filled = [
        [(name, text, template.split("{}")[0] + text, template.replace("{}", text)) for name, text in pair]
        for pair in (
            (("concepts", concept), ("safe", guide)) for concept, guide in zip(concepts, guides, strict=True)
        )
        for template in templates
    ]
    texts.encode(whole for pair in filled for *_, whole in pair)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    root = torch.tensor(list(weights.values()), dtype=torch.float64).sqrt()[:, None]
    for pair in filled:
        for rows, (name, text, start, whole) in zip(sides, pair, strict=True):
            encoded = texts[whole]
            check_fits(encoded, text, name)
            places = {
                "bos": encoded.tokens.bos,
                "keyword": texts.end(start, in_text=whole),
                "first_eos": encoded.tokens.eos,
                "last_eos": len(encoded.embeds) - 1,
            }
            at = [places[token] for token in weights]
            rows.append(root.to(encoded.embeds) * encoded.embeds[at])
    return torch.cat(sides[0]), torch.cat(sides[1])
