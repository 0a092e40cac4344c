"""SPEED: concepts are erased where what is retained has nothing to lose (arXiv:2503.07392, ICLR 2026)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from pumice import models
from pumice.erase.arguments import check_scale, checked_guides, checked_preserve, checked_texts
from pumice.erase.closed_form import LinearMap
from pumice.erase.edits import Projections, edit_of, projections, residual
from pumice.erase.null_space import Move, null_space, retained_gram
from pumice.erase.rows import Texts, Tokens, check_fits, pairs
from pumice.models import Edit

ConceptType = Literal["instance", "style", "celebrity"]
Preset = Literal["celebrities", "nudity"]

_ANCHORS: Mapping[str, str] = {"instance": "", "style": "art", "celebrity": "person"}
_DEFAULTS: dict[str, Any] = {
    "concept_type": "instance",
    "tokens": "last",
    "influence_filter": True,
    "threshold": 0.1,
    "retain_scale": 1.0,
    "lamb2": 0.0,
}
_PRESETS: Mapping[str | None, Mapping[str, Any]] = {
    None: _DEFAULTS,
    "celebrities": _DEFAULTS
    | {"concept_type": "celebrity", "influence_filter": False, "threshold": 1e-4, "retain_scale": 0.05},
    "nudity": _DEFAULTS | {"tokens": "all", "retain_scale": 0.7, "lamb2": 0.5},
}
_CENTRES = 3
_WIDTH = 768  # of Stable Diffusion 1's text encoder
_SQUARED_NORM = 28.0**2  # of the tokens of Stable Diffusion 1, which the released threshold is for


@torch.no_grad()
def speed(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    preset: Preset | None = None,
    concept_type: ConceptType | None = None,
    anchor: str | Sequence[str] | None = None,
    retain: str | Sequence[str] = (),
    tokens: Tokens | None = None,
    parameters: Projections = "v",
    influence_filter: bool | None = None,
    augmentations: int = 10,
    threshold: float | None = None,
    threshold_relative: bool | None = None,
    retain_scale: float | None = None,
    lamb2: float | None = None,
    seed: int = 0,
) -> Edit:
    """Edit value projections so that concepts are read as anchors, in the null space of what is retained.

    ::

        W' = W + W X,   X = (S_at - S_tt) P (I - M0 K (K^T P M0 K + lambda2 I)^-1 K^T P) M0
        M0 = (S_tt P + alpha I)^-1,   S_tt = mean c c^T,   S_at = mean a c^T

    (SPEED, arXiv:2503.07392.) c, a are tokens of concepts and anchors. P projects onto the eigenvectors of
    the mean Gram matrix of retained tokens with eigenvalues below `threshold`. K has the invariants: BOS and
    three k-means centres of the other positions of the empty text. Each layer takes of the retained tokens
    those that an unconstrained edit would move more than the average, and copies of these with noise in the
    direction that the layer sees least. Without filter and copies all layers share one map.

    What is None is that of `preset`.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is to be erased, each once.
        preset: "celebrities" (10, 50 or 100 of them) or "nudity", with the values that were published for
            these; None for single instances and styles.
        concept_type: "instance" becomes "", "style" becomes "art", "celebrity" becomes "person". Default
            "instance"; "celebrity" with "celebrities".
        anchor: what each concept becomes instead, one for all or one for each.
        retain: texts that are to be read as before; without any, the empty text's tokens behind BOS.
        tokens: "last" takes the last token of concepts, anchors and retained texts; "all" every token behind
            BOS, padding too, position by position. Default "last"; "all" with "nudity".
        parameters: "v", "k" or "kv". Default "v".
        influence_filter: whether a layer leaves out retained tokens and copies that the edit hardly moves.
            Default True; False with "celebrities".
        augmentations: copies of each retained token. Default 10.
        threshold: of eigenvalues. Default 0.1; 1e-4 with "celebrities".
        threshold_relative: multiply `threshold` by mean |r|^2 / 28^2 of the retained tokens r, so that it
            means for any text encoder what it does for Stable Diffusion 1. By default not at its width, 768,
            the only one that the released code knows, and elsewhere yes.
        retain_scale: alpha, weighed against squared norms of tokens: an encoder whose tokens are shorter than
            28 needs a smaller one to erase as much. Default 1; 0.05 with "celebrities", 0.7 with "nudity".
        lamb2: ridge of the invariants; 0 keeps them exactly. Default 0; 0.5 with "nudity".
        seed: of the k-means centres and the noise, which is drawn on the CPU.

    Returns:
        An `Edit`. Its rank is the number of edited rows, at most d.

    Differences from the released code: float64, and any width d; a relative threshold; one draw of noise for
    all layers; the mean of the copies' filter is over all copies instead of those of 128 retained texts each;
    with `tokens="all"` retained texts give all of their
    tokens; `influence_filter=False` keeps all copies, too; invariants that P removes anyway are left out
    by a pseudo-inverse instead of dividing by zero; `augmentations=0` leaves the filter on; a retained text
    that speaks of a concept is warned about instead of dropped. As published, the direction of the copies is
    the last one of the *reduced* singular value decomposition: layers narrower than the embeddings (320 and
    640 of 768) have a true null space of d - o dimensions, which it leaves unused.

    Raises:
        TypeError: for texts that are not strings.
        ValueError: for blank, repeated or too long concepts, a concept that is its own anchor or retained,
            negative numbers, retained texts that leave no direction, or weights that are not finite.
        UnsupportedModelError: for families without cross-attention, and layers that cannot be edited.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected None, 'celebrities' or 'nudity'")
    given = {
        "concept_type": concept_type,
        "tokens": tokens,
        "influence_filter": influence_filter,
        "threshold": threshold,
        "retain_scale": retain_scale,
        "lamb2": lamb2,
    }
    chosen: dict[str, Any] = {
        name: _PRESETS[preset][name] if value is None else value for name, value in given.items()
    }
    for name, value, known in (
        ("concept_type", chosen["concept_type"], tuple(_ANCHORS)),
        ("tokens", chosen["tokens"], ("last", "all")),
        ("parameters", parameters, ("v", "k", "kv")),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    for name in ("threshold", "retain_scale", "lamb2"):
        chosen[name] = check_scale(name, chosen[name], positive=name != "lamb2")
    augmentations, seed = operator.index(augmentations), operator.index(seed)
    if augmentations < 0:
        raise ValueError(f"augmentations: got {augmentations}, expected at least 0")
    concepts = checked_texts("concepts", concepts)
    anchors = checked_guides(
        _ANCHORS[chosen["concept_type"]] if anchor is None else anchor, concepts, "anchor"
    )
    retain = checked_preserve(retain, concepts, "retain")

    model = models.load(pipe)
    weights = projections(model, parameters)
    texts = Texts(model, padded=chosen["tokens"] == "all")
    texts.encode((*concepts, *anchors, *retain))
    blank = Texts(model, padded=True)
    empty = blank[""].embeds
    texts.calls += blank.calls
    c, a, retained = _rows(texts, concepts, anchors, retain, chosen["tokens"])
    if not len(retained):
        retained = empty[1:]
    move, kept = Move.of(c, a), _invariants(empty, seed)

    if threshold_relative is None:
        threshold_relative = retained.shape[1] != _WIDTH
    scale = float(retained.square().sum(1).mean()) / _SQUARED_NORM if threshold_relative else 1.0

    def solved(gram: Tensor) -> LinearMap:
        basis = null_space(gram / scale, chosen["threshold"])
        return move.inside(basis, kept, retain_scale=chosen["retain_scale"], lamb2=chosen["lamb2"])

    if augmentations or chosen["influence_filter"]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(retained), augmentations, generator=generator, dtype=torch.float64)
        noise = noise.to(c.device)
        maps = {
            name: solved(
                retained_gram(
                    retained,
                    weight.to(c.device, torch.float64),
                    move,
                    noise,
                    influence_filter=chosen["influence_filter"],
                )
            )
            for name, weight in weights.items()
        }
    else:
        maps = dict.fromkeys(weights, solved(retained.T @ retained / len(retained)))
    return edit_of(
        model,
        maps,
        method="speed",
        concepts=concepts,
        settings={
            "preset": preset,
            "anchor": list(anchors),
            "retain": list(retain),
            "parameters": parameters,
            "augmentations": augmentations,
            "threshold_relative": threshold_relative,
            "seed": seed,
            **chosen,
        },
        texts=texts,
        residual=sum(residual(found, c, a) for found in maps.values()) / len(maps),
    )


def _rows(
    texts: Texts, concepts: Sequence[str], anchors: Sequence[str], retain: Sequence[str], tokens: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of concepts and anchors, aligned, and those of retained texts."""
    for name, group in (("concepts", concepts), ("anchor", anchors), ("retain", retain)):
        for text in group:
            check_fits(texts[text], text, name)
    if tokens == "last":
        found = pairs(texts, concepts, anchors, tokens="last", name="anchor")
        retained = [texts[text].embeds[texts[text].last][None] for text in retain]
        return found.c, found.g, torch.cat(retained) if retained else found.c[:0]
    c, a, retained = ([texts[text].embeds[1:] for text in group] for group in (concepts, anchors, retain))
    return torch.cat(c), torch.cat(a), torch.cat(retained) if retained else c[0][:0]


def _invariants(empty: Tensor, seed: int) -> Tensor:
    """BOS, and the centres of all other positions of the empty text, (4, d); fewer if there are fewer."""
    rows = np.unique(empty[1:].cpu().numpy(), axis=0)
    if len(rows) > _CENTRES:
        rows = kmeans2(empty[1:].cpu().numpy(), _CENTRES, minit="++", seed=np.random.default_rng(seed))[0]
    return torch.cat([empty[:1], torch.from_numpy(rows).to(empty)])
