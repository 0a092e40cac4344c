"""What a detector is: numbers measured of each prompt and seed, and one score made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .engine import Rows, Screen


@dataclass(frozen=True)
class Metric(ABC):
    """One way to score prompts; the higher, the more likely memorized. Its fields are the paper's choices."""

    name: ClassVar[str]

    @abstractmethod
    def columns(self, screen: Screen) -> tuple[str, ...]:
        """The names of the K numbers that are measured.

        Raises:
            ValueError: if the sampler or the model does not fit.
        """

    @abstractmethod
    def measure(self, screen: Screen, rows: Rows) -> Tensor:
        """(B, K) float32 on the device, of the B pairs of prompt and seed of one call; no host read."""

    def score(self, values: Tensor) -> Tensor:
        """One number from the K in the last dimension; by default their mean."""
        return values.mean(-1)

    def to_dict(self) -> dict[str, Any]:
        """Name and choices, for JSON."""
        return {"name": self.name, **asdict(self)}
