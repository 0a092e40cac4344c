"""How many samples go into one call of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class RowBudget:
    """The rows of a call; halved, and from then on kept so, when the device runs out of memory.

    Attributes:
        rows: of the next call.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.rows = batch_size

    def run(self, work: Callable[[int], T]) -> T:
        """`work(rows)`, with half as many rows until they fit; one row that does not is an error."""
        while True:
            try:
                return work(self.rows)
            except RuntimeError as error:
                # TorchScript passes an OutOfMemoryError on as a plain one
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(
                    error
                )
                if not out_of_memory or self.rows == 1:
                    raise
                self.rows = (self.rows + 1) // 2
