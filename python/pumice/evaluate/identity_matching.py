"""The identity matching score: of how many drawings a recognizer says that they show somebody."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pumice.models.arguments import check_scale


def identity_matching_score(embeddings: Tensor, references: Tensor, threshold: float = 0.40) -> Tensor:
    """Score drawings by the references that a recognizer takes for the same person.

    ::

        d_ij = 1 - cos(e_i, r_j),   score_i = 1 - mean of the d_ij that are at most threshold, -1 if none is

    as MetaCloak (Liu et al., arXiv:2311.13127) and DiffShortcut (arXiv:2406.18944) take it from DeepFace's
    `find`. It is no plain cosine but has two humps, 1 - threshold and above, and -1: a mean over drawings is
    p (about 0.75) - (1 - p) for a share p of matches, which makes it negative where half of them fail.

    Args:
        embeddings: (N, D) of the drawings, by a recognizer of yours; a drawing without a face has no
            embedding, and counts as -1.
        references: (R, D) of pictures of the person.
        threshold: the largest distance of a match. Default 0.40, DeepFace's for VGG-Face at that time.

    Returns:
        (N,) float64 on the CPU, -1 or in [1 - threshold, 1].

    Raises:
        TypeError: if either is no floating tensor.
        ValueError: for other shapes, no reference, values that are not finite, or a threshold out of range.
    """
    for name, given in {"embeddings": embeddings, "references": references}.items():
        if not isinstance(given, Tensor) or not given.is_floating_point():
            kind = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise TypeError(f"{name}: got {kind}, expected a floating tensor")
        if given.ndim != 2 or not given.shape[1] or not bool(given.isfinite().all()):
            raise ValueError(f"{name}: got shape {tuple(given.shape)} or NaN, expected finite (N, D)")
    if not len(references) or references.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"references: got shape {tuple(references.shape)}, expected (R, {embeddings.shape[1]}) with R > 0"
        )
    check_scale("threshold", threshold)
    found, known = (F.normalize(each.detach().double().cpu(), dim=1) for each in (embeddings, references))
    distances = 1 - found @ known.T
    matches = distances <= threshold
    near = (distances * matches).sum(1) / matches.sum(1).clamp(min=1)
    return torch.where(matches.any(1), 1 - near, -1.0)
