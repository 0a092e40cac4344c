import pytest
import torch

from ops.test_low_rank_edit import *  # noqa: F403
from ops.test_low_rank_edit import ROWS, STORAGE, inputs
from pumice import ops


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("rows", [ROWS, (40,) * 301], ids=["one launch", "several"])
def test_graph_capture(kernel, device, rows, dtype):
    weights, up, down = inputs(device, 64, 3, dtype, rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            ops.low_rank_edit_(weights, up, down)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.low_rank_edit_(weights, up, down)
    for _ in range(2):
        for tensor in (*weights, up, down):
            tensor.copy_(torch.rand_like(tensor))
        expected = [weight.clone() for weight in weights]
        ops.low_rank_edit_(expected, up, down)
        graph.replay()
        for weight, e in zip(weights, expected, strict=True):
            assert torch.equal(weight, e)


def test_runs_on_the_current_stream(kernel, device):
    weights, up, down = inputs(device, 64, 3)
    expected = [weight * 0.5 for weight in weights]
    ops.low_rank_edit_(expected, up, down)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream the kernel would run before the halves are there
        late = [weight * 0.5 for weight in weights]
        ops.low_rank_edit_(late, up, down)
    stream.synchronize()
    for weight, e in zip(late, expected, strict=True):
        assert torch.equal(weight, e)


def test_same_bits_every_time(kernel, device):
    weights, up, down = inputs(device, 768, 6)
    first = [weight.clone() for weight in weights]
    ops.low_rank_edit_(first, up, down)
    for _ in range(5):
        again = [weight.clone() for weight in weights]
        ops.low_rank_edit_(again, up, down)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_does_not_wait_for_the_gpu(kernel, device):
    weights, up, down = inputs(device, 64, 3)
    ops.low_rank_edit_(weights, up, down)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.low_rank_edit_(weights, up, down)
    finally:
        torch.cuda.set_sync_debug_mode("default")
