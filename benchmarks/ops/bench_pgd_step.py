from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.pgd_step import reference


def cases(device: str) -> Iterator[Case]:
    for batch in (256,) if device == "cuda" else (8,):
        shape = (batch, 3, 512, 512)
        size = f"{batch}x3x512x512"
        x0 = torch.rand(shape, device=device)
        x = (x0 + 0.01).clamp(0, 1)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            grad = torch.randn(shape, device=device, dtype=dtype)
            for norm, eps in (("linf", 8 / 255), ("l2", 3.0)):
                reads = 2 if norm == "l2" else 1  # the norm needs a pass of its own
                yield Case(
                    "pgd_step",
                    f"{norm} {size} {str(dtype)[6:]}",
                    reads * (2 * x.nbytes + grad.nbytes) + x.nbytes,
                    partial(reference, x, grad, x0, 1 / 255, None, eps, 0.0, 1.0, norm),
                    partial(ops.pgd_step, x, grad, x0, step_size=1 / 255, eps=eps, norm=norm),
                )
        grad = torch.randn(shape, device=device)
        yield Case(
            "pgd_step_",
            f"linf {size} float32, in place",
            4 * x.nbytes,
            partial(reference, x, grad, x0, 0.0, None, 8 / 255, 0.0, 1.0, "linf"),
            partial(ops.pgd_step_, x.clone(), grad, x0, step_size=0.0, eps=8 / 255),
        )


test_pgd_step = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
