"""Changes of weights by hooks: each sample of a batch under its own, the weights as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .changes import Added, Change, Mapped


@contextmanager
def hooked(unet: nn.Module, changes: Sequence[Mapping[str, Change]]) -> Iterator[None]:
    """Inside the block, sample i of every batch meets `changes[i % len(changes)]`, by name of weights.

    Raises:
        ValueError: for a change that is none of what enters or leaves a layer; inside the block, for a batch
            that is no multiple of the changes.
    """
    names = dict.fromkeys(name for of_sample in changes for name in of_sample)  # in order, once each
    stacks: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # layers share them
    handles = []
    try:
        for name in names:
            module = unet.get_submodule(name.removesuffix(".weight"))
            every = [of_sample.get(name) for of_sample in changes]
            if any(change is not None and not isinstance(change, Mapped | Added) for change in every):
                raise ValueError("edits: one zeroes weights, which no map of text embeddings does; apply it")
            for kind in (Mapped, Added):
                chosen = [change if isinstance(change, kind) else None for change in every]
                if not any(chosen):
                    continue
                key = kind, *map(id, chosen)
                if key not in stacks:
                    stacks[key] = _stack(chosen, unet.get_parameter(name))
                if kind is Mapped:
                    handles.append(module.register_forward_pre_hook(partial(_map, *stacks[key])))
                else:
                    handles.append(module.register_forward_hook(partial(_add, *stacks[key])))
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
