"""How much memory some work takes, told without doing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the tensors made inside `work` take at one time.

    `work` runs on fake tensors, which have shapes and devices but no memory; modules and tensors that it
    reaches are used as they are. It must not read a value back. What lives before it, weights for example,
    does not count, nor does the scratch memory of kernels.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as counter:
        work()
    return counter.peak


class _Live(TorchDispatchMode):
    """Bytes of all storages that were made under it and are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info for result in func._schema.returns):
            return out  # a view, or what was written to: nothing new, and perhaps from outside
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)
