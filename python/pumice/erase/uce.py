"""Unified Concept Editing: concepts become other concepts, or nothing (Gandikota et al., WACV 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

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
from pumice.erase.closed_form import (
    LinearMap,
    SingularError,
    down_factor,
    solve,
    sweep_erase_scale,
    sweep_lamb,
)
from pumice.erase.edits import POOLED, edit_of, pooled_linear, pooled_map, projections, residual
from pumice.erase.preserve import Preserve
from pumice.erase.rows import EXPANSION, Pairs, Texts, Tokens, pairs
from pumice.models import Edit, fingerprint

Technique = Literal["replace", "tensor"]
ConceptType = Literal["object", "art", "unsafe"]

_GUIDES: Mapping[str, str] = {"object": "", "art": "art", "unsafe": ""}


@torch.no_grad()
def uce(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    guide: str | Sequence[str] | None = None,
    concept_type: ConceptType = "object",
    preserve: str | Sequence[str] | Preserve = (),
    technique: Technique = "replace",
    tokens: Tokens = "last",
    expand: bool | Sequence[str] = False,
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    lamb: float = 0.5,
    pooled: bool = False,
) -> Edit:
    """Edit every key and value projection so that concepts are read as their guides, and the rest stays.

    ::

        W' = argmin  eta sum_i |W' c_i - v_i|^2 + gamma sum_j |W' p_j - W p_j|^2 + lambda |W' - W|^2

        replace    v_i = W g_i
        tensor     V_i = G_i W^T - <u, G_i W^T> u,   u = C_i W^T / |C_i W^T|   over a concept's rows C_i

    (Gandikota et al., arXiv:2308.14761.) c, g, p are token embeddings of concepts, guides, preserved texts.
    `replace` has one map for all layers, W' = W M; for `tensor` each layer adds one number a concept. To
    *moderate* is to replace by the empty text: `concept_type="unsafe"`. To *debias* is `debias`.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is to be erased, each once.
        guide: what each concept becomes, one for all or one for each; "" is the embedding of BOS. By default
            that of `concept_type`, the released code's.
        concept_type: "object" and "unsafe" become "", "art" (a style, an artist) becomes "art".
        preserve: texts that are to be read as before; a `Preserve` has encoded them once for many edits.
        technique: "replace", or "tensor", which only takes away what points along the concept.
        tokens: "last" edits the last token of a concept, as the released code does since 2025; "all" also
            everything behind it, EOS and padding, as the code of the published results did.
        expand: True also edits each concept within `EXPANSION`; a list of templates with "{}" names others.
        erase_scale: eta. Default 1.
        preserve_scale: gamma. By default 1 with "last"; with "all" max(0.1, 1 / n) for n texts counted with
            the empty one, all of whose tokens are then preserved too, as the published code has it.
        lamb: lambda. Default 0.5, as released.
        pooled: also map the pooled text embedding of Stable Diffusion XL, concept to guide, by a map of its
            own in `add_embedding.linear_1`. The published code leaves it, and with it what it tells of the
            concept.

    Returns:
        An `Edit`. Its rank is the number of edited rows, with "last" one a concept and template.

    Differences from the released code: one float64 factorisation for all layers, and distinct texts are
    encoded once; the result is that of the formula. EXPANSION has five templates, not the released ones.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long concepts, a concept that is its own guide or preserved,
            negative scales, lamb = 0 without enough preserved rows, or weights that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    erase_scale, lamb = check_scale("erase_scale", erase_scale), check_scale("lamb", lamb)
    if technique not in ("replace", "tensor"):
        raise ValueError(f"technique: got {technique!r}, expected 'replace' or 'tensor'")
    problem = _Problem(pipe, concepts, guide, concept_type, preserve, tokens, expand, preserve_scale, pooled)
    settings = problem.settings | {"technique": technique, "erase_scale": erase_scale, "lamb": lamb}
    found, preserved = problem.rows, problem.preserved
    targets = found.g
    try:
        if technique == "replace":
            shared = solve(found.c, found.g, erase_scale=erase_scale, lamb=lamb, preserved=preserved)
            maps = dict.fromkeys(problem.weights, shared)
        else:
            down, condition = down_factor(found.c, erase_scale=erase_scale, lamb=lamb, preserved=preserved)
            maps = {}
            for name, weight in problem.weights.items():
                projected = _projected(weight, found)
                maps[name] = LinearMap(erase_scale * (projected - found.c).T, down, condition).compact()
                targets = projected if len(maps) == 1 else targets
        if found.pooled is not None and pooled:
            maps |= problem.pooled(erase_scale, lamb)
    except SingularError as error:
        raise too_few_rows(lamb, error) from error
    return problem.edit("uce", maps, settings, targets)


@torch.no_grad()
def uce_sweep(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    erase_scale: float | Iterable[float] = 1.0,
    lamb: float | Iterable[float] = 0.5,
    guide: str | Sequence[str] | None = None,
    concept_type: ConceptType = "object",
    preserve: str | Sequence[str] | Preserve = (),
    tokens: Tokens = "last",
    expand: bool | Sequence[str] = False,
    preserve_scale: float | None = None,
) -> list[Edit]:
    """`uce` for each of several erase scales or lambdas, by one eigendecomposition.

    `models.hook_edits` then draws with all of them in one batch.

    Args: as `uce`; exactly one of erase_scale and lamb is a sequence.

    Returns:
        One `Edit` for each value, as `uce` would make it.

    Raises:
        As `uce`, and ValueError unless one of the two is a sequence.
    """
    if isinstance(erase_scale, Iterable) == isinstance(lamb, Iterable):
        raise ValueError("erase_scale, lamb: expected one of them to be a sequence, the other a number")
    swept = "erase_scale" if isinstance(erase_scale, Iterable) else "lamb"
    values = tuple(erase_scale) if isinstance(erase_scale, Iterable) else tuple(lamb)  # type: ignore[arg-type]
    if not values:
        raise ValueError(f"{swept}: got none, expected at least one")
    values = tuple(check_scale(swept, value, positive=swept == "lamb") for value in values)
    problem = _Problem(pipe, concepts, guide, concept_type, preserve, tokens, expand, preserve_scale, False)
    c, g, preserved = problem.rows.c, problem.rows.g, problem.preserved
    if swept == "erase_scale":
        fixed = {"lamb": check_scale("lamb", lamb)}  # type: ignore[arg-type]
        found = sweep_erase_scale(c, g, values, preserved=preserved, **fixed)
    else:
        fixed = {"erase_scale": check_scale("erase_scale", erase_scale)}  # type: ignore[arg-type]
        found = sweep_lamb(c, g, values, preserved=preserved, **fixed)
    try:
        maps = list(found)
    except SingularError as error:
        raise too_few_rows(fixed["lamb"], error) from error
    common = problem.settings | {"technique": "replace", **fixed}
    return [
        problem.edit("uce", dict.fromkeys(problem.weights, one), common | {swept: value}, g)
        for one, value in zip(maps, values, strict=True)
    ]


class _Problem:
    """The checked arguments of one call, and the rows that they come to."""

    def __init__(
        self,
        pipe: Any,
        concepts: str | Sequence[str],
        guide: str | Sequence[str] | None,
        concept_type: ConceptType,
        preserve: str | Sequence[str] | Preserve,
        tokens: Tokens,
        expand: bool | Sequence[str],
        preserve_scale: float | None,
        pooled: bool,
    ) -> None:
        if concept_type not in _GUIDES:
            raise ValueError(f"concept_type: got {concept_type!r}, expected one of {', '.join(_GUIDES)}")
        if tokens not in ("last", "all"):
            raise ValueError(f"tokens: got {tokens!r}, expected 'last' or 'all'")
        self._concepts = checked_texts("concepts", concepts)
        guides = checked_guides(_GUIDES[concept_type] if guide is None else guide, self._concepts)
        given = [text for text in preserve.texts if text] if isinstance(preserve, Preserve) else preserve
        kept = checked_preserve(given, self._concepts)
        if isinstance(expand, bool):
            expand = EXPANSION if expand else ()
        templates = tuple(dict.fromkeys(("{}", *checked_templates("expand", expand))))
        if preserve_scale is None:
            preserve_scale = 1.0 if tokens == "last" else max(0.1, 1 / (1 + len(kept)))
        preserve_scale = check_scale("preserve_scale", preserve_scale)
        self._model = models.load(pipe)
        self.weights = projections(self._model)
        self._linear = pooled_linear(self._model) if pooled else None
        self._base = fingerprint(self._model)
        self._texts = Texts(self._model, padded=tokens == "all")
        self.rows = pairs(self._texts, self._concepts, guides, tokens=tokens, templates=templates)
        if isinstance(preserve, Preserve):
            preserve.check(self._base, tokens)
        else:
            preserve = Preserve(self._model, kept, tokens=tokens, base=self._base)
            self._texts.calls += preserve.calls
        self._kept, self._scale = preserve, preserve_scale
        self.preserved = preserve.at(preserve_scale, self.rows.c.device)
        self.settings = {
            "guide": list(guides),
            "preserve": list(preserve.texts),
            "tokens": tokens,
            "templates": list(templates),
            "preserve_scale": preserve_scale,
            "pooled": pooled,
        }

    def pooled(self, erase_scale: float, lamb: float) -> dict[str, LinearMap]:
        """The second map, of pooled embeddings."""
        assert self._linear is not None and self.rows.pooled is not None
        preserved = self._kept.pooled_at(self._scale, self.rows.c.device)
        found = solve(*self.rows.pooled, erase_scale=erase_scale, lamb=lamb, preserved=preserved)
        return {f"{POOLED}.weight": pooled_map(self._linear, found)}

    def edit(
        self, method: str, maps: Mapping[str, LinearMap], settings: Mapping[str, Any], targets: Tensor
    ) -> Edit:
        first = next(iter(maps.values()))
        return edit_of(
            self._model,
            maps,
            method=method,
            concepts=self._concepts,
            settings=settings,
            texts=self._texts,
            residual=residual(first, self.rows.c, targets),
            base=self._base,
        )


def _projected(weight: Tensor, found: Pairs) -> Tensor:
    """Rows g - beta c whose outputs are those of g without what points along the concept's."""
    weight = weight.to(found.c.device, torch.float64)
    before, after = found.c @ weight.T, found.g @ weight.T
    of = found.of.to(found.c.device)
    count = int(of.max()) + 1
    along = torch.zeros(count, dtype=torch.float64, device=of.device)
    length = along.clone()
    along.index_add_(0, of, (before * after).sum(1))
    length.index_add_(0, of, before.square().sum(1))
    beta = along / length.clamp(min=torch.finfo(torch.float64).tiny)
    return found.g - beta[of][:, None] * found.c
