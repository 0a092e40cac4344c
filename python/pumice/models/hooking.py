"""Edits by hooks: each sample of a batch under an edit of its own, the weights as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .changes import Added, Change, Mapped
from .edit import Edit, loaded
from .fingerprint import fingerprint


@contextmanager
def hook_edits(pipe: Any, edits: Sequence[Edit | None], *, base: str | None = None) -> Iterator[None]:
    """Inside the block, sample i of every batch is drawn as if `edits[i % len(edits)]` were applied.

    ::

        (W M) e = W (M e)          what enters an edited layer is mapped, W stays

    Guidance puts two batches into one, all samples without their prompts and then all with: as long as
    `edits` has one entry for each sample of a pipeline's call, or divides their number, both rows of a sample
    meet the same edit. Nothing can tell a call with fewer samples than edits, whose rows would meet different
    ones. None leaves a sample as it is. base: the model's `fingerprint`, if that is known.

    Raises:
        TypeError: for a path or id.
        ValueError: for no edits, an edit that was made for a model with other weights, or that zeroes
            weights; inside the block, for a batch that is no multiple of the edits.
        UnsupportedModelError: as for `Edit.apply`.
    """
    model, unet = loaded(pipe)
    edits = list(edits)
    if not edits:
        raise ValueError("edits: got none, expected one for each sample, or None where there is none")
    names: dict[str, None] = {}  # in order, once each
    found = base or fingerprint(model)
    for edit in dict.fromkeys(edits):
        if edit is not None:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: got a {type(edit).__name__}, expected edits and None")
            edit.check_fits(model, found)
            names |= dict.fromkeys(edit.changes)
    stacks: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # layers share them
    handles = []
    try:
        for name in names:
            module = unet.get_submodule(name.removesuffix(".weight"))
            changes = [edit.changes.get(name) if edit else None for edit in edits]
            for kind in (Mapped, Added):
                chosen = [change if isinstance(change, kind) else None for change in changes]
                if not any(chosen):
                    continue
                key = kind, *map(id, chosen)
                if key not in stacks:
                    stacks[key] = _stack(chosen, unet.get_parameter(name))
                if kind is Mapped:
                    handles.append(module.register_forward_pre_hook(partial(_map, *stacks[key])))
                else:
                    handles.append(module.register_forward_hook(partial(_add, *stacks[key])))
            odd = next((c for c in changes if c is not None and not isinstance(c, Mapped | Added)), None)
            if odd is not None:
                raise ValueError("edits: one zeroes weights, which no map of text embeddings does; apply it")
        # a compiled denoiser would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _stack(changes: Sequence[Change | None], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of all samples, (n, rows, r) and (n, r, d) on the weight's device; zero for None."""
    factors = [(change.up, change.down) if isinstance(change, Mapped | Added) else None for change in changes]
    rank = max(len(pair[1]) for pair in factors if pair)
    rows = max(len(pair[0]) for pair in factors if pair)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    ups = torch.zeros(len(changes), rows, rank, dtype=dtype)
    downs = torch.zeros(len(changes), rank, weight.shape[1], dtype=dtype)
    for up, down, pair in zip(ups, downs, factors, strict=True):
        if pair:
            up[:, : len(pair[1])], down[: len(pair[1])] = pair
    return ups.to(weight.device), downs.to(weight.device)


def _map(up: Tensor, down: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = args[0]
    return (_plus(x, x, up, down), *args[1:])


def _add(up: Tensor, down: Tensor, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return _plus(y, args[0], up, down)


def _plus(y: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y + (x down^T) up^T, rows of sample i with the i-th of n factors; x (B, ..., d)."""
    count = len(up)
    if len(x) % count:
        raise ValueError(f"edits: got {count} for a batch of {len(x)}, expected a number that divides it")
    up, down = up.to(x.device), down.to(x.device)  # an offloaded weight was elsewhere before
    rows = x.to(up.dtype).reshape(len(x) // count, count, -1, x.shape[-1])
    added = (rows @ down.mT) @ up.mT
    return (y + added.reshape(y.shape)).to(y.dtype)
