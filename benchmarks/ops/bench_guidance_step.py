from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import Case, benchmark_of, main
from pumice import ops  # noqa: F401  (registers the ops)
from pumice.ops.guidance_step import reference

ROW = [0.8, 0.6, 0.9, 0.3, 0.0, 0.4]


def ours(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.pumice.guidance_step(*args)


def sample_only(function: Any, *args: Any) -> Tensor:
    return function(*args)[0]


def cases(device: str) -> Iterator[Case]:
    row = torch.tensor([ROW], device=device)
    for batch in (8192,) if device == "cuda" else (32, 256):
        for dtype in (torch.float32, torch.float16):
            x, cond, uncond, noise = torch.randn(4, batch, 4, 64, 64, device=device).to(dtype)
            for magnitude in (False, True):
                args = (x, cond, uncond, 7.5, None, row, noise, "epsilon", None, magnitude)
                yield Case(
                    "guidance_step",
                    f"{batch}x4x64x64 {str(dtype)[6:]}{' magnitudes' * magnitude}",
                    5 * x.nbytes,
                    partial(reference, *args) if magnitude else partial(sample_only, reference, *args),
                    partial(ours, *args) if magnitude else partial(sample_only, ours, *args),
                    1e-4 if dtype == torch.float32 else 2e-2,
                )


test_guidance_step = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
