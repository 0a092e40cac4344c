"""The op has no kernel for a GPU: it is plain torch there, as on a CPU."""

from __future__ import annotations

import torch

from ops.test_separable_sum import noise, taps
from pumice import ops


def test_a_gpu_gives_what_a_cpu_gives(device: str) -> None:
    rows, columns = taps(17, 6, 9), taps(20, 3, 31, seed=1)
    found = []
    for where in ("cpu", device):
        images = noise(2, 3, 9, 31).to(where).requires_grad_()
        out = ops.separable_sum(images, *rows, *columns)
        out.square().sum().backward()
        found.append((out.detach().cpu(), images.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
