from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.total_variation import reference


def cases(device: str) -> Iterator[Case]:
    batch, iterations = (32 if device == "cuda" else 1), 10  # torch.compile unrolls them
    images = torch.rand(batch, 3, 512, 512, device=device)
    for isotropic in (True, False):
        # An iteration reads the picture, and reads and writes u, a and the two parts of y.
        yield Case(
            "total_variation",
            f"{batch}x3x512x512, {iterations} iterations{'' if isotropic else ', anisotropic'}",
            iterations * 9 * images.nbytes,
            partial(reference, images, 0.1, None, iterations, isotropic),
            partial(ops.total_variation, images, 0.1, iterations=iterations, isotropic=isotropic),
        )


test_total_variation = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
