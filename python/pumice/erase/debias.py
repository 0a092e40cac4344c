"""Debiasing in closed form: draw, measure, edit, until each attribute has its share (UCE, WACV 2024)."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.erase.arguments import (
    check_scale,
    checked_guides,
    checked_preserve,
    checked_texts,
    too_few_rows,
    warn,
)
from pumice.erase.closed_form import LinearMap, Preserved, SingularError, down_factor, solve
from pumice.erase.edits import edit_of, projections, residual
from pumice.erase.rows import Texts, Tokens, check_fits, preserved_rows
from pumice.models import DiffusionModel, Edit, Mapped, RowBudget, fingerprint, hook_edits

Variant = Literal["2025", "2023"]
Measure = Callable[[Tensor], Tensor]

_STEP = 0.1  # of the 2023 variant, in norms of what the model reads of the concept


@torch.no_grad()
def debias(
    pipe: Any,
    concepts: str | Sequence[str],
    attributes: Sequence[str],
    *,
    measure: Measure,
    desired: Sequence[float] | None = None,
    prompt: str = "{}",
    images: int = 10,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    tolerance: float = 0.05,
    max_iterations: int = 30,
    variant: Variant = "2025",
    tokens: Tokens | None = None,
    preserve: str | Sequence[str] = (),
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    lamb: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> Edit:
    """Edit every key and value projection until pictures of a concept show attributes as often as desired.

    ::

        2025    v_i = W c_i + sum_j alpha_ij W a_j,          alpha_ij <- alpha_ij + desired_j - ratio_ij
        2023    O_i <- O_i + 0.1 (desired_j - ratio_ij) |O_i| A_j W^T / |A_j W^T|   for each j in turn,
                from O_i = C_i W^T, with W as the last iteration left it

    (Gandikota et al., arXiv:2308.14761.) c, C and a, A are tokens of concepts and attributes, v and O what
    the edited W is to make of a concept's, by `uce`'s equation. Pictures are drawn and measured first without
    any edit, then after each; always from the same noise, so that only the edit makes a difference.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: whose pictures are to be balanced, such as "doctor".
        attributes: at least two texts, such as "male", "female".
        measure: of pictures (B, 3, H, W) float32 in [0, 1] on the CPU, which attribute each shows: (B,) int64
            numbers of attributes, or (B, attributes) floats such as probabilities, which are averaged. A
            picture that shows none is a row of zeros.
        desired: share of each attribute; together 1. By default the same for all.
        prompt: what is drawn, with one "{}" for the concept.
        images: a concept and iteration. Default 10, as released.
        num_inference_steps, guidance_scale: of the pipeline. Default 20 and 7.5, as released.
        tolerance: stop when every ratio is nearer than this to what is desired. Default 0.05.
        max_iterations: edits at most. Default 30.
        variant: "2025", the released code of that year, always edits the original weights, with coefficients
            that add up. "2023", the code of the published results, edits what it has edited; concepts within
            the tolerance are preserved meanwhile.
        tokens: which tokens of the concept, as in `uce`. By default "last" for "2025", "all" for "2023".
        preserve, erase_scale, preserve_scale, lamb: as in `uce`.
        seed: picture i of a concept starts from the noise of seed + i.
        progress: show a bar.

    Returns:
        An `Edit`, of all that were tried the one whose farthest ratio is the nearest; it changes nothing if
        the model is balanced already. `details["history"]` has the ratios of each iteration, one list a
        concept; `details["iteration"]` tells which one it is, and `details["balanced"]` whether it is within
        the tolerance.

    Differences from the released code: it measures by CLIP's zero-shot classification, and its last edit is
    the result; its step size, which it ignores, is left out. With "all", the rows of a concept and of all
    attributes are as many as the longest of these texts has.

    Raises:
        TypeError: for texts that are not strings, or a measure that does not return a tensor.
        ValueError: for blank, repeated or too long texts, an attribute that is a concept, shares that do not
            add up to 1, numbers out of range, what `measure` returns if it is no such thing, lamb = 0
            without enough preserved rows, or weights that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    if variant not in ("2025", "2023"):
        raise ValueError(f"variant: got {variant!r}, expected '2025' or '2023'")
    if tokens is None:
        tokens = "last" if variant == "2025" else "all"
    if tokens not in ("last", "all"):
        raise ValueError(f"tokens: got {tokens!r}, expected 'last' or 'all'")
    if not isinstance(prompt, str) or prompt.count("{}") != 1:
        raise ValueError(f"prompt: got {prompt!r}, expected a text with one {{}} for the concept")
    for name, number, least in (
        ("images", images, 1),
        ("num_inference_steps", num_inference_steps, 1),
        ("max_iterations", max_iterations, 0),
    ):
        if operator.index(number) < least:
            raise ValueError(f"{name}: got {number}, expected at least {least}")
    images, num_inference_steps, max_iterations, seed = map(
        operator.index, (images, num_inference_steps, max_iterations, seed)
    )
    guidance_scale = check_scale("guidance_scale", guidance_scale)
    erase_scale = check_scale("erase_scale", erase_scale)
    lamb = check_scale("lamb", lamb)
    if preserve_scale is not None:
        preserve_scale = check_scale("preserve_scale", preserve_scale)
    tolerance = check_scale("tolerance", tolerance, positive=True)
    concepts = checked_texts("concepts", concepts)
    attributes = checked_texts("attributes", attributes, least=2)
    for attribute in attributes:
        checked_guides(attribute, concepts, "attributes")
    shares = _checked_shares(desired, len(attributes))
    kept = checked_preserve(preserve, concepts)

    model = models.load(pipe)
    model.check_text_to_image()
    weights = projections(model)
    texts = Texts(model, padded=tokens == "all")
    problem = _Problem(
        weights=weights,
        texts=texts,
        concepts=concepts,
        rows=_rows(texts, concepts, attributes, tokens),
        preserve=("", *kept) if tokens == "all" else kept,
        tokens=tokens,
        erase_scale=erase_scale,
        preserve_scale=preserve_scale,
        lamb=lamb,
    )
    draw = _Drawing(model, num_inference_steps, guidance_scale, range(seed, seed + images))
    base = fingerprint(model)
    probe = Edit.made(model, {}, base=base, method="debias", targets=concepts)
    step = _Step.none(problem)
    alphas = torch.zeros(len(concepts), len(attributes), dtype=torch.float64)
    history: list[list[list[float]]] = []
    best, nearest = step, math.inf
    with tqdm(total=max_iterations, unit="edit", desc="debias", disable=not progress) as bar:
        while True:
            edit = replace(probe, changes=_changes(step.maps))
            ratios = torch.stack(
                [_ratios(measure, draw(prompt.replace("{}", text), edit), len(shares)) for text in concepts]
            )
            history.append(ratios.tolist())
            missing = shares - ratios
            farthest = float(missing.abs().max())
            if farthest < nearest:
                best, nearest, iteration = step, farthest, len(history) - 1
            bar.set_postfix(farthest=farthest)
            if farthest < tolerance or len(history) > max_iterations:
                break
            alphas = alphas + missing
            try:
                step = (
                    problem.shifted(alphas) if variant == "2025" else problem.moved(step, missing, tolerance)
                )
            except SingularError as error:
                raise too_few_rows(lamb, error) from error
            bar.update()
    if nearest >= tolerance:
        warn(
            f"the nearest ratios are {nearest:.2f} from what was desired, after {len(history) - 1} edits; "
            "more images measure better, max_iterations goes on"
        )
    return edit_of(
        model,
        best.maps,
        method="debias",
        concepts=concepts,
        settings={
            "attributes": list(attributes),
            "desired": shares.tolist(),
            "prompt": prompt,
            "images": images,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "variant": variant,
            "tokens": tokens,
            "preserve": list(kept),
            "erase_scale": erase_scale,
            "preserve_scale": preserve_scale,
            "lamb": lamb,
            "seed": seed,
        },
        texts=texts,
        residual=best.residual,
        details={"history": history, "iteration": iteration, "balanced": nearest < tolerance},
        base=base,
    )


@dataclass(frozen=True, eq=False)
class _Step:
    """The maps of all weights by name, and how far the last ones were from what they were to do."""

    maps: Mapping[str, LinearMap]
    residual: float

    @classmethod
    def none(cls, problem: _Problem) -> _Step:
        """No edit."""
        c = problem.rows[0][:1, 0]
        return cls(dict.fromkeys(problem.weights, LinearMap(torch.zeros_like(c).T, torch.zeros_like(c))), 0.0)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What every iteration solves.

    Attributes:
        rows: of each concept and, behind it, of each attribute, aligned: (1 + attributes, T, d).
        preserve: texts, with "" among them where the method has it.
    """

    weights: Mapping[str, Tensor]
    texts: Texts
    concepts: tuple[str, ...]
    rows: tuple[Tensor, ...]
    preserve: tuple[str, ...]
    tokens: Tokens
    erase_scale: float
    preserve_scale: float | None
    lamb: float
    _known: dict[tuple[str, ...], Preserved] = field(default_factory=dict)

    def shifted(self, alphas: Tensor) -> _Step:
        """W c becomes W (c + sum_j alpha_j a_j); one map for all layers."""
        c = torch.cat([rows[0] for rows in self.rows])
        g = torch.cat([_plus(rows, alpha) for rows, alpha in zip(self.rows, alphas, strict=True)])
        found = solve(
            c, g, erase_scale=self.erase_scale, lamb=self.lamb, preserved=self._preserved(self.preserve)
        )
        return _Step(dict.fromkeys(self.weights, found), residual(found, c, g))

    def moved(self, before: _Step, missing: Tensor, tolerance: float) -> _Step:
        """One more edit of each layer, by what its edited weights make of the rows."""
        off = (missing.abs() >= tolerance).any(1).tolist()
        balanced = tuple(text for text, moves in zip(self.concepts, off, strict=True) if not moves)
        moving = [(rows, by) for rows, by, moves in zip(self.rows, missing, off, strict=True) if moves]
        preserved = self._preserved((*self.preserve, *balanced))
        c = torch.cat([rows[0] for rows, _ in moving])
        down, condition = down_factor(c, erase_scale=self.erase_scale, lamb=self.lamb, preserved=preserved)
        maps, residuals = {}, []
        for name, weight in self.weights.items():
            weight = weight.to(c.device, torch.float64)
            edited = before.maps[name]
            g = torch.cat([_plus(rows, _betas(edited(rows) @ weight.T, by)) for rows, by in moving])
            found = LinearMap(self.erase_scale * (g - c).T, down, condition)
            maps[name] = edited.then(found)
            residuals.append(residual(found, c, g))
        return _Step(maps, sum(residuals) / len(residuals))

    def _preserved(self, kept: tuple[str, ...]) -> Preserved | None:
        if not kept:
            return None
        if kept not in self._known:
            scale = self.preserve_scale
            if scale is None:
                scale = 1.0 if self.tokens == "last" else max(0.1, 1 / len(kept))
            self._known[kept] = Preserved.of(preserved_rows(self.texts, kept, self.tokens), scale)
        return self._known[kept]


class _Drawing:
    """Draws a prompt from the noise of several seeds; what the caller's pipeline remembers stays as it is."""

    def __init__(
        self, model: DiffusionModel, num_inference_steps: int, guidance_scale: float, seeds: range
    ) -> None:
        self._model, self._seeds, self._budget = model, seeds, RowBudget(len(seeds))
        self._settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self._pipe = copy.copy(model.pipe)
        self._pipe.scheduler = copy.deepcopy(model.pipe.scheduler)
        self._pipe.set_progress_bar_config(disable=True)

    def __call__(self, prompt: str, edit: Edit) -> Tensor:
        """(B, 3, H, W) float32 on the CPU, in [0, 1]."""
        pictures: list[Tensor] = []

        def some(rows: int) -> Tensor:
            seeds = self._seeds[len(pictures) : len(pictures) + rows]
            found: Tensor = self._pipe(
                [prompt] * len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **self._settings,
            ).images
            return found

        with self._model.frozen(), hook_edits(self._model, [edit], base=edit.base):
            while len(pictures) < len(self._seeds):
                pictures += self._budget.run(some).float().cpu()
        return torch.stack(pictures)


def _changes(maps: Mapping[str, LinearMap]) -> dict[str, Mapped]:
    made = {id(found): Mapped.of(found.up, found.down) for found in maps.values()}
    return {name: made[id(found)] for name, found in maps.items()}


def _rows(
    texts: Texts, concepts: Sequence[str], attributes: Sequence[str], tokens: Tokens
) -> tuple[Tensor, ...]:
    """Of each concept and all attributes the last token, or that and all behind it, as many of each."""
    texts.encode((*concepts, *attributes))
    for name, group in (("concepts", concepts), ("attributes", attributes)):
        for text in group:
            check_fits(texts[text], text, name)
    found = []
    for concept in concepts:
        encoded = [texts[text] for text in (concept, *attributes)]
        count = 1
        if tokens == "all":
            count = min(len(one.embeds) - one.last for one in encoded)
        found.append(torch.stack([one.embeds[one.last : one.last + count] for one in encoded]))
    return tuple(found)


def _plus(rows: Tensor, factors: Tensor) -> Tensor:
    """The concept's rows, plus each attribute's times its factor; exactly the concept's for zeros."""
    return rows[0] + torch.einsum("j,jtd->td", factors.to(rows), rows[1:])


def _betas(outputs: Tensor, missing: Tensor) -> Tensor:
    """Factors of the attributes' rows, from what a layer makes of concept and attributes (1 + j, T, o)."""
    running, betas = outputs[0], []
    for output, by in zip(outputs[1:], missing.tolist(), strict=True):
        length = output.norm().clamp(min=torch.finfo(torch.float64).tiny)
        betas.append(_STEP * by * running.norm() / length)
        running = running + betas[-1] * output
    return torch.stack(betas)


def _checked_shares(desired: Sequence[float] | None, count: int) -> Tensor:
    if desired is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    shares = torch.tensor([float(share) for share in desired], dtype=torch.float64)
    good = len(shares) == count and bool((shares >= 0).all()) and abs(float(shares.sum()) - 1) < 1e-6
    if not good:
        raise ValueError(f"desired: got {list(desired)}, expected {count} shares that add up to 1")
    return shares


def _ratios(measure: Measure, pictures: Tensor, count: int) -> Tensor:
    """Share of each attribute, (attributes,) float64."""
    found = measure(pictures)
    if not isinstance(found, Tensor):
        raise TypeError(f"measure: returned a {type(found).__name__}, expected a tensor")
    found = found.detach().cpu()
    images = len(pictures)
    if (
        found.dtype == torch.int64
        and found.shape == (images,)
        and bool(((found >= 0) & (found < count)).all())
    ):
        return torch.bincount(found, minlength=count).double() / images
    if found.is_floating_point() and found.shape == (images, count):
        found = found.double()
        if bool(((found >= 0) & (found.sum(1, keepdim=True) < 1.01)).all()):
            return found.mean(0)
    raise ValueError(
        f"measure: returned {found.dtype} of shape {tuple(found.shape)}, expected ({images},) int64 below "
        f"{count}, or ({images}, {count}) floats, in rows of shares that are at most 1 together"
    )
