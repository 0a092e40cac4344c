"""One projected gradient step: along the gradient, back into the budget, back into a picture's range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pumice import _native
from pumice.ops import _layout
from pumice.ops._registry import DTYPES, register

Norm = Literal["linf", "l2"]


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float | Tensor,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    norm: Norm = "linf",
) -> Tensor:
    """One step of projected gradient ascent (Madry et al., 2018, arXiv:1706.06083), in one pass over memory.

    With ``norm="linf"``::

        delta = clamp(x + step_size * sign(grad) - x0, -eps, eps)        sign(0) = 0
        out   = clamp(x0 + delta, *bounds)

    and with ``norm="l2"``, the norms taken over each sample::

        delta = x + step_size * grad / max(|grad|, 1e-12) - x0
        out   = clamp(x0 + delta * min(1, eps / |delta|), *bounds)

    Args:
        x: the current pictures, (B, ...), float32 (or float64: plain torch).
        grad: the gradient of the loss that is to grow, shaped as x; float32, float16 or bfloat16.
        x0: the clean pictures, shaped and typed as x.
        step_size: in the unit of the pictures; a number, or a tensor (B,). Negative to descend.
        eps: the budget, in the unit of the pictures: a largest change a value for linf, a radius a picture
            for l2.
        bounds: the range of the pictures.
        norm: the ball that eps is the radius of.

    Returns:
        The new pictures, laid out as x. No gradient flows through them.

    A NaN in the gradient leaves its element where it is for linf (sign(NaN) = 0, as torch.sign) and makes
    its whole sample NaN for l2; a NaN in x or x0 stays in its element.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: shapes or devices that differ, a negative eps, an eps wider than the bounds (linf),
            bounds that are not ordered, an unknown norm.
    """
    args = _checked(x, grad, x0, step_size, eps, bounds, norm)
    out: Tensor = torch.ops.pumice.pgd_step(x.detach(), grad.detach(), x0.detach(), *args)
    return out


def pgd_step_(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float | Tensor,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    norm: Norm = "linf",
) -> Tensor:
    """`pgd_step` in place: x is overwritten and returned. Raises ValueError for an x that overlaps itself."""
    args = _checked(x, grad, x0, step_size, eps, bounds, norm)
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("x overlaps itself (an expanded tensor); an in-place step needs memory of its own")
    torch.ops.pumice.pgd_step_(x.detach(), grad.detach(), x0.detach(), *args)
    return x


def reference(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    step_sizes: Tensor | None,
    eps: float,
    lower: float,
    upper: float,
    norm: str,
) -> Tensor:
    grad = grad.to(x.dtype)
    step = _layout.spread(step_size, step_sizes, x)
    if norm == "linf":
        delta = (x + step * grad.sign() - x0).clamp(-eps, eps)
    else:
        delta = x + step * grad / _sample_norms(grad).clamp(min=1e-12) - x0
        size = _sample_norms(delta)
        delta = delta * torch.where(size > eps, eps / size, 1.0)
    return (x0 + delta).clamp(lower, upper)


def _sample_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.view(-1, *[1] * (x.dim() - 1))


def _checked(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float | Tensor,
    eps: float,
    bounds: tuple[float, float],
    norm: str,
) -> tuple[float, Tensor | None, float, float, float, str]:
    _layout.check_float("x", x, (torch.float32, torch.float64))
    _layout.check_float("grad", grad)
    _layout.check_float("x0", x0, (x.dtype,))
    _layout.check_like("grad", grad, "x", x)
    _layout.check_like("x0", x0, "x", x)
    if x.dim() == 0:
        raise ValueError("x has no batch dimension; expected (B, ...)")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}; expected 'linf' or 'l2'")
    lower, upper = (float(bound) for bound in bounds)
    if not lower < upper:
        raise ValueError(f"bounds are ({lower}, {upper}); expected the lower one first")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected a budget of at least 0")
    if norm == "linf" and eps > upper - lower:
        raise ValueError(
            f"eps is {eps}, more than the whole range of bounds ({lower}, {upper}); "
            "budgets are in [0,1] units, e.g. 8/255"
        )
    return (*_layout.number_or_per_sample("step_size", step_size, x), float(eps), lower, upper, norm)


def _native_into(extension: str) -> Callable[..., None]:
    def into(
        out: Tensor,
        x: Tensor,
        grad: Tensor,
        x0: Tensor,
        step_size: float,
        step_sizes: Tensor | None,
        eps: float,
        lower: float,
        upper: float,
        norm: str,
    ) -> None:
        native = _native.extension(extension)
        tensors = out, x, _layout.arranged(grad, out), _layout.arranged(x0, out)
        sizes = x.shape[0], x[0].numel()
        workspace = None
        if norm == "l2":
            workspace = torch.empty(native.pgd_step_workspace(*sizes), dtype=torch.float64, device=x.device)
        native.pgd_step(
            *(t.data_ptr() for t in tensors),
            DTYPES[grad.dtype],
            *sizes,
            *(_layout.batch_stride(t) for t in tensors),
            step_size,
            _layout.pointer(step_sizes),
            eps,
            lower,
            upper,
            _layout.pointer(workspace),
            *_layout.execution(x),
        )

    return into


def _triton_into(out: Tensor, x: Tensor, grad: Tensor, x0: Tensor, *rest: Any) -> None:
    from pumice.triton_kernels.pgd_step import pgd_step as launch

    launch(out, x, _layout.arranged(grad, out), _layout.arranged(x0, out), *rest)


def _torch_into(out: Tensor, *args: Any) -> None:
    out.copy_(reference(*args))


def _new(into: Callable[..., None]) -> Callable[..., Tensor]:
    def step(x: Tensor, *rest: Any) -> Tensor:
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        into_here = (
            out if _layout.dense_samples(out) else torch.empty_like(x, memory_format=torch.contiguous_format)
        )
        into(into_here, _layout.arranged(x, into_here), *rest)
        return out if into_here is out else out.copy_(into_here)

    return step


def _in_place(into: Callable[..., None]) -> Callable[..., None]:
    def step(x: Tensor, *rest: Any) -> None:
        if x.numel() and _layout.dense_samples(x):
            into(x, x, *rest)
            torch.autograd.graph.increment_version(x)  # autograd cannot see a write through a pointer
        elif x.numel():
            x.copy_(_new(into)(x, *rest))

    return step


_INTO = {
    "torch": _torch_into,
    "cpu": _native_into("_cpu"),
    "cuda": _native_into("_cuda"),
    "triton": _triton_into,
}
_ARGS = (
    "Tensor grad, Tensor x0, float step_size, Tensor? step_sizes,"
    " float eps, float lower, float upper, str norm"
)

register(
    "pgd_step",
    f"(Tensor x, {_ARGS}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
    backends={name: _new(into) for name, into in _INTO.items()},
)
register(
    "pgd_step_",
    f"(Tensor(a!) x, {_ARGS}) -> ()",
    fake=lambda x, *_: None,
    backends={name: _in_place(into) for name, into in _INTO.items()},
)
