from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.median_filter import reference


def cases(device: str) -> Iterator[Case]:
    batch = 32 if device == "cuda" else 1
    images = torch.rand(batch, 3, 512, 512, device=device)
    for size in (3, 5, 7):
        for dtype in (torch.float32, torch.bfloat16):
            x = images.to(dtype)
            yield Case(
                "median_filter",
                f"size {size}, {batch}x3x512x512 {str(dtype)[6:]}",
                2 * x.nbytes,
                partial(reference, x, size),
                partial(ops.median_filter, x, size),
            )


test_median_filter = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
