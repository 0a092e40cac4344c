"""What a step takes of a device's memory, told without doing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pumice.models.memory import peak_bytes

SPARE = 0.1  # of the memory, for what kernels, the driver and gaps between tensors take


def step_bytes(step: Callable[[int], object]) -> tuple[int, int]:
    """The peak of `step(n)` for n pictures, as fixed + n * each: (fixed, each).

    It is run for 1 and for 2 pictures on fake tensors, as `models.memory.peak_bytes` does; checks of values
    pass.
    """

    def peak(pictures: int) -> int:
        def work() -> None:
            with ChecksPass():  # type: ignore[no-untyped-call]
                step(pictures)

        return peak_bytes(work)

    one, two = peak(1), peak(2)
    return max(0, 2 * one - two), two - one


def rows_that_fit(memory: float, taken: int, each: int) -> int:
    """How many times `each` fits beside what is taken, with `SPARE` left; 0 if not once."""
    return max(0, int(((1 - SPARE) * memory - taken) // each))


def free_bytes(device: torch.device) -> int:
    """What is left of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, kilobytes = line.partition(":")
        if name == "MemAvailable":
            return int(kilobytes.split()[0]) * 1024
    raise ValueError("vram: this machine does not tell how much memory is free, expected a number of bytes")


class ChecksPass(TorchDispatchMode):
    """Fake tensors have no values: questions about them are answered with yes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        if asked and isinstance(args[0], FakeTensor):
            return True
        return func(*args, **(kwargs or {}))
