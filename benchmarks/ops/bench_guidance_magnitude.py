from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from harness import Case, benchmark_of, main
from pumice import ops


def eager(cond: Tensor, uncond: Tensor) -> tuple[Tensor, ...]:
    u = uncond.float().expand_as(cond)
    d = cond.float() - u
    cosine = torch.cosine_similarity(d, u, dim=1)
    return d.flatten(1).norm(dim=1), u.flatten(1).norm(dim=1), (d * u).sum((1, 2, 3)), cosine.sum((1, 2))


def cases(device: str) -> Iterator[Case]:
    for batch in (16384,) if device == "cuda" else (32, 256):
        for dtype in (torch.float32, torch.float16):
            for shared in (False, True):
                cond = torch.randn(batch, 4, 64, 64, device=device).to(dtype)
                uncond = torch.randn(1 if shared else batch, 4, 64, 64, device=device).to(dtype)
                yield Case(
                    "guidance_magnitude",
                    f"{batch}x4x64x64 {str(dtype)[6:]}{' shared uncond' * shared}",
                    cond.nbytes + uncond.nbytes,
                    partial(eager, cond, uncond),
                    partial(ops.guidance_magnitude, cond, uncond),
                    1e-3,
                )


test_guidance_magnitude = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
