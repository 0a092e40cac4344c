"""The training loop that all methods share: processes, steps and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import RowBudget
from pumice.models.draws import Draws
from pumice.models.examples import Row, by_shape, denoising_loss
from pumice.models.student import Learner

from .checkpoint import Checkpoint
from .processes import processes, sum_gradients


def train(
    student: Learner,
    rows: Callable[[int, Draws], Sequence[Row]],
    steps: int,
    *,
    learning_rate: float,
    count: int,
    seed: int,
    max_grad_norm: float,
    batch: int,
    checkpoint: Checkpoint | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Tensor:
    """Take steps of AdamW down the denoising loss, and tell it after each.

    Every random number is a function of seed, step and row, and rows are weighted by themselves, so that the
    result does not depend (but for rounding) on how many processes or passes they are spread over, nor on
    interruptions.

    Args:
        student: what trains.
        rows: from a step and the random numbers to what it learns.
        steps: how many in all.
        learning_rate: AdamW's, with betas 0.9 and 0.999 and a weight decay of 0.01.
        max_grad_norm: that all gradients together are clipped to; infinite for none.
        count: rows of a step.
        seed: of all random numbers.
        batch: rows of a pass; halved on out-of-memory.
        checkpoint: where to go on from, and to write every `checkpoint_every` steps and at the end.
        progress: show a bar.

    Returns:
        (steps,) float32, the loss of each step before its update.

    Raises:
        ValueError: if a loss or gradient is not finite; what was learned before is in the checkpoint.
    """
    device = student.model.device
    state = processes(device)
    draws = Draws([f"{seed}/training/{row}" for row in range(count)], device)
    optimizer = torch.optim.AdamW(
        student.masters, learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, fused=True
    )
    losses = torch.zeros(steps)
    done = 0 if checkpoint is None else checkpoint.read(student, optimizer, losses)
    budget = RowBudget(batch)
    main = state.is_main_process
    with tqdm(total=steps, initial=done, unit="step", disable=not (progress and main)) as bar:
        for step in range(done, steps):
            mine = rows(step, draws)[state.process_index :: state.num_processes]
            value = budget.run(partial(_backward, student, mine, draws, step))
            student.gather()
            sum_gradients(state, student.masters)
            value = reduce(value, "sum")
            norm = torch.nn.utils.clip_grad_norm_(student.masters, max_grad_norm)
            losses[step], length = torch.stack((value.float(), norm.float())).tolist()
            if not (math.isfinite(losses[step]) and math.isfinite(length)):
                raise ValueError(
                    f"learning_rate: got {learning_rate:g}, at which step {step} has a loss of "
                    f"{float(losses[step])} and a gradient of norm {length}; a smaller rate, or a wider "
                    "dtype of the pipeline, may do"
                )
            optimizer.step()
            optimizer.zero_grad()
            student.publish()
            bar.set_postfix(loss=f"{float(losses[max(0, step - 49) : step + 1].mean()):.4f}", refresh=False)
            bar.update()
            last = step == steps - 1
            if checkpoint is not None and main and (last or (step + 1) % checkpoint_every == 0):
                checkpoint.write(student, optimizer, losses, step + 1)
    state.wait_for_everyone()
    return losses


@torch.enable_grad()
def _backward(student: Learner, rows: Sequence[Row], draws: Draws, step: int, most: int) -> Tensor:
    """Leave the gradients of some rows, `most` in a pass; their loss."""
    student.clear()  # of a try that ran out of memory half-way
    total = torch.zeros((), device=student.model.device)
    for group in by_shape(rows):
        for start in range(0, len(group), most):
            part = group[start : start + most]
            embeds = student.encode([row.prompt for row in part])
            loss = denoising_loss(student.model, part, embeds, draws, step)
            (loss * student.scale).backward()
            total = total + loss.detach()
    return total
