from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Case, benchmark_of, main
from pumice import ops


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))


def eager_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """What autograd runs for the two modules, without weight gradients."""
    sizes = x.shape[0], x.shape[1], x[0, 0].numel()
    z = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, 32, 1e-5)[0]
    dz = torch.ops.aten.silu_backward(dy, z)
    gradient = torch.ops.aten.native_group_norm_backward
    return gradient(dz, x, mean, rstd, weight, *sizes, 32, [True, False, False])[0]


def backward(*tensors: Tensor) -> Tensor:
    return torch.ops.pumice.group_norm_silu_backward(*tensors, 32, False)[0]


def cases(device: str) -> Iterator[Case]:
    shapes = [(4, 320, 64, 64), (1, 128, 512, 512)]
    dtypes = [torch.float32]
    if device == "cuda":
        shapes = [(128, 320, 64, 64), (8, 128, 512, 512)]  # well past any L2
        dtypes += [torch.bfloat16]
    layouts = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    for shape in shapes:
        for dtype in dtypes:
            for layout, memory_format in layouts.items():
                x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
                weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype)
                label = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}{layout}"
                tolerance = 1e-4 if dtype == torch.float32 else 3e-2
                # x is read twice: for the statistics, and for the result.
                yield Case(
                    "group_norm_silu",
                    label,
                    3 * x.nbytes,
                    partial(eager, x, weight, bias),
                    partial(ops.group_norm_silu, x, 32, weight, bias),
                    tolerance,
                )
                statistics = torch.empty(2, shape[0], 32, device=device)
                if device != "meta":
                    _, *statistics = torch.ops.pumice.group_norm_silu(x, weight, bias, 32, 1e-5)
                args = (torch.randn_like(x), x, weight, bias)
                yield Case(
                    "group_norm_silu_backward",
                    f"{label}, backward",
                    5 * x.nbytes,
                    partial(eager_backward, *args, *(s.to(dtype) for s in statistics)),
                    partial(backward, *args, *statistics),
                    tolerance,
                )


test_group_norm_silu = benchmark_of(cases)

if __name__ == "__main__":
    main(cases)
