"""What an edit does to a weight: zero some entries, map its input, add a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from pumice.ops.low_rank_edit import low_rank_edit_

_BITS = (128, 64, 32, 16, 8, 4, 2, 1)


class Change(Protocol):
    """One change, of one weight or of several at once."""

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError unless it fits a weight of that name."""

    def originals(self, weight: Tensor) -> Tensor:
        """What `undo` needs, on the weight's device."""

    def apply(self, weights: Sequence[Tensor]) -> None:
        """Change the weights in place."""

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        """Put back, to the bit, what `originals` kept of a weight."""


@dataclass(frozen=True, eq=False)
class Zeroed:
    """Some of a weight's entries become zero.

    Attributes:
        bits: (ceil(entries / 8),) uint8 on the CPU, 1 where zero, row by row, the first entry in
            the highest bit of the first byte.
        shape: of the weight.
    """

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, mask: Tensor) -> Zeroed:
        """From a boolean mask of the weight's shape, on any device."""
        flat = mask.flatten().byte()
        flat = nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
        bits = (flat * flat.new_tensor(_BITS)).sum(1, dtype=torch.uint8)
        return cls(bits.cpu(), tuple(mask.shape))

    def mask(self) -> Tensor:
        """The boolean mask on the CPU."""
        bits = (self.bits[:, None] & torch.tensor(_BITS, dtype=torch.uint8)) != 0
        return bits.flatten()[: self.size].reshape(self.shape)

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def count(self) -> int:
        """Entries that become zero."""
        return int(self.mask().sum())

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a list, if it comes from a file
        if self.bits.dtype != torch.uint8 or self.bits.shape != (-(-self.size // 8),):
            raise ValueError(f"a mask does not have the bits of its shape {self.shape}")

    def check(self, name: str, weight: Tensor) -> None:
        if weight.shape != self.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, its mask {self.shape}")

    def originals(self, weight: Tensor) -> Tensor:
        return weight.detach()[self.mask().to(weight.device)]

    def apply(self, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            weight.masked_fill_(self.mask().to(weight.device), 0)

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        weight.masked_scatter_(self.mask().to(weight.device), originals.to(weight))


@dataclass(frozen=True, eq=False)
class _LowRank:
    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        if up.dtype != torch.float32 or down.dtype != torch.float32 or up.ndim != 2 or down.ndim != 2:
            raise ValueError("the factors of a change are not float32 matrices")
        if up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the factors of a change, {tuple(up.shape)} and {tuple(down.shape)}, do not fit"
            )
        if not bool(up.isfinite().all() & down.isfinite().all()):
            raise ValueError("the factors of a change are not finite")

    @property
    def rank(self) -> int:
        return len(self.down)

    def check(self, name: str, weight: Tensor) -> None:
        changed = len(self.up), self.down.shape[1]
        inputs = weight.numel() // max(len(weight), 1)
        adds = isinstance(self, Added)
        rows = len(weight) if adds else inputs
        fits = weight.ndim >= 2 if adds else weight.ndim == 2  # what enters a convolution is no row
        if not fits or changed != (rows, inputs):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, its change is for {changed}")

    def at_most(self, rank: int) -> Self:
        """The nearest change of that rank, in the Frobenius norm of up @ down."""
        q_up, r_up = torch.linalg.qr(self.up.double())
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T)
        up, down = q_up @ u[:, :rank] * s[:rank], v[:rank] @ q_down.T
        return replace(self, up=up.float(), down=down.float().contiguous())

    def originals(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        weight.copy_(originals)


@dataclass(frozen=True, eq=False)
class Mapped(_LowRank):
    """What enters the linear is mapped first: W <- W (I + up down).

    Attributes:
        up: (d, r) float32 on the CPU.
        down: (r, d).
    """

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> Mapped:
        """From factors of any rank and floating dtype; a rank above d becomes d, exactly."""
        if len(down) > down.shape[1]:
            up, down = up @ down, torch.eye(down.shape[1], dtype=up.dtype, device=up.device)
        return cls(up.float().cpu().contiguous(), down.float().cpu().contiguous())

    def apply(self, weights: Sequence[Tensor]) -> None:
        dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        up, down = (factor.to(weights[0].device, dtype) for factor in (self.up, self.down))
        low_rank_edit_(weights, up, down)

    def lora(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(up', down) with W + up' down the changed weight, float32 on the CPU."""
        return (weight.detach().float() @ self.up.to(weight.device)).cpu(), self.down

    def then(self, other: Mapped) -> Mapped:
        """The map of a model that was edited by this change first, then by the other.

        ::

            (I + U1 D1)(I + U2 D2) = I + [U1 U2] [D1 (I + U2 D2); D2]
        """
        up1, down1, up2, down2 = (x.double() for x in (self.up, self.down, other.up, other.down))
        return Mapped.of(
            torch.cat([up1, up2], dim=1), torch.cat([down1 + (down1 @ up2) @ down2, down2], dim=0)
        )


@dataclass(frozen=True, eq=False)
class Added(_LowRank):
    """A low-rank matrix is added: W <- W + up down.

    Attributes:
        up: (o, r) float32 on the CPU.
        down: (r, d).
    """

    def apply(self, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            up, down = (factor.to(weight.device, dtype) for factor in (self.up, self.down))
            rows = weight.to(dtype).flatten(1)  # of a convolution, all that an output reads
            weight.copy_(torch.addmm(rows, up, down).view_as(weight))

    def lora(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors themselves."""
        return self.up, self.down


@dataclass(frozen=True, eq=False)
class Shifted:
    """A tensor is added: W <- W + delta, as training leaves weights of any shape.

    Attributes:
        delta: float32 on the CPU, of the weight's shape.
    """

    delta: Tensor

    def __post_init__(self) -> None:
        if self.delta.dtype != torch.float32:
            raise ValueError("a change is not float32")
        if not bool(self.delta.isfinite().all()):
            raise ValueError("a change is not finite")

    def check(self, name: str, weight: Tensor) -> None:
        if weight.shape != self.delta.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, its change is for {tuple(self.delta.shape)}"
            )

    def originals(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    def apply(self, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(dtype) + self.delta.to(weight.device, dtype))

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        weight.copy_(originals)


@dataclass(frozen=True, eq=False)
class Chain:
    """Several changes of one weight, one after the other.

    Attributes:
        parts: in order.
    """

    parts: tuple[Change, ...]

    def check(self, name: str, weight: Tensor) -> None:
        for part in self.parts:
            part.check(name, weight)

    def originals(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    def apply(self, weights: Sequence[Tensor]) -> None:
        for part in self.parts:
            part.apply(weights)

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        weight.copy_(originals)


def joined(first: Change, second: Change) -> Change:
    """One change that is both, the first made first: of one kind where both map, or both add."""
    if isinstance(first, Mapped) and isinstance(second, Mapped):
        return first.then(second)
    if isinstance(first, Added) and isinstance(second, Added):
        return Added(torch.cat((first.up, second.up), dim=1), torch.cat((first.down, second.down)))
    if isinstance(first, Shifted) and isinstance(second, Added):
        first, second = second, first  # a sum either way
    if isinstance(first, Added | Shifted) and isinstance(second, Shifted):
        whole = first.delta if isinstance(first, Shifted) else (first.up @ first.down).view_as(second.delta)
        return Shifted(whole + second.delta)
    return Chain((first, second))


def scaled(change: Change, factor: float) -> Change | None:
    """What is added, times a number; None for what maps or zeroes, alone or in a chain."""
    if isinstance(change, Added):
        return replace(change, up=factor * change.up)
    if isinstance(change, Shifted):
        return replace(change, delta=factor * change.delta)
    if isinstance(change, Chain):
        parts = [scaled(part, factor) for part in change.parts]
        found = tuple(part for part in parts if part is not None)
        return Chain(found) if len(found) == len(parts) else None
    return None


def nearest(change: Change, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of that rank nearest, in the Frobenius norm, to what a change adds to a weight; float32 on
    the CPU, a convolution's as a matrix."""
    before = weight.detach().double()
    after = before.clone()
    change.apply([after])
    u, s, v = torch.linalg.svd((after - before).flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank]).float().cpu(), v[:rank].float().cpu().contiguous()


def difference(change: Change, weight: Tensor) -> tuple[Tensor, ...]:
    """What a change adds to a weight: the factors (up, down) of a low rank, else (delta,) of its shape."""
    if isinstance(change, Mapped | Added):
        return change.lora(weight)
    if isinstance(change, Shifted):
        return (change.delta,)
    before = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    after = before.clone()
    change.apply([after])
    return (after - before,)


@torch.no_grad()
def extent(changes: Mapping[str, Change], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """`relative_change` of changes by the names of their weights."""
    return relative_change(
        (name, weights[name], *difference(change, weights[name])) for name, change in changes.items()
    )


def relative_change(differences: Iterable[tuple[str, Tensor, *tuple[Tensor, ...]]]) -> dict[str, Any]:
    """|dW| / |W|, Frobenius norms, of each (name, W, dW), or (name, W, up, down) of dW = up down, and of all
    together."""
    relative, changed, whole = {}, 0.0, 0.0
    inner: dict[int, tuple[Tensor, Tensor]] = {}  # layers share down
    for name, weight, *found in differences:
        if len(found) == 2:
            up, down = found[0].double(), found[1]
            if id(down) not in inner:
                # which also keeps the id from being another's
                inner[id(down)] = down, down.double() @ down.double().T
            # |U D|^2 = <U^T U, D D^T>
            square = max(float(((up.T @ up) * inner[id(down)][1]).sum()), 0.0)
        else:
            square = _squared(found[0])
        norm = _squared(weight.detach())
        relative[name] = math.sqrt(square / norm) if norm else 0.0
        changed, whole = changed + square, whole + norm
    return {"relative_change": relative, "overall_change": math.sqrt(changed / whole) if whole else 0.0}


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
