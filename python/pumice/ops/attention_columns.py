"""How much attention goes to some of the keys, with a gradient, and no map of all attention is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _layout
from pumice.ops._registry import register

KERNEL_KEYS, KERNEL_DIMS = 128, 256  # of one tile; above, a kernel would spill, and plain torch runs


def attention_columns(q: Tensor, k: Tensor, columns: Tensor, scale: float | None = None) -> Tensor:
    """Sum of the squared attention to selected keys, for each query.

    ::

        p = softmax_j(scale q_i . k_j)        out[b, h, i] = sum over j in columns[b] of p[b, h, i, j]^2

    What the losses of Forget-Me-Not (arXiv:2303.17591) and MACE (arXiv:2403.06135) are made of: the Frobenius
    norm of columns of attention maps is the root of a sum of `out`. The gradient, with `dout`::

        dS_j = p_j (g_j - sum_m g_m p_m)      g_j = 2 p_j dout if j in columns, else 0
        dq_i = scale sum_j dS_ij k_j          dk_j = scale sum_i dS_ij q_i

    reads p again from q, k and the logarithm of each softmax's denominator, (B, H, N): that, and no
    (B, H, N, M), is kept for it. The output of attention itself comes from wherever it always does.

    Args:
        q: (B, H, N, D), float32, float16 or bfloat16 (or float64: plain torch).
        k: (B, H, M, D), typed as q. With more than 128 keys, or D above 256, it is plain torch.
        columns: (B, M) bool, the keys that count, of each sample.
        scale: default 1 / sqrt(D).

    Returns:
        (B, H, N), float32 (float64 for float64). Differentiable once in q and k. Sums are in float32.

    Raises:
        TypeError: an argument of another dtype or kind.
        ValueError: shapes or devices that do not fit, no keys, a scale that is not finite.
    """
    for name, tensor in (("q", q), ("k", k)):
        _layout.check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected four dimensions")
    if not isinstance(columns, Tensor) or columns.dtype != torch.bool:
        kind = columns.dtype if isinstance(columns, Tensor) else type(columns).__name__
        raise TypeError(f"columns: got {kind}, expected a bool tensor")
    if k.dtype != q.dtype:
        raise TypeError(f"k: got {k.dtype}, expected {q.dtype}, as q")
    batch, heads, _, dim = q.shape
    if k.shape != (batch, heads, k.shape[2], dim) or k.shape[2] == 0 or dim == 0:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, expected ({batch}, {heads}, M, {dim}) with at least one key"
        )
    if columns.shape != (batch, k.shape[2]):
        raise ValueError(f"columns: got shape {tuple(columns.shape)}, expected {(batch, k.shape[2])}")
    if not q.device == k.device == columns.device:
        raise ValueError(f"k, columns: got {k.device} and {columns.device}, expected {q.device}, as q")
    scale, _ = _layout.number_or_per_sample("scale", dim**-0.5 if scale is None else scale, q)
    counts = columns.to(_exact(q))
    out: Tensor = torch.ops.pumice.attention_columns(q, k, counts, scale)[0]
    return out


def reference(q: Tensor, k: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp of the scores), (B, H, N) each; columns are 1 where they count, else 0."""
    scores = _scores(q, k, scale)
    denominator = scores.logsumexp(-1)
    p = scores.sub_(denominator[..., None]).exp_()
    return (p.square_() @ columns[:, None, :, None]).squeeze(-1), denominator


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, columns: Tensor, denominator: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(dq, dk)."""
    p = _scores(q, k, scale).sub_(denominator[..., None]).exp_()
    gp = p.square() * columns[:, None, None] * (2 * dout[..., None])
    ds = scale * (gp - p * gp.sum(-1, keepdim=True))
    return (ds @ k.to(ds)).to(q.dtype), (ds.mT @ q.to(ds)).to(k.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q.to(_exact(q)) @ k.to(_exact(k)).mT).mul_(scale)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _triton(q: Tensor, k: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not _fits(q, k):
        return reference(q, k, columns, scale)
    from pumice.triton_kernels.attention_columns import attention_columns as launch

    out = q.new_empty(q.shape[:3], dtype=torch.float32)
    denominator = torch.empty_like(out)
    if out.numel():
        launch(out, denominator, _rows(q), _rows(k), columns.contiguous(), scale)
    return out, denominator


def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, columns: Tensor, denominator: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if not _fits(q, k) or not dout.numel():
        return reference_backward(dout, q, k, columns, denominator, scale)
    from pumice.triton_kernels.attention_columns import attention_columns_backward as launch

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return dq, launch(dq, dout.contiguous(), _rows(q), _rows(k), columns.contiguous(), denominator, scale)


def _fits(q: Tensor, k: Tensor) -> bool:
    return k.shape[2] <= KERNEL_KEYS and k.shape[3] <= KERNEL_DIMS


def _rows(x: Tensor) -> Tensor:
    """With each vector in one stretch; heads may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake(q: Tensor, k: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[:3], dtype=_exact(q))
    return out, torch.empty_like(out)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, columns, scale = inputs
    ctx.save_for_backward(q, k, columns, output[1])
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    dq, dk = torch.ops.pumice.attention_columns_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, None, None


register(
    "attention_columns",
    "(Tensor q, Tensor k, Tensor columns, float scale) -> (Tensor, Tensor)",
    fake=_fake,
    backends={"torch": reference, "triton": _triton},
)
register(
    "attention_columns_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor columns, Tensor denominator, float scale) -> (Tensor, Tensor)",
    fake=_fake_backward,
    backends={"torch": reference_backward, "triton": _triton_backward},
)
torch.library.register_autograd("pumice::attention_columns", _autograd, setup_context=_setup_context)
