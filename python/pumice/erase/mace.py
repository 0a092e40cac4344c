"""MACE (Lu et al., CVPR 2024), its closed forms: stage 1, refinement, and stage 3, the fusion of LoRAs.

Stage 2, which trains the LoRAs, and all three at once are in `pumice.erase.mace_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, get_args

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
from pumice.erase.closed_form import Preserved, SingularError, down_factor, solve
from pumice.erase.edits import edit_of, projections, residual, warn_if_far
from pumice.erase.rows import Texts, check_fits, gram_of
from pumice.io.lora import read_lora
from pumice.models import Added, DiffusionModel, Edit, Mapped, PromptTokens
from pumice.models.changes import relative_change

Preset = Literal["object", "nudity", "celebrity", "artist"]
Variant = Literal["paper", "code"]
Lora = str | PathLike[str] | Mapping[str, tuple[Tensor, Tensor]]

PROMPTS = (
    "a photo of {}",
    "a picture of {} on a table",
    "a drawing of {} in black ink",
    "a small painting of {} on the wall",
    "a close view of {}",
    "a view of {} from far away",
    "a black and white photo of {}",
    "an old photo of {} in a frame",
    "a blurred picture of {} at night",
    "a bright picture of {} in the morning",
    "a poster with {} on it",
    "a sketch of {} by a child",
    "a photo of {} in the rain",
    "a photo of {} in the snow",
    "a photo of {} by the sea",
    "a photo of {} in a forest",
    "a photo of {} in the street",
    "a photo of {} next to a window",
    "{} in the middle of a garden",
    "{} under a blue sky",
    "{} in front of a white wall",
    "{} in the evening light",
    "{} seen from above",
    "{} and a dog",
    "two people look at {}",
    "somebody took a picture of {} today",
    "this is {}",
    "here you can see {} very well",
    "there is {} in the background",
    "the newspaper shows {} on its first page",
)
"""What a concept and its mapping concept are put into."""

STYLE_PROMPTS = (
    "a painting by {}",
    "a picture in the style of {}",
    "a portrait of a woman by {}",
    "a landscape by {}",
    "a still life by {}",
    "a city at night by {}",
    "a self-portrait by {}",
    "a large mural by {}",
    "a drawing by {} on yellow paper",
    "an etching by {} in a museum",
    "a sketch of two hands by {}",
    "an early work by {}",
    "a late work by {}",
    "a famous work by {} in a frame",
    "an unfinished canvas by {}",
    "a house by the river in the style of {}",
    "a boat on the sea in the style of {}",
    "a field of flowers in the style of {}",
    "a tree in winter in the style of {}",
    "a crowded street in the style of {}",
    "a horse in the style of {}",
    "a room with a window in the style of {}",
    "a photo of an exhibition of {}",
    "a poster after a painting by {}",
    "a copy of a picture by {} on the wall",
    "{} painted this picture",
    "{} made a drawing of a garden",
    "art by {}",
    "this was painted by {} in one day",
    "somebody who paints like {}",
)
"""The same for artists."""


class _Preset(NamedTuple):
    lamb: float
    preserve_scale: float
    domain_scales: Mapping[int, float] = {}  # by the largest number of concepts they are for
    prompts: tuple[str, ...] = PROMPTS

    def domain_scale(self, count: int) -> float:
        scales = self.domain_scales
        return next(
            (scale for most, scale in scales.items() if count <= most), max(scales.values(), default=0.0)
        )


_PRESETS: Mapping[str, _Preset] = {
    "object": _Preset(100.0, 0.0),
    "nudity": _Preset(0.0, 7e-7),
    "celebrity": _Preset(0.0, 1e-4, {1: 8e3, 5: 5e4, 10: 8e4, 100: 2e5}),
    "artist": _Preset(0.0, 1e-4, {100: 8e4}, STYLE_PROMPTS),
}


@torch.no_grad()
def mace_refine(
    pipe: Any,
    concepts: str | Sequence[str],
    mapping: str | Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    preset: Preset | None = None,
    lamb: float | None = None,
    preserve: str | Sequence[str] = (),
    domain: str | Sequence[str] = (),
    preserve_scale: float | None = None,
    domain_scale: float | None = None,
    variant: Variant = "paper",
) -> Edit:
    """Edit every key and value projection so that the tokens around a concept no longer tell of it.

    ::

        W' = argmin  sum_i |W' c_i - W g_i|^2 + s (sum_j |W' p_j - W p_j|^2 + w sum_k |W' q_k - W q_k|^2)
                     + lambda |W' - W|^2

    (Lu et al., arXiv:2403.06135, stage 1, closed-form refinement.) c_i are the tokens of a prompt that are
    *not* the concept's: BOS, the words before and behind it, EOS and padding; g_i is the same token in the
    prompt in which the mapping concept stands there instead. p and q are all tokens of the preserved and of
    the domain's texts. What the concept's own tokens tell stays: that is left to the LoRAs of stage 2, which
    `mace_fuse` puts together, so this edit alone does not erase where a model reads the concept there.

    Both prompts' token ids are compared: what is not in their common beginning or common end is the concept.
    Pieces of words that it shares with its mapping concept there count as context, as in the released code.
    Padding is aligned from EOS on, as far as the shorter of both goes.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is to be erased, each once.
        mapping: what each is mapped to, one for all or one for each: "sky" for a plane, "a person".
        prompts: templates with one "{}" for the concept. By default the preset's: `PROMPTS`, or
            `STYLE_PROMPTS` for "artist".
        preset: the paper's lambda, s and w by task, each of which the argument of its name overrides.
            "object" 100, 0, 0 (the paper has 10, 100 and 1000 for three objects); "nudity" 0, 7e-7, 0;
            "celebrity" 0, 1e-4, and 8e3, 5e4, 8e4, 2e5 for up to 1, 5, 10, 100 concepts; "artist" 0, 1e-4,
            8e4. By default "object", the only one that needs no texts to preserve.
        lamb: lambda. By default the preset's.
        preserve: texts that are to be read as before. The paper's are the captions of COCO, some 616,000,
            which come with neither paper nor package: give them, or others. s is the weight of one token, so
            that with fewer texts it has to be larger.
        domain: texts of the same kind as the concepts that are to stay: other celebrities, other artists.
        preserve_scale: s. By default the preset's.
        domain_scale: w. By default the preset's.
        variant: "paper", or "code": the released code multiplies by s twice, and so has s^2 for s.

    Returns:
        An `Edit`. Its rank is the number of edited rows, and at most d, as it is by default.

    Memory: the embeddings of all prompts in float64, twice: 90 MB a concept of Stable Diffusion 1. Preserved
    texts are read in blocks, and take none.

    Differences from the released code: one float64 factorisation for all layers, and distinct texts are
    encoded once; the templates are others.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long concepts, a concept that is its own mapping or preserved,
            templates without their one "{}", negative scales, a scale of 0 for texts that are given,
            lamb = 0 without enough preserved rows, or weights that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant: got {variant!r}, expected 'paper' or 'code'")
    concepts = checked_texts("concepts", concepts)
    mapping = checked_guides(mapping, concepts, "mapping")
    given = _Given(concepts, prompts, preset, lamb, preserve, domain, preserve_scale, domain_scale)
    model = models.load(pipe)
    weights = projections(model)
    texts = Texts(model, padded=True)
    c, g = _context(texts, concepts, mapping, given.prompts)
    try:
        found = solve(
            c, g, lamb=given.lamb, preserved=given.preserved(model, texts, squared=variant == "code")
        )
    except SingularError as error:
        raise too_few_rows(given.lamb, error) from error
    return edit_of(
        model,
        dict.fromkeys(weights, found),
        method="mace_refine",
        concepts=concepts,
        settings={"mapping": list(mapping), **given.settings, "variant": variant},
        texts=texts,
        residual=residual(found, c, g),
    )


@torch.no_grad()
def mace_fuse(
    pipe: Any,
    loras: Mapping[str, Lora],
    *,
    refined: Edit | None = None,
    prompts: Sequence[str] | None = None,
    preset: Preset | None = None,
    lamb: float | None = None,
    preserve: str | Sequence[str] = (),
    domain: str | Sequence[str] = (),
    preserve_scale: float | None = None,
    domain_scale: float | None = None,
) -> Edit:
    """Put the LoRAs of many concepts together so that each acts on its own concept's prompts.

    ::

        W* = argmin  sum_i |W* C_i^T - (W + b_i a_i) C_i^T|^2 + |(W* - W0) P^T|^2 + lambda |W* - W|^2

        W* = W + sum_i b_i (a_i C_i^T C_i A^-1) + (W0 - W) P^T P A^-1
        A = sum_i C_i^T C_i + P^T P + lambda I
        P^T P = s (P_preserve^T P_preserve + w P_domain^T P_domain)

    (Lu et al., arXiv:2403.06135, stage 3.) W0 are the model's weights, W the refined ones that the LoRAs (up
    b_i, down a_i) were trained on. Rows of C_i are all tokens of the prompts of concept i, BOS and padding
    too. One A serves all layers, and each gets a change of rank sum_i r_i, beside the refinement's.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel, as it was before the refinement; it
            is not changed.
        loras: by concept, a LoRA file in diffusers' or kohya's layout, or (up (o, r), down (r, d)) by the
            name of the layer, such as "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"; on key and
            value projections of the cross-attention only.
        refined: the edit by `mace_refine`, which the returned edit then contains: apply that one alone.
            Without it W = W0.
        prompts: as `mace_refine`; of the concepts.
        preset: as `mace_refine`.
        lamb: lambda. By default the preset's.
        preserve: as `mace_refine`.
        domain: as `mace_refine`.
        preserve_scale: s, which the released code also has once here. By default the preset's.
        domain_scale: w. By default the preset's.

    Returns:
        An `Edit`: a low-rank matrix is added to each weight. Its rank is that of the refinement and of all
        LoRAs together, and at most that of the weight.

    Differences from the released code: as `mace_refine`.

    Raises:
        TypeError: for concepts or texts that are not strings, or factors that are not floating tensors.
        ValueError: for no LoRA, blank, repeated or too long concepts, a file that cannot be read, layers that
            the model does not have or factors that do not fit or are not finite, a refinement of another
            model or of other layers, and as `mace_refine` for prompts, scales and texts.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    if not isinstance(loras, Mapping):
        raise TypeError(f"loras: got a {type(loras).__name__}, expected a mapping by concept")
    concepts = checked_texts("loras", tuple(loras))
    given = _Given(concepts, prompts, preset, lamb, preserve, domain, preserve_scale, domain_scale)
    model = models.load(pipe)
    weights = projections(model)
    factors = {concept: _factors(concept, loras[concept], model, weights) for concept in concepts}
    before = {} if refined is None else _before(refined, model, weights)
    texts = Texts(model, padded=True)
    preserved = given.preserved(model, texts)

    # rows to multiply by A^-1: a_i C_i^T C_i of all layers of each concept, then D P^T P, W = W0 (I + U D)
    rows, a = [], preserved
    for concept, layers in factors.items():
        own = gram_of(model, texts, [prompt.replace("{}", concept) for prompt in given.prompts], "loras")
        rows.append(torch.cat([down for _, down in layers.values()]).to(own.gram) @ own.gram)
        a = own if a is None else Preserved(a.gram + own.gram, a.rows + own.rows)
    maps = {id(change): change for change in before.values()}  # layers share them
    if preserved:
        rows += [change.down.to(rows[0]) @ preserved.gram for change in maps.values()]
    everything = torch.cat(rows)
    try:
        solved, condition = down_factor(everything[:0], rows=everything, lamb=given.lamb, preserved=a)
    except SingularError as error:
        raise too_few_rows(given.lamb, error) from error
    parts = iter(solved.split([len(block) for block in rows]))

    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layers in factors.values():
        downs = next(parts).split([len(down) for _, down in layers.values()])
        for (name, (up, _)), down in zip(layers.items(), downs, strict=True):
            found.setdefault(name, []).append((up.to(down), down))
    left = {key: change.down.to(solved) - (next(parts) if preserved else 0) for key, change in maps.items()}
    for name, change in before.items():
        up = change.up.to(solved)
        up = weights[name].to(solved) @ up if isinstance(change, Mapped) else up
        found.setdefault(name, []).append((up, left[id(change)]))
    changes = {name: _joined(found[name]) for name in weights if name in found}
    details = {
        **relative_change((name, weights[name], *changes[name]) for name in changes),
        "condition_number": condition,
        "rank": max(len(down) for _, down in changes.values()),
        "encoder_calls": texts.calls,
    }
    edit = Edit.made(
        model,
        {name: Added(up.float().cpu(), down.float().cpu()) for name, (up, down) in changes.items()},
        method="mace_fuse",
        targets=tuple(dict.fromkeys((*(refined.targets if refined else ()), *concepts))),
        settings={**given.settings, "refined": refined is not None},
        details=details,
    )
    warn_if_far(details)
    return edit


class _Given:
    """The checked arguments that both stages share, the preset's where none were given."""

    def __init__(
        self,
        concepts: Sequence[str],
        prompts: Sequence[str] | None,
        preset: Preset | None,
        lamb: float | None,
        preserve: str | Sequence[str],
        domain: str | Sequence[str],
        preserve_scale: float | None,
        domain_scale: float | None,
    ) -> None:
        if preset is not None and preset not in _PRESETS:
            raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(_PRESETS)}")
        task = _PRESETS[preset or "object"]
        self.prompts = checked_templates("prompts", task.prompts if prompts is None else prompts, least=1)
        self.lamb = check_scale("lamb", task.lamb if lamb is None else lamb)
        self._preserve = checked_preserve(preserve, concepts)
        self._domain = checked_preserve(domain, concepts, "domain")
        # a scale of 0 would have texts given in vain
        self._s = check_scale(
            "preserve_scale",
            task.preserve_scale if preserve_scale is None else preserve_scale,
            positive=bool(self._preserve or self._domain),
        )
        self._w = check_scale(
            "domain_scale",
            task.domain_scale(len(concepts)) if domain_scale is None else domain_scale,
            positive=bool(self._domain),
        )
        self.settings = {
            "prompts": list(self.prompts),
            "preset": preset or "object",
            "lamb": self.lamb,
            "preserve": list(self._preserve),
            "domain": list(self._domain),
            "preserve_scale": self._s,
            "domain_scale": self._w,
        }

    def preserved(self, model: DiffusionModel, texts: Texts, *, squared: bool = False) -> Preserved | None:
        """s (Gram(preserve) + w Gram(domain)), or with s^2; None for no texts."""
        s = self._s**2 if squared else self._s
        found = None
        for name, kept, scale in (("preserve", self._preserve, s), ("domain", self._domain, s * self._w)):
            if kept:
                one = gram_of(model, texts, kept, name, scale)
                found = one if found is None else Preserved(found.gram + one.gram, found.rows + one.rows)
        return found


def _context(
    texts: Texts, concepts: Sequence[str], mapping: Sequence[str], prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Tokens around the concepts, and the same ones around what they are mapped to, (m, d) each."""
    filled = [
        (concept, other, prompt.replace("{}", concept), prompt.replace("{}", other))
        for concept, other in zip(concepts, mapping, strict=True)
        for prompt in prompts
    ]
    texts.encode(text for *_, c, g in filled for text in (c, g))
    rows_c, rows_g = [], []
    for concept, other, c, g in filled:
        check_fits(texts[c], concept)
        check_fits(texts[g], other, "mapping")
        at_c, at_g = _shared(texts[c].tokens, texts[g].tokens)
        rows_c.append(texts[c].embeds[at_c])
        rows_g.append(texts[g].embeds[at_g])
    return torch.cat(rows_c), torch.cat(rows_g)


def _shared(a: PromptTokens, b: PromptTokens) -> tuple[list[int], list[int]]:
    """Where the tokens stand that both prompts begin and end with, and the padding that both have."""
    x, y = a.ids[: a.eos + 1], b.ids[: b.eos + 1]
    most = min(len(x), len(y))
    start = next((i for i in range(most) if x[i] != y[i]), most)
    end = next((i for i in range(most - start) if x[-1 - i] != y[-1 - i]), most - start)
    behind = end + min(len(a.pads), len(b.pads))

    def at(ids: tuple[int, ...]) -> list[int]:
        return [*range(start), *range(len(ids) - end, len(ids) - end + behind)]

    return at(x), at(y)


def _factors(
    concept: str, lora: Lora, model: DiffusionModel, weights: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one concept's LoRA by the names of the weights."""
    layers = read_lora(lora, model.unet) if isinstance(lora, str | PathLike) else lora
    if not layers:
        raise ValueError(f"loras: got no layers for {concept!r}, expected at least one")
    found = {}
    for layer, (up, down) in layers.items():
        name = f"{layer}.weight"
        if name not in weights:
            raise ValueError(
                f"loras: that of {concept!r} changes {layer!r}, expected to_k and to_v of cross-attention"
            )
        if not all(isinstance(factor, Tensor) and factor.is_floating_point() for factor in (up, down)):
            raise TypeError(f"loras: the factors of {layer!r} for {concept!r} are not floating tensors")
        o, d = weights[name].shape
        rank = len(down) if down.ndim else 0
        if not rank or up.shape != (o, rank) or down.shape != (rank, d):
            raise ValueError(
                f"loras: {layer!r} for {concept!r} got up {tuple(up.shape)} and down {tuple(down.shape)}, "
                f"expected ({o}, r) and (r, {d})"
            )
        if not bool(up.isfinite().all() & down.isfinite().all()):
            raise ValueError(f"loras: the factors of {layer!r} for {concept!r} are not finite")
        found[name] = up.detach(), down.detach()
    return found


def _before(refined: Edit, model: DiffusionModel, weights: Mapping[str, Tensor]) -> dict[str, Mapped | Added]:
    """What the refinement does to the weights."""
    if not isinstance(refined, Edit):
        raise TypeError(f"refined: got a {type(refined).__name__}, expected an Edit")
    refined.check_fits(model)
    found = {}
    for name, change in refined.changes.items():
        if name not in weights or not isinstance(change, Mapped | Added):
            raise ValueError(
                f"refined: got an edit by {refined.method} that changes {name}, expected a low-rank one of "
                "key and value projections"
            )
        found[name] = change
    return found


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of the sum, no more of them than the sum can have independent ones."""
    up, down = torch.cat([up for up, _ in parts], dim=1), torch.cat([down for _, down in parts])
    o, d = len(up), down.shape[1]
    if len(down) <= min(o, d):
        return up, down
    whole = up @ down
    return (whole, torch.eye(d).to(whole)) if d <= o else (torch.eye(o).to(whole), whole)
