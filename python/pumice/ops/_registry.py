"""How an op is registered with torch and how its backend is chosen.

An op is one `torch.library` operator, so autograd, `torch.compile` and CUDA graphs see an ordinary one. Its
kernel picks among the op's backends when it runs, by the device of its tensors and the choice in force.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumice import _native

BACKENDS = ("torch", "cpu", "cuda", "triton")
# Fastest first, as measured in benchmarks/ops.
_AUTO = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the order of Dtype in csrc/math/common.h


class BackendError(ValueError):
    """A backend was asked for that cannot run; the message says why."""


@dataclass(frozen=True)
class Op:
    """A registered op: its backends by name; `torch` is the reference."""

    name: str
    backends: dict[str, Callable[..., Any]]


OPS: dict[str, Op] = {}

# For the whole process, not for a thread: autograd runs backward ops on threads of its own.
_chosen: str | None = None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops on one backend: `"torch"`, `"cpu"`, `"cuda"`, `"triton"`, or `"auto"` for the fastest.

    The choice holds for the whole process, and goes before `PUMICE_BACKEND`. A backend that cannot run is
    refused with a `BackendError` (a `ValueError`): here where nothing could make it run, at the call where
    it depends on the tensors.
    """
    global _chosen
    _check_name(name, "backend")
    if name != "auto" and all(why_not(name, device) for device in ("cpu", "cuda")):
        raise BackendError(
            f"backend {name!r} cannot run: {why_not(name, 'cuda' if name != 'cpu' else 'cpu')}"
        )
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def why_not(name: str, device: str) -> str:
    """Why a backend cannot run on tensors of this device; empty where it can."""
    if name == "torch":
        return ""
    if name == "cpu":
        return _native.load("_cpu")[1] or ("" if device == "cpu" else f"it takes cpu tensors, not {device}")
    if name == "cuda":
        missing = _native.load("_cuda")[1] or no_gpu_reason()
        return missing or ("" if device == "cuda" else f"it takes cuda tensors, not {device}")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and _interpreting():
        return ""
    return no_gpu_reason() or ("" if device == "cuda" else f"it takes cuda tensors, not {device}")


@functools.cache
def no_gpu_reason() -> str:
    if torch.cuda.is_available():
        return ""
    return "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backends: dict[str, Callable[..., Any]],
) -> None:
    """Define `pumice::name`. Every backend takes the schema's arguments in order; one of them is `torch`."""
    op = OPS[name] = Op(name, backends)
    torch.library.define(f"pumice::{name}", schema)

    def kernel(*args: Any) -> Any:
        return _choose(op, args)(*args)

    torch.library.impl(f"pumice::{name}", ("cpu", "cuda"))(kernel)
    torch.library.register_fake(f"pumice::{name}")(fake)


def _choose(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    groups = (arg if isinstance(arg, list) else [arg] for arg in args)
    tensors = [arg for group in groups for arg in group if isinstance(arg, Tensor)]
    device = tensors[0].device.type
    odd = next((t.dtype for t in tensors if t.dtype not in DTYPES), None)
    wanted = _chosen or os.environ.get("PUMICE_BACKEND") or "auto"
    _check_name(wanted, "PUMICE_BACKEND")
    if wanted == "auto":
        usable = (
            b for b in _AUTO[device] if b in op.backends and (b == "torch" or not (odd or why_not(b, device)))
        )
        return op.backends[next(usable)]
    why = why_not(wanted, device)
    if not why and wanted not in op.backends:
        why = "it has no such kernel"
    if not why and odd and wanted != "torch":
        why = f"it does not take {odd}"
    if why:
        raise BackendError(f"backend {wanted!r} cannot run {op.name} on {device} tensors: {why}")
    return op.backends[wanted]


def _check_name(name: str, argument: str) -> None:
    if name not in (*BACKENDS, "auto"):
        raise BackendError(f"{argument}: no backend {name!r}; there are {', '.join(BACKENDS)} and auto")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
