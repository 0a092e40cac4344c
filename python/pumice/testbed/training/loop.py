"""The training loop that every part of the testbed shares: bounded in time, and resumable exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAVE_EVERY_S = 120.0
WARMUP_STEPS = 200
MAX_GRAD_NORM = 1.0


def train(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    *,
    work: Path,
    steps: int,
    minutes: float,
    lr: float,
    groups: Iterable[dict[str, Any]] | None = None,
    average_decay: float | None = None,
) -> bool:
    """Minimise `loss(step)` with AdamW, linear warm-up and cosine decay over `steps`; True once all are done.

    Stops after `minutes` with a checkpoint `<work>/<name>.pt`, from which the next call goes on. `loss` must
    draw its batch from `step` alone. `groups` are optimizer groups with their own `lr`; by default all
    parameters train at `lr`. With `average_decay` the exponential moving average of all weights is kept
    beside them.
    """
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        groups or [{"params": parameters, "lr": lr}], lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    twins = {
        key: AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(average_decay)).requires_grad_(False)
        for key, module in (modules.items() if average_decay else ())
    }
    checkpoint = work / f"{name}.pt"
    first = done = _restore(checkpoint, modules, twins, optimizer)

    began, saved, shown, running = time.monotonic(), time.monotonic(), time.monotonic(), 0.0
    for step in range(first, steps):
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        for key, twin in twins.items():
            twin.update_parameters(modules[key])

        done = step + 1
        running = float(value.detach()) if step == first else 0.98 * running + 0.02 * float(value.detach())
        now = time.monotonic()
        if now - shown > 20 or done == steps:
            pace = (now - began) / (done - first)
            print(f"{name} {done}/{steps}  loss {running:.5f}  {pace:.3f} s/step", flush=True)
            shown = now
        late = now - began > 60 * minutes
        if now - saved > SAVE_EVERY_S or late or done == steps:
            _save(checkpoint, modules, twins, optimizer, done)
            saved = now
        if late:
            break
    return done >= steps


def restore(module: nn.Module, checkpoint: Path, key: str) -> None:
    """Put the weights of a checkpoint into `module`: the averaged ones where there are some."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if key in state["average"]:
        averaged = AveragedModel(module)
        averaged.load_state_dict(state["average"][key])
        module.load_state_dict(averaged.module.state_dict())
    else:
        module.load_state_dict(state["modules"][key])


def _save(
    path: Path,
    modules: dict[str, nn.Module],
    twins: dict[str, AveragedModel],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "step": step,
        "modules": {key: module.state_dict() for key, module in modules.items()},
        "average": {key: twin.state_dict() for key, twin in twins.items()},
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _restore(
    path: Path,
    modules: dict[str, nn.Module],
    twins: dict[str, AveragedModel],
    optimizer: torch.optim.Optimizer,
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    for key, twin in twins.items():
        twin.load_state_dict(state["average"][key])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
