"""AdamW on many tensors at once, each of which stops when it has reached its target."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT16_LOSS_SCALE = 2.0**10  # else small gradients underflow


class Evaluation(NamedTuple):
    """Of A items."""

    loss: Tensor
    """(A,)."""
    gradient: Tensor
    """(A, ...), of scale * loss; where loss <= target, or when gradients are off, anything."""
    magnitudes: Tensor
    """(A, S), what the loss was made of."""


Objective = Callable[[list[int], Tensor, Tensor], Evaluation]
"""From which items, A of them, their values (A, ...) and their loss scales (A,)."""


@dataclass(frozen=True, eq=False)
class Descent:
    """Of P items.

    Attributes:
        values: (P, ...).
        before, after: (P, S) float32 on the CPU, the magnitudes at the start and at `values`.
        trace: the losses of each item, the first one at its start.
        converged: (P,) bool.
        skipped: (P,) int64, steps that a non-finite gradient forbade.
    """

    values: Tensor
    before: Tensor
    after: Tensor
    trace: tuple[tuple[float, ...], ...]
    converged: Tensor
    skipped: Tensor


def check_descent(target: float, max_iterations: int, lr: float, weight_decay: float) -> None:
    """Raise ValueError for numbers that no descent could use."""
    for name, value in (("target", target), ("lr", lr)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value}, expected a positive number")
    if operator.index(max_iterations) < 1:
        raise ValueError(f"max_iterations: got {max_iterations}, expected at least 1")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay: got {weight_decay}, expected a number that is not negative")


def descend(
    start: Tensor,
    objective: Objective,
    *,
    target: float,
    max_iterations: int,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype,
    unchecked_end: bool = False,
    finished: Callable[[int], object] = lambda count: None,
) -> Descent:
    """Step every item until its loss is at most `target`; an item that is there no longer moves.

    An item that never gets there is evaluated once more after its last step, and its best iterate returned.
    A non-finite gradient is skipped, and the loss is scaled less at that item's next step. The state is
    float32 or better whatever the model's dtype: in float16 AdamW's eps rounds to 0, and a coordinate without
    gradient becomes 0 / 0.

    Args:
        start: (P, ...).
        objective: see `Objective`; gradients are off when none is needed.
        target, max_iterations, lr, weight_decay: of all items.
        dtype: the model's; losses of float16 ones are scaled.
        unchecked_end: an item that does not get there ends with its last iterate, good or bad.
        finished: told how many items are ready.
    """
    # one parameter an item: AdamW leaves those without a gradient alone, their decay included
    state = start.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
    parameters = list(state.unbind())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    count = len(parameters)
    scale = state.new_full((count,), _FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0)
    trace: list[list[float]] = [[] for _ in range(count)]
    values = list(state.clone().unbind())
    before, after = list(values), list(values)  # to be overwritten
    least, converged, skipped = [math.inf] * count, [False] * count, [0] * count
    active = list(range(count))
    for iteration in range(max_iterations + 1):
        last = iteration == max_iterations
        current = torch.stack([parameters[item] for item in active])
        with torch.set_grad_enabled(not last):
            found = objective(active, current, scale[active])
        finite = found.gradient.flatten(1).isfinite().all(1)
        gradient = found.gradient / scale[active].view(-1, *[1] * (state.ndim - 1))
        moving = []
        # the one read of an iteration: what has arrived, and what cannot step
        losses, steppable = torch.stack((found.loss, finite.to(found.loss))).tolist()
        for row, (item, loss, can_step) in enumerate(zip(active, losses, steppable, strict=True)):
            trace[item].append(loss)
            if iteration == 0:
                before[item] = after[item] = found.magnitudes[row]
            arrived = loss <= target
            if arrived or unchecked_end or loss < least[item]:
                least[item], values[item], after[item] = loss, current[row], found.magnitudes[row]
            if arrived:
                converged[item] = not (last and unchecked_end)
            elif not last:
                moving.append(item)
                skipped[item] += 0 if can_step else 1
                parameters[item].grad = gradient[row] if can_step else None
        finished(len(active) if last else len(active) - len(moving))
        if not moving:
            break
        optimizer.step()
        scale[active] = torch.where(finite, scale[active], scale[active] / 16)
        for parameter in parameters:
            parameter.grad = None
        active = moving
    return Descent(
        values=torch.stack(values),
        before=torch.stack(before).float().cpu(),
        after=torch.stack(after).float().cpu(),
        trace=tuple(map(tuple, trace)),
        converged=torch.tensor(converged),
        skipped=torch.tensor(skipped),
    )
