"""The training loop that all methods share: processes, steps and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import RowBudget
from pumice.training.checkpoint import Checkpoint
from pumice.training.processes import processes, sum_gradients
from pumice.training.student import Learner

Loss = Callable[[int, Sequence[int]], Tensor]
"""From a step and some of its rows to their part of its loss."""


def train(
    learner: Learner,
    loss: Loss,
    steps: int,
    *,
    learning_rate: float | Callable[[int], float],
    count: int,
    weight_decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float = math.inf,
    batch: int,
    prepare: Callable[[int], None] | None = None,
    after: Callable[[int], None] | None = None,
    kept: Mapping[str, Tensor] = {},
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Tensor:
    """Take steps of AdamW down a loss, and tell it after each.

    Losses draw every random number as a function of seed, step and row, and rows are weighted by themselves,
    so that the result does not depend (but for rounding) on how many processes or passes they are spread
    over, nor on interruptions.

    Args:
        learner: what trains.
        loss: the rows' parts add up to that of the step.
        steps: how many in all.
        learning_rate: AdamW's, or that of each step.
        count: rows of a step.
        weight_decay, betas, eps: AdamW's; without weight decay it is Adam.
        max_grad_norm: that all gradients together are clipped to; infinite for none.
        batch: rows of a pass; halved on out-of-memory.
        prepare, after: called before and after each step, by every process.
        kept: what else the state of the training is, changed in place; by name.
        checkpoint: where to go on from, and to write every `checkpoint_every` steps and at the end.
        progress: show a bar.

    Returns:
        (steps,) float32, the loss of each step before its update.

    Raises:
        ValueError: if a loss or gradient is not finite; what was learned before is in the checkpoint.
    """
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
    state = processes(learner.model.device)
    optimizer = torch.optim.AdamW(
        learner.masters, rate(0), betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
    losses = torch.zeros(steps)
    done = 0 if checkpoint is None else checkpoint.read(learner, optimizer, losses, kept)
    budget = RowBudget(batch)
    main = state.is_main_process
    mine = range(count)[state.process_index :: state.num_processes]
    with tqdm(total=steps, initial=done, unit="step", disable=not (progress and main)) as bar:
        for step in range(done, steps):
            if prepare is not None:
                prepare(step)
            value = budget.run(partial(_backward, learner, loss, step, mine))
            learner.gather()
            sum_gradients(state, learner.masters)
            value = reduce(value, "sum")
            norm = torch.nn.utils.clip_grad_norm_(learner.masters, max_grad_norm)
            losses[step], length = torch.stack((value.float(), norm.float())).tolist()
            if not (math.isfinite(losses[step]) and math.isfinite(length)):
                kept_at = "" if checkpoint is None else "; the last checkpoint stays as it is"
                found = f"step {step} has a loss of {float(losses[step])} and a gradient of norm {length}"
                if learner.scale != 1 and math.isfinite(losses[step]):  # no rate would do
                    dtype = learner.model.dtype
                    raise ValueError(
                        f"pipe: got {dtype}, in which gradients overflow: {found}; expected a wider dtype, "
                        f"such as torch.bfloat16{kept_at}"
                    )
                raise ValueError(
                    f"learning_rate: got {rate(step):g}, at which {found}; a smaller rate, or a wider dtype "
                    f"of the pipeline, may do{kept_at}"
                )
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
            learner.publish()
            if after is not None:
                after(step)
            bar.set_postfix(loss=f"{float(losses[max(0, step - 49) : step + 1].mean()):.4f}", refresh=False)
            bar.update()
            last = step == steps - 1
            if checkpoint is not None and main and (last or (step + 1) % checkpoint_every == 0):
                checkpoint.write(learner, optimizer, losses, step + 1, kept)
    state.wait_for_everyone()
    return losses


@torch.enable_grad()
def _backward(learner: Learner, loss: Loss, step: int, rows: Sequence[int], most: int) -> Tensor:
    """Leave the gradients of some rows, `most` in a pass; their loss."""
    learner.clear()  # of a try that ran out of memory half-way
    total = torch.zeros((), device=learner.model.device)
    for start in range(0, len(rows), most):
        value = loss(step, rows[start : start + most])
        (value * learner.scale).backward()
        total = total + value.detach().float()  # in any dtype, as processes without rows have float32
    return total
