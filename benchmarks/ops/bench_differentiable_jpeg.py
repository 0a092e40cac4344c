from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.differentiable_jpeg import quantization_tables, reference, reference_backward


def cases(device: str) -> Iterator[Case]:
    batch = 64 if device == "cuda" else 8
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    tables = quantization_tables(torch.full((batch,), 75, device=device))
    for dtype in dtypes:
        # All that a coefficient on the verge of another level can change, it changes by one level.
        tolerance = 0.2
        images = torch.rand(batch, 3, 512, 512, device=device).to(dtype)
        label = f"{batch}x3x512x512 {str(dtype)[6:]}"
        yield Case(
            "differentiable_jpeg",
            label,
            2 * images.nbytes,
            partial(reference, images, tables),
            partial(ops.differentiable_jpeg, images, tables),
            tolerance,
        )
        grad = torch.randn_like(images)
        yield Case(
            "differentiable_jpeg_backward",
            f"{label}, backward",
            3 * images.nbytes,
            partial(reference_backward, grad, images, tables),
            partial(torch.ops.pumice.differentiable_jpeg_backward, grad, images, tables),
            tolerance,
        )


test_differentiable_jpeg = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
