"""The score above which a prompt is called memorized, from prompts that are known not to be."""

from __future__ import annotations

import torch
from torch import Tensor


def threshold_at(fpr: float, negative_scores: Tensor) -> float:
    """The smallest observed score that at most a share `fpr` of the negatives exceeds.

    ::

        sorted ascending, s_1 <= ... <= s_n:   threshold = s_(n - floor(fpr n))

    A prompt is called memorized if its score is *greater*. Thresholds hold for one model, dtype, picture size
    and choice of seeds and steps: calibrate with the settings of the scan, on other prompts than those
    judged.

    Args:
        fpr: the wanted false positive rate, [0, 1).
        negative_scores: (n,), of prompts that are not memorized.

    Raises:
        ValueError: if fpr is out of range, or there are no scores or a NaN among them.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr: got {fpr}, expected a rate in [0, 1)")
    scores = torch.as_tensor(negative_scores).double().flatten()
    if not len(scores) or bool(scores.isnan().any()):
        raise ValueError(f"negative_scores: got {len(scores)} scores, expected at least one and no NaN")
    above = int(fpr * len(scores) + 1e-9)
    return float(scores.sort().values[len(scores) - 1 - above])
