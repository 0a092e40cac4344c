"""The training loop that all methods share: processes, steps and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import RowBudget
from pumice.models.draws import Draws
from pumice.models.examples import Row, by_shape, denoising_loss
from pumice.models.student import Student

from .checkpoint import Checkpoint

BUCKET = 2**26  # values that processes exchange at a time


def train(
    student: Student,
    rows: Callable[[int, Draws], Sequence[Row]],
    steps: int,
    *,
    learning_rate: float,
    count: int,
    seed: int,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
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
        learning_rate, weight_decay, max_grad_norm: AdamW's, with betas 0.9 and 0.999; gradients are clipped
            to a norm.
        count: rows of a step.
        seed: of all random numbers.
        batch: rows of a pass; halved on out-of-memory.
        checkpoint: where to go on from, and to write every `checkpoint_every` steps and at the end.
        progress: show a bar.

    Returns:
        (steps,) float32, the loss of each step before its update.

    Raises:
        ValueError: if a loss is not finite; what was learned before is in the checkpoint.
    """
    accelerator = Accelerator()
    device = student.model.device
    if accelerator.num_processes > 1 and device != accelerator.device:
        raise ValueError(
            f"pipe: it is on {device}, expected {accelerator.device}, the device of this process"
        )
    draws = Draws([f"{seed}/training/{row}" for row in range(count)], device)
    optimizer = torch.optim.AdamW(
        student.masters, learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
    )
    losses = torch.zeros(steps)
    done = 0 if checkpoint is None else checkpoint.read(student, optimizer, losses)
    budget = RowBudget(batch)
    main = accelerator.is_main_process
    with tqdm(total=steps, initial=done, unit="step", disable=not (progress and main)) as bar:
        for step in range(done, steps):
            mine = rows(step, draws)[accelerator.process_index :: accelerator.num_processes]
            value = sum(
                (_backward(student, group, draws, step, budget) for group in by_shape(mine)),
                torch.zeros((), device=device),
            )
            student.gather()
            if accelerator.num_processes > 1:
                value = accelerator.reduce(value, "sum")
                _reduce(accelerator, student.masters)
            losses[step] = float(value)
            if not math.isfinite(losses[step]):
                raise ValueError(
                    f"learning_rate: the loss of step {step} is {float(losses[step])} at {learning_rate:g}; "
                    "a smaller rate, or a wider dtype of the pipeline, may do"
                )
            torch.nn.utils.clip_grad_norm_(student.masters, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            student.publish()
            bar.set_postfix(loss=f"{float(losses[max(0, step - 49) : step + 1].mean()):.4f}", refresh=False)
            bar.update()
            last = step == steps - 1
            if checkpoint is not None and main and (last or (step + 1) % checkpoint_every == 0):
                checkpoint.write(student, optimizer, losses, step + 1)
    accelerator.wait_for_everyone()
    return losses


@torch.enable_grad()
def _backward(student: Student, rows: Sequence[Row], draws: Draws, step: int, budget: RowBudget) -> Tensor:
    """Add the gradients of some rows; their loss."""
    total, done = torch.zeros((), device=student.model.device), 0
    while done < len(rows):

        def some(most: int, left: Sequence[Row] = rows[done:]) -> tuple[int, Tensor]:
            part = left[:most]
            embeds = student.encode([row.prompt for row in part])
            loss = denoising_loss(student.model, part, embeds, draws, step)
            (loss * student.scale).backward()
            return len(part), loss.detach()

        count, loss = budget.run(some)
        total, done = total + loss, done + count
    return total


def _reduce(accelerator: Accelerator, masters: Sequence[Tensor]) -> None:
    """Sum gradients over processes, many at a time."""
    for master in masters:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    gradients = [master.grad for master in masters if master.grad is not None]
    while gradients:
        bucket, size = list[Tensor](), 0
        while gradients and (not bucket or size + gradients[0].numel() <= BUCKET):
            bucket.append(gradients.pop(0))
            size += bucket[-1].numel()
        summed = accelerator.reduce(torch.cat([each.flatten() for each in bucket]), "sum")
        for gradient, part in zip(bucket, summed.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
