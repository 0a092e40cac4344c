"""How well scores separate two groups of prompts, and how sure of it so many prompts can make one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Convention = Literal["below", "nearest"]


def auc(positive: Tensor, negative: Tensor) -> float:
    """The share of pairs (positive, negative) in the right order, ties counting half: the area under the ROC.

    Args:
        positive, negative: scores, (P,) and (N,).

    Raises:
        ValueError: if either is empty or has a NaN.
    """
    positive, negative = _scores("positive", positive), _scores("negative", negative)
    return float(_share_below(negative.sort().values, positive).mean())


def auc_interval(
    positive: Tensor, negative: Tensor, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of `auc`: percentiles over `resamples` draws of prompts from each group.

    Where the groups do not overlap every resample has an AUC of 1, and so has the interval: it then says
    nothing of how near the next prompt may come.
    """
    positive, negative = _scores("positive", positive), _scores("negative", negative)
    generator = torch.Generator().manual_seed(seed)
    wins = _share_below_each(negative, positive)  # (P, N): 1, 0.5 or 0
    found = []
    for _ in range(resamples):
        rows = torch.randint(len(positive), (len(positive),), generator=generator)
        columns = torch.randint(len(negative), (len(negative),), generator=generator)
        # weights of rows and columns in place of a resampled matrix
        row_weight = torch.bincount(rows, minlength=len(positive)).double() / len(positive)
        column_weight = torch.bincount(columns, minlength=len(negative)).double() / len(negative)
        found.append(row_weight @ wins @ column_weight)
    tail = (1 - confidence) / 2
    areas = torch.stack(found).clamp(max=1)  # weights add up to 1 but for rounding
    low, high = areas.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def tpr_at_fpr(
    positive: Tensor, negative: Tensor, fpr: float = 0.01, *, convention: Convention = "below"
) -> float:
    """The true positive rate at a false positive rate, in one of the two ways of the literature.

    Over the points of the ROC (each observed score as a threshold, at or above it is called positive):
    "below" takes the best one with a false positive rate *less than* `fpr` (Wen et al.), "nearest" the first
    one whose rate is nearest to `fpr`, which may lie above it (Ren et al., Jeon et al., Asthana et al.).

    Args:
        positive, negative: scores, (P,) and (N,).
        fpr: the wanted rate, (0, 1).
        convention: "below" or "nearest".

    Raises:
        ValueError: for an fpr out of range, another convention, empty groups or a NaN.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: got {fpr}, expected a rate in (0, 1)")
    if convention not in ("below", "nearest"):
        raise ValueError(f"convention: got {convention!r}, expected 'below' or 'nearest'")
    positive, negative = _scores("positive", positive), _scores("negative", negative)
    thresholds = torch.cat([positive, negative]).unique().flip(0)
    start = torch.zeros(1, dtype=torch.int64)  # the ROC starts above every score
    false = torch.cat([start, _count_from(negative, thresholds)])
    true = torch.cat([start, _count_from(positive, thresholds)]).double() / len(positive)
    if convention == "below":  # counts, as 1 of 100 is not less than 1 %
        return float(true[false < fpr * len(negative) - 1e-9].max())
    return float(true[(false.double() / len(negative) - fpr).abs().argmin()])


def clopper_pearson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of a rate of which `hits` of `count` were seen.

    Raises:
        ValueError: unless 0 <= hits <= count and count > 0.
    """
    from scipy.stats import binomtest

    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"hits: got {hits} of {count}, expected 0 to a positive count")
    interval = binomtest(hits, count).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def _scores(name: str, scores: Tensor) -> Tensor:
    scores = torch.as_tensor(scores).double().flatten().cpu()
    if not len(scores) or bool(scores.isnan().any()):
        raise ValueError(f"{name}: got {len(scores)} scores, expected at least one and no NaN")
    return scores


def _count_from(scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many scores are at or above each threshold."""
    return len(scores) - torch.searchsorted(scores.sort().values, thresholds)


def _share_below(ordered: Tensor, values: Tensor) -> Tensor:
    """Of `ordered`, the share below each value, ties half."""
    under = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return under.double() / (2 * len(ordered))


def _share_below_each(negative: Tensor, positive: Tensor) -> Tensor:
    difference = positive[:, None] - negative[None]
    return (difference > 0).double() + 0.5 * (difference == 0).double()
