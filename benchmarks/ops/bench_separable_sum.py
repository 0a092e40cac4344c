from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from harness import Case, benchmark_of, main
from pumice import ops
from pumice.ops.separable_sum import reference
from pumice.purify.filters.separable import Taps, box_taps, gaussian_taps


def cases(device: str) -> Iterator[Case]:
    batch, side = (32 if device == "cuda" else 1), 512
    images = torch.rand(batch, 3, side, side, device=device)
    sums = {
        "9 x 9 Gaussian": gaussian_taps(side, 1.0, 4),
        "41 x 41 Gaussian": gaussian_taps(side, 5.0, 20),
        "9 x 9 box": box_taps(side, 4),
    }
    for name, taps in sums.items():
        table = torch.stack((taps.places.float(), taps.weights.float()), dim=1).to(device)
        yield Case(
            "separable_sum",
            f"{name}, {batch}x3x{side}x{side}",
            2 * images.nbytes,
            partial(reference, images, table, table),
            partial(_sum, images, taps),
        )


def _sum(images: Tensor, taps: Taps) -> Tensor:
    return ops.separable_sum(images, taps.places, taps.weights, taps.places, taps.weights)


test_separable_sum = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
