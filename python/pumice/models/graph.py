"""Work on a GPU as one CUDA graph: launched once, whatever number of kernels it has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_Captured = tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]
_Form = tuple[TreeSpec, tuple[bool, ...]]
"""How arguments are put together, and which of their leaves are tensors; the others are None."""

_WARM_UP = 2  # calls before the capture: lazy initialisations and cuDNN's choices are no part of a graph


class Graphed:
    """Tensor work of fixed shapes, captured at its first call on a GPU and replayed from then on.

    `work(*args)`, tensors, None or tuples of them, must read no value back and draw no random numbers. What
    it reaches beside its arguments (weights, embeddings) is read where it lies: change it in place or not
    at all. On the CPU, and where a capture fails, which is warned about, it is called as it is.
    """

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self._work = work
        self._graphs: dict[Any, _Captured] = {}
        self._pool: Any = None  # one for all: a graph's output is copied before the next one runs
        self._eager = False

    def __call__(self, *args: Any) -> Tensor:
        leaves, spec = tree_flatten(args)
        form = spec, tuple(leaf is not None for leaf in leaves)
        tensors = [leaf for leaf in leaves if leaf is not None]
        if self._eager or tensors[0].device.type != "cuda":
            return self._work(*args)
        key = form, tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if key not in self._graphs:
            try:
                with torch.cuda.device(tensors[0].device):
                    self._graphs[key] = self._capture(tensors, form)
            except torch.OutOfMemoryError:
                self._graphs.clear()  # their memory may be what is missing
                raise
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"cannot be captured as a CUDA graph, goes on without: {reason}", stacklevel=2)
                self._eager = True
                return self._work(*args)
        graph, inputs, output = self._graphs[key]
        with torch.cuda.device(tensors[0].device):
            for mine, given in zip(inputs, tensors, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()
            return output.clone()

    def _capture(self, tensors: list[Tensor], form: _Form) -> _Captured:
        inputs = [t.clone() for t in tensors]
        args = _arguments(inputs, form)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._work(*args)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._work(*args)
        self._pool = graph.pool()
        return graph, inputs, output


def _arguments(tensors: Sequence[Tensor], form: _Form) -> Any:
    spec, given = form
    left = iter(tensors)
    return tree_unflatten([next(left) if each else None for each in given], spec)
