"""When work is captured as a CUDA graph and when it is not; tests/gpu captures for real."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from pumice.models.graph import Graphed, _arguments


def work(x: Tensor, pair: tuple[Tensor, tuple[Tensor, ...]]) -> Tensor:
    scale, shifts = pair
    return x * scale + sum(shifts)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that say they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with FakeTensorMode():
        yield


def on_gpu(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


class Capture:
    """Stands in for `Graphed._capture`: writes down what is captured, copied and replayed; or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.seen, self.log = error, [], []

    def __call__(self, tensors, form):
        self.seen.append([tuple(t.shape) for t in tensors])
        if self.error:
            raise self.error
        graph, output = Mock(), Mock()
        graph.replay.side_effect = lambda: self.log.append("replay")
        output.clone.side_effect = lambda: (self.log.append("clone"), torch.empty(tensors[0].shape))[1]
        inputs = [Mock() for _ in tensors]
        for mine in inputs:
            mine.copy_.side_effect = lambda *_, **__: self.log.append("copy")
        return graph, inputs, output


def test_on_the_cpu_it_is_the_work(monkeypatch):
    graphed = Graphed(work)
    monkeypatch.setattr(graphed, "_capture", Capture(AssertionError()))
    x, scale, shift = torch.arange(3.0), torch.tensor(2.0), torch.ones(3)
    assert torch.equal(graphed(x, (scale, (shift, shift))), 2 * x + 2)
    assert torch.equal(graphed(x, (scale, ())), 2 * x)


def test_each_shape_layout_and_dtype_is_captured_once(gpu, monkeypatch):
    graphed = Graphed(lambda x, *rest: x)
    capture = Capture()
    monkeypatch.setattr(graphed, "_capture", capture)
    one, two = on_gpu(2, 3), on_gpu(4, 3)
    for args in [
        (one,),
        (one,),
        (two,),
        (one, (one,)),
        (two.t(),),
        (on_gpu(2, 3, dtype=torch.half),),
        (one,),
    ]:
        assert graphed(*args).shape == args[0].shape
    assert capture.seen == [[(2, 3)], [(4, 3)], [(2, 3), (2, 3)], [(3, 4)], [(2, 3)]]


def test_none_among_the_arguments_is_no_tensor(gpu, monkeypatch):
    """Stable Diffusion 1 and 2 have no pooled text."""
    graphed, put_together = Graphed(lambda x, *rest: x), []
    capture = Capture()

    def captured(tensors, form):
        put_together.append(_arguments(tensors, form))
        return capture(tensors, form)

    monkeypatch.setattr(graphed, "_capture", captured)
    x, y = on_gpu(2), on_gpu(3)
    calls = [(x, None, y), (x, None, y), (x, y, None), (x, (None, y)), (x, y)]
    for args in calls:
        assert graphed(*args).shape == x.shape
    assert capture.seen == [[(2,), (3,)]] * 4
    for args, found in zip(calls[1:], put_together, strict=True):
        same = tree_map(lambda one, two: one is two, args, tuple(found), is_leaf=lambda leaf: leaf is None)
        assert all(tree_flatten(same)[0])


def test_a_replay_reads_its_arguments_and_gives_memory_of_its_own(gpu, monkeypatch):
    graphed = Graphed(lambda x, y: x)
    capture = Capture()
    monkeypatch.setattr(graphed, "_capture", capture)
    first, second = graphed(on_gpu(2), on_gpu(3)), graphed(on_gpu(2), on_gpu(3))
    assert capture.log == ["copy", "copy", "replay", "clone"] * 2
    assert first is not second


def test_a_capture_that_fails_is_told_once_and_goes_on_without(gpu, monkeypatch):
    calls = []
    graphed = Graphed(lambda x: (calls.append(1), x)[1])
    capture = Capture(RuntimeError("operation not permitted when stream is capturing\nmore"))
    monkeypatch.setattr(graphed, "_capture", capture)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing$"):
        graphed(on_gpu(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed(on_gpu(2))
        graphed(on_gpu(3))
    assert len(calls) == 3 and len(capture.seen) == 1


def test_out_of_memory_is_passed_on_and_tried_again(gpu, monkeypatch):
    """`RowBudget` halves the rows then, and the smaller shape is captured."""
    graphed = Graphed(lambda x: x)
    monkeypatch.setattr(graphed, "_capture", Capture(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        graphed(on_gpu(4))
    capture = Capture()
    monkeypatch.setattr(graphed, "_capture", capture)
    graphed(on_gpu(2))
    assert capture.seen == [[(2,)]]
