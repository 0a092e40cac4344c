"""Changes of weights by hooks: each sample of a batch under its own, the weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .changes import Added, Chain, Change, Mapped, Shifted, Zeroed, difference

_Stacks = dict[tuple[int, ...], tuple[Tensor, Tensor]]


@contextmanager
def hooked(unet: nn.Module, changes: Sequence[Mapping[str, Change]]) -> Iterator[None]:
    """Inside the block, sample i of every batch meets `changes[i % len(changes)]`, by name of weights.

    What is added to a whole weight, and a chain, lies on the weight's device in its dtype: for each of the
    changes as much memory as the weight itself.

    Raises:
        ValueError: for a change that zeroes entries, or one of a layer that is no linear, convolution or
            norm; inside the block, for a batch that is no multiple of the changes.
    """
    count = len(changes)
    names = dict.fromkeys(name for of_sample in changes for name in of_sample)  # in order, once each
    stacks: _Stacks = {}  # layers share them
    handles = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            module, weight = unet.get_submodule(path), unet.get_parameter(name)
            every = [of_sample.get(name) for of_sample in changes]
            if any(change is not None and zeroes(change) for change in every):
                raise ValueError("edits: one zeroes weights, which nothing that is added does; apply it")
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                kind = type(module).__name__
                raise ValueError(f"edits: one changes {name} of a {kind}, which cannot be hooked; apply it")
            maps = [change if isinstance(change, Mapped) else None for change in every]
            if any(maps):
                hook = partial(_map, *_factors(maps, weight, stacks))
                handles.append(module.register_forward_pre_hook(hook))
            matrices = {i: change for i, change in enumerate(every) if isinstance(change, Added)}
            if matrices:
                found = partial(_low_rank, *_factors([*matrices.values()], weight, stacks))
                handles.append(module.register_forward_hook(partial(_add, found, list(matrices), count)))
            wholes = {i: change for i, change in enumerate(every) if isinstance(change, Shifted | Chain)}
            if wholes:
                deltas = torch.stack([difference(change, weight)[0].to(weight) for change in wholes.values()])
                found = partial(_of_bias if leaf == "bias" else _of_weight, deltas)
                handles.append(module.register_forward_hook(partial(_add, found, list(wholes), count)))
        # a compiled denoiser would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def zeroes(change: Change) -> bool:
    """Whether it zeroes entries, alone or in a chain."""
    return isinstance(change, Zeroed) or (isinstance(change, Chain) and any(map(zeroes, change.parts)))


def _factors(changes: Sequence[Any], weight: Tensor, stacks: _Stacks) -> tuple[Tensor, Tensor]:
    """Factors of all samples, (n, rows, r) and (n, r, d) on the weight's device; zero for None."""
    key = tuple(map(id, changes))
    if key not in stacks:
        factors = [(change.up, change.down) if change else None for change in changes]
        rank = max(len(pair[1]) for pair in factors if pair)
        rows = max(len(pair[0]) for pair in factors if pair)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ups = torch.zeros(len(changes), rows, rank, dtype=dtype)
        downs = torch.zeros(len(changes), rank, weight.numel() // len(weight), dtype=dtype)
        for up, down, pair in zip(ups, downs, factors, strict=True):
            if pair:
                up[:, : len(pair[1])], down[: len(pair[1])] = pair
        stacks[key] = ups.to(weight.device), downs.to(weight.device)
    return stacks[key]


def _map(up: Tensor, down: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = args[0]
    rows = _cut(x, len(up))
    return ((rows + _matrix(up, down, rows)).to(x.dtype).flatten(0, 1), *args[1:])


def _add(
    added: Callable[[Any, Tensor], Tensor],
    samples: Sequence[int],
    count: int,
    module: nn.Module,
    args: tuple[Tensor, ...],
    y: Tensor,
) -> Tensor:
    """y and what some of `count` samples have beside it."""
    x, rows = _cut(args[0], count), _cut(y, count)
    if len(samples) == count:
        return (rows + added(module, x)).to(y.dtype).flatten(0, 1)
    rows = rows.clone()
    rows[:, samples] += added(module, x[:, samples])
    return rows.flatten(0, 1)


def _cut(x: Tensor, count: int) -> Tensor:
    """(B, ...) as (B / count, count, ...)."""
    if len(x) % count:
        raise ValueError(f"edits: got {count} for a batch of {len(x)}, expected a number that divides it")
    return x.unflatten(0, (-1, count))


def _low_rank(up: Tensor, down: Tensor, module: Any, x: Tensor) -> Tensor:
    """up (down x) of x (b, n, ...), with the i-th of n factors for sample i."""
    if not isinstance(module, nn.Conv2d):
        return _matrix(up, down, x)
    kernels = down.unflatten(2, module.weight.shape[1:])
    inner = _convolved(module, kernels, x)
    return (up.to(x.device) @ inner.flatten(3)).unflatten(3, inner.shape[3:])


def _matrix(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    up, down = up.to(x.device), down.to(x.device)  # an offloaded weight was elsewhere before
    rows = x.to(up.dtype).reshape(*x.shape[:2], -1, x.shape[-1])
    return ((rows @ down.mT) @ up.mT).reshape(*x.shape[:-1], -1)


def _convolved(module: nn.Conv2d, kernels: Tensor, x: Tensor) -> Tensor:
    """A convolution of sample i by the i-th of n kernels."""
    x, kernels = x.to(kernels.dtype), kernels.to(x.device)
    parts = zip(x.unbind(1), kernels, strict=True)
    return torch.stack([module._conv_forward(part, kernel, None) for part, kernel in parts], dim=1)


def _of_weight(deltas: Tensor, module: Any, x: Tensor) -> Tensor:
    """What deltas (n, ...) of a layer's weight make of x (b, n, ...)."""
    deltas, x = deltas.to(x.device), x.to(deltas.dtype)
    if isinstance(module, nn.Conv2d):
        return _convolved(module, deltas, x)
    if isinstance(module, nn.Linear):
        rows = x.transpose(0, 1)  # one product for each delta, of all that meets it
        found = torch.bmm(rows.flatten(1, -2), deltas.mT)
        return found.reshape(*rows.shape[:-1], -1).transpose(0, 1)
    if isinstance(module, nn.GroupNorm):
        plain = F.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).view_as(x)
    else:
        plain = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return plain * _of_bias(deltas, module, x)


def _of_bias(deltas: Tensor, module: Any, x: Tensor) -> Tensor:
    """Deltas (n, channels), to be broadcast over positions."""
    deltas = deltas.to(x.device)
    ones = (1,) * (x.ndim - 3)
    last = isinstance(module, nn.Linear | nn.LayerNorm)
    return deltas.reshape(len(deltas), *ones, -1) if last else deltas.reshape(len(deltas), -1, *ones)
