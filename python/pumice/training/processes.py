"""What several processes of one training do together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor

BUCKET = 2**26  # values that are exchanged at a time


def processes(device: torch.device) -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started.

    An `Accelerator` would settle how all later ones of the caller compute.

    Raises:
        ValueError: if the pipeline is not on the device of this one of several.
    """
    found = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    here, there = ((each.type, each.index or 0) for each in (found.device, device))
    if found.num_processes > 1 and here != there:  # "cpu" is "cpu:0"
        raise ValueError(f"pipe: it is on {device}, expected {found.device}, the device of this process")
    return found


def sum_gradients(state: PartialState, weights: Sequence[Tensor]) -> None:
    """Sum gradients over processes, many at a time; what has none anywhere is left without."""
    if state.num_processes == 1:
        return
    having = torch.tensor([weight.grad is not None for weight in weights], device=state.device)
    having = reduce(having.int(), "sum").bool()
    gradients = []
    for weight, has in zip(weights, having.tolist(), strict=True):
        if has:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
    while gradients:
        bucket, size = list[Tensor](), 0
        while gradients and (not bucket or size + gradients[0].numel() <= BUCKET):
            bucket.append(gradients.pop(0))
            size += bucket[-1].numel()
        summed = reduce(torch.cat([each.flatten() for each in bucket]), "sum")
        for gradient, part in zip(bucket, summed.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
