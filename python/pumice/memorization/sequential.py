"""Group-sequential screening: most prompts are decided by their first seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPEND = (0.2, 0.5, 1.0)  # of the allowed false positives, by the end of each look
POSITIVES_FOR_A_QUANTILE = 1000
FLOORS = 3


@dataclass(frozen=True)
class Look:
    """One look at the mean score of a prompt's first seeds.

    Attributes:
        seeds: how many.
        flag_above: a higher mean is called memorized.
        pass_below: a lower mean is called fresh; what lies between waits for the next look, after the last
            it is fresh.
    """

    seeds: int
    flag_above: float
    pass_below: float

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which prompts are flagged and which stay undecided, (P,) bool each, of scores by seed (P, S)."""
        mean = mean_score(scores[:, : self.seeds])
        flagged = mean > self.flag_above
        return flagged, ~flagged & (mean >= self.pass_below)


def mean_score(scores: Tensor) -> Tensor:
    """(P,) float32 of scores by seed (P, S), some of them NaN; rounded alike wherever scores are compared."""
    return scores.double().nanmean(1).float()


def calibrate_looks(memorized: Tensor, fresh: Tensor, *, fpr: float, floor: float) -> tuple[Look, ...]:
    """Looks at 1, 2 and all seeds that together call a share `fpr` of the fresh prompts memorized.

    Scores of one prompt under several seeds are strongly correlated, so a test that takes them as independent
    is not valid: the thresholds are empirical. Of the false positives allowed, the first look may spend 20 %,
    the first two 50 %; each is set on the fresh prompts that the looks before left undecided. A prompt passes
    early below the 0.1 % quantile of the memorized scores, or, with fewer than 1000 of those, below their
    minimum less three times `floor`.

    Args:
        memorized, fresh: scores by seed, (P, S) and (N, S).
        fpr: the wanted false positive rate.
        floor: the score that rounding alone makes.
    """
    seeds = memorized.shape[1]
    counts = [count for count in (1, 2) if count < seeds] + [seeds]
    undecided = torch.ones(len(fresh), dtype=torch.bool)
    looks: list[Look] = []
    spent = 0
    for count, share in zip(counts, SPEND[-len(counts) :], strict=True):
        positive = mean_score(memorized[:, :count]).double()
        mean = mean_score(fresh[:, :count])
        # where the looks before left nobody waiting, as if there had been none
        waiting, before = (mean[undecided], spent) if undecided.any() else (mean, 0)
        allowed = min(int(share * fpr * len(fresh) + 1e-9) - before, len(waiting) - 1)
        above = float(waiting.sort(descending=True).values[allowed])
        if len(positive) >= POSITIVES_FOR_A_QUANTILE:
            below = float(positive.quantile(0.001))
        else:
            below = float(positive.min()) - FLOORS * floor
        look = Look(count, above, min(above, below))
        flagged, still = look(fresh)
        spent += int((flagged & undecided).sum())
        undecided &= still
        looks.append(look)
    return tuple(looks)
