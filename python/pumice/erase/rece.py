"""RECE: what still draws an erased concept is found and erased too (Gong et al., ECCV 2024)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_guides, checked_preserve, checked_texts, too_few_rows
from pumice.erase.closed_form import LinearMap, Preserved, SingularError, cholesky, solve
from pumice.erase.edits import edit_of, projections, residual
from pumice.erase.preserve import Preserve
from pumice.erase.rows import Texts, pairs
from pumice.models import DiffusionModel, Edit, Mapped, fingerprint

Regularizer = Literal["regzero", "standardreg", "surrogatereg", "surrogatereg_2nd", "surrogatereg_both"]
Preset = Literal["nudity", "unsafe", "artist", "hard_object", "easy_object"]


class _Preset(NamedTuple):
    ridge: float
    epochs: int
    guide: str = " "
    blank_for_each: bool = False  # the empty text is preserved once for each concept


_PRESETS: Mapping[str, _Preset] = {
    "nudity": _Preset(1e-1, 3, blank_for_each=True),
    "unsafe": _Preset(1e-1, 2, blank_for_each=True),
    "artist": _Preset(1e-3, 1, "art"),
    "hard_object": _Preset(1e-3, 1),
    "easy_object": _Preset(1e-1, 1),
}

_BLOCK = 192  # columns; of a Gram matrix half is enough
_START_LAMB = 0.1


@torch.no_grad()
def rece(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    guide: str | Sequence[str] | None = None,
    epochs: int | None = None,
    ridge: float | None = None,
    regularizer: Regularizer = "regzero",
    preset: Preset | None = None,
    preserve: str | Sequence[str] | Preserve = (),
    start: Edit | None = None,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
    lamb: float = 0.1,
) -> Edit:
    """Erase by UCE, then, in each epoch, the embeddings by which the edited model still draws the concepts.

    ::

        c' = argmin  sum_l |W_l M c' - W_l c|^2 + ridge |c'|^2        W_l M: the projections as edited so far
        M <- M M_epoch                                                M_epoch takes every c' to the guide

    (Gong et al., arXiv:2407.12383.) c is the embedding at each position of a concept's prompt, from BOS to
    the last padding, and so are c' and the guide's. The layers enter by H = sum_l W_l^T W_l alone: an epoch
    solves one d x d system for all concepts, c' = (ridge I + M^T H M)^-1 M^T H c.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is to be erased, each once.
        guide: what each concept becomes, one for all or one for each. By default the preset's.
        epochs: how often embeddings are derived and erased. By default the preset's.
        ridge: lambda_r. By default the preset's. 0 is exact, and needs weights of full rank.
        regularizer: what ridge stands before, other than |c'|^2 of "regzero", the paper's. "standardreg":
            |c' - g|^2, g the guide's embedding; "surrogatereg": sum_l |W_l M (c' - c)|^2, item "1st" of the
            released code, which leaves embeddings without a bound: for one epoch, at most two;
            "surrogatereg_2nd": |c' - c|^2; "surrogatereg_both": both of these.
        preset: the paper's ridge, epochs and guide by task, each of which the argument of its name overrides:
            "nudity" 0.1, 3, " "; "unsafe" (many unsafe words) 0.1, 2, " "; "artist" 0.001, 1, "art";
            "hard_object" (church) 0.001, 1, " "; "easy_object" (golf ball) 0.1, 1, " ". By default that of
            "easy_object", whose ridge most tasks share.
        preserve: texts that are to be read as before, beside the empty one; a `Preserve` of all tokens has
            encoded them once for many edits.
        start: the edit to begin with, one map for all key and value projections, as `uce` and this function
            make it. By default UCE of the same concepts on all tokens, with lamb 0.1 and a preserve_scale of
            max(0.1, 1 / n), rounded to three digits, for n texts counted with the empty one.
        erase_scale: eta of each epoch's edit. Default 1, as released.
        preserve_scale: gamma of each epoch's edit. Default 0.1, as released; "nudity" and "unsafe" count the
            empty text once for each concept.
        lamb: lambda of each epoch's edit. Default 0.1, as released.

    Returns:
        An `Edit`, the start included, at most of rank d. Its details have for each epoch and concept
        `derived_norms`, |c'| / |c|, and `derived_residual`, how far what the edited layers make of c' is from
        what the original ones make of c, relative to the latter.

    Differences from the released code: all in float64, which a ridge of 0.001 needs; no picture chooses the
    epoch that is kept. The pooled embedding of Stable Diffusion XL is left alone.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long concepts, a concept that is its own guide or preserved,
            negative scales, no epochs, ridge = 0 or "surrogatereg" for weights without full rank, lamb = 0
            without enough preserved rows, a start for another model or of several maps, or weights that are
            not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    if preset is not None and preset not in _PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(_PRESETS)}")
    if regularizer not in get_args(Regularizer):
        raise ValueError(
            f"regularizer: got {regularizer!r}, expected one of {', '.join(get_args(Regularizer))}"
        )
    task = _PRESETS[preset or "easy_object"]
    ridge = task.ridge if ridge is None else ridge
    epochs = task.epochs if epochs is None else epochs
    concepts = checked_texts("concepts", concepts)
    guides = checked_guides(task.guide if guide is None else guide, concepts)
    given = [text for text in preserve.texts if text] if isinstance(preserve, Preserve) else preserve
    given = checked_preserve(given, concepts)
    ridge = check_scale("ridge", ridge)
    erase_scale = check_scale("erase_scale", erase_scale)
    preserve_scale = check_scale("preserve_scale", preserve_scale)
    lamb = check_scale("lamb", lamb)
    epochs = operator.index(epochs)
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs}, expected at least 1")
    model = models.load(pipe)
    weights = projections(model)
    texts = Texts(model, padded=True)
    texts.encode((*concepts, *guides, ""))
    aligned = pairs(texts, concepts, guides, tokens="all")
    c = torch.stack([texts[concept].embeds for concept in concepts])
    g = torch.cat([texts[guide].embeds for guide in guides])
    base = fingerprint(model)
    if isinstance(preserve, Preserve):
        preserve.check(base, "all")
    else:
        preserve = Preserve(model, given, tokens="all", base=base)
        texts.calls += preserve.calls
    if start is None:
        # UCE on all tokens, as the released code begins
        kept = preserve.at(round(max(0.1, 1 / len(preserve.texts)), 3), c.device)
        found = solve(aligned.c, aligned.g, lamb=_START_LAMB, preserved=kept)
    else:
        found = _map_of(start, model, weights, c.device)
    preserved = preserve.at(preserve_scale, c.device)
    if task.blank_for_each and preserved is not None:
        blank = texts[""].embeds
        more = (len(concepts) - 1) * preserve_scale * (blank.T @ blank)
        preserved = Preserved(preserved.gram + more, preserved.rows)
    h = gram_of_weights(weights, c.device)
    norms, misses = [], []
    for _ in range(epochs):
        try:
            new = derived(h, found, c.flatten(0, 1), g, ridge=ridge, regularizer=regularizer)
        except SingularError as error:
            raise ValueError(
                f"ridge: got {ridge} with {regularizer!r}, expected a positive one, and another regularizer "
                f"than 'surrogatereg' ({error})"
            ) from error
        norms.append((new.view_as(c).norm(dim=(1, 2)) / c.norm(dim=(1, 2))).tolist())
        misses.append(_misses(h, found, new.view_as(c), c))
        try:
            step = solve(new, g, erase_scale=erase_scale, lamb=lamb, preserved=preserved)
        except SingularError as error:
            raise too_few_rows(lamb, error) from error
        found = found.then(step)
    settings = {
        "guide": list(guides),
        "epochs": epochs,
        "ridge": ridge,
        "regularizer": regularizer,
        "preset": preset,
        "preserve": list(given),
        "start": None if start is None else {"method": start.method, "targets": list(start.targets)},
        "erase_scale": erase_scale,
        "preserve_scale": preserve_scale,
        "lamb": lamb,
    }
    return edit_of(
        model,
        dict.fromkeys(weights, found),
        method="rece",
        concepts=tuple(dict.fromkeys((*(start.targets if start else ()), *concepts))),
        settings=settings,
        texts=texts,
        residual=residual(found, aligned.c, aligned.g),
        details={"derived_norms": norms, "derived_residual": misses},
        base=base,
    )


def gram_of_weights(weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """H = sum_l W_l^T W_l, (d, d) float64: how the outputs of all layers together measure an embedding."""
    width = next(iter(weights.values())).shape[1]
    h = torch.zeros(width, width, dtype=torch.float64, device=device)
    for weight in weights.values():
        wide = weight.to(device, torch.float64)
        for start in range(0, width, _BLOCK):  # the upper triangle, in blocks
            block = wide[:, start : start + _BLOCK]
            h[start : start + _BLOCK, start:].addmm_(block.T, wide[:, start:])
    return h.triu() + h.triu(1).T


def derived(
    h: Tensor, found: LinearMap, c: Tensor, g: Tensor, *, ridge: float, regularizer: Regularizer = "regzero"
) -> Tensor:
    """Embeddings c' that the edited layers read as the original ones read c, as far as the regularizer lets.

    ::

        A = a M^T H M + b I        c' = c + A^-1 (M^T H (I - M) c + ridge (t - c))

        regzero              a = 1            b = ridge    t = 0
        standardreg          a = 1            b = ridge    t = g
        surrogatereg         a = 1 + ridge    b = 0        t = c
        surrogatereg_2nd     a = 1            b = ridge    t = c
        surrogatereg_both    a = 1 + ridge    b = ridge    t = c

    Without an edit, and with ridge = 0, c' is c to the bit.

    Args:
        h: (d, d) float64, `gram_of_weights`.
        found: M.
        c: (n, d) float64.
        g: the guide's embeddings, (n, d), for "standardreg".
        ridge: lambda_r.

    Raises:
        SingularError: for ridge = 0, or "surrogatereg", where M^T H M has no full rank.
    """
    delta, moved = found.delta(), found.step(c)
    hm = h + h @ delta
    a = hm + delta.T @ hm
    if regularizer in ("surrogatereg", "surrogatereg_both"):
        a *= 1 + ridge
    if regularizer != "surrogatereg":
        a.diagonal().add_(ridge)
    factor = cholesky(a)
    way = -moved @ hm
    if regularizer == "regzero":
        way -= ridge * c
    elif regularizer == "standardreg":
        way += ridge * (g - c)
    return c + torch.cholesky_solve(way.T, factor).T


def _misses(h: Tensor, found: LinearMap, new: Tensor, c: Tensor) -> list[float]:
    """|W (M c' - c)| / |W c| over all layers and positions of each concept, (n, L, d)."""
    off = found(new) - c
    return (((off @ h) * off).sum((1, 2)).clamp(min=0) / ((c @ h) * c).sum((1, 2))).sqrt().tolist()


def _map_of(
    start: Edit, model: DiffusionModel, weights: Mapping[str, Tensor], device: torch.device
) -> LinearMap:
    """The one map of an edit for this model."""
    start.check_fits(model)
    change = next(iter(start.changes.values()), None)
    shared = all(other is change for other in start.changes.values())
    if not isinstance(change, Mapped) or not shared or start.changes.keys() != weights.keys():
        raise ValueError(
            f"start: got an edit by {start.method} of {len(start.changes)} weights, expected one map for all "
            f"{len(weights)} key and value projections"
        )
    return LinearMap(change.up.to(device, torch.float64), change.down.to(device, torch.float64))
