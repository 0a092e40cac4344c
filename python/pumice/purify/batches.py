"""Pictures of several sizes, as many of one size at once as memory takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pumice.models import RowBudget


def in_batches(
    rows: Sequence[Tensor],
    budget: RowBudget,
    work: Callable[[Sequence[int], Tensor], Tensor],
    tick: Callable[[int], Any] | None = None,
) -> list[Tensor]:
    """What `work` makes of each row.

    Args:
        rows: (C, h, w) each, of any sizes.
        budget: how many go into a call, which is done again with fewer when it runs out of memory.
        work: from the numbers of rows and the rows, (n, C, h, w), to (n, ...).
        tick: called with n after each call.
    """
    found: dict[int, Tensor] = {}
    by_shape: dict[torch.Size, list[int]] = {}
    for number, row in enumerate(rows):
        by_shape.setdefault(row.shape, []).append(number)
    for numbers in by_shape.values():
        left = numbers
        while left:

            def some(count: int, left: Sequence[int] = left) -> Tensor:
                return work(left[:count], torch.stack([rows[number] for number in left[:count]]))

            made = budget.run(some)
            found |= dict(zip(left, made, strict=False))
            if tick is not None:
                tick(len(made))
            left = left[len(made) :]
    return [found[number] for number in range(len(rows))]
