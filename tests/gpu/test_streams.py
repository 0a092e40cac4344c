"""What only a GPU can show: graphs, streams, devices, addresses past 2^31."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ops.test_group_norm_silu import inputs as norm_inputs
from ops.test_guidance_step import COEFFICIENTS
from ops.test_guidance_step import inputs as guidance_inputs
from ops.test_pgd_step import inputs as pgd_inputs
from pumice import _native, ops
from pumice.ops.differentiable_jpeg import quantization_tables


def calls(device: str) -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """Each op as (inputs, function of them)."""
    shape = (3, 4, 33, 32)
    row = torch.tensor(COEFFICIENTS, device=device)
    x, weight, bias = norm_inputs(shape, device, torch.float16)

    def norm(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = ops.group_norm_silu(x, 2, weight, bias)
        return torch.autograd.grad(y, x, y.detach())[0] + y.detach()

    pictures = torch.rand(3, 3, 33, 32, device=device)
    tables = quantization_tables(torch.full((3,), 75)).to(device)

    def jpeg(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = ops.differentiable_jpeg(x, tables)
        return torch.autograd.grad(y, x, y.detach())[0] + y.detach()

    columns = torch.arange(77, device=device).expand(2, 77) % 5 == 0

    def looked_at(q: Tensor, k: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        squares = ops.attention_columns(q, k, columns)
        return torch.autograd.grad(squares.sum(), q)[0].flatten() + squares.detach().sum()

    def guide(*tensors: Tensor) -> Tensor:
        result = ops.guidance_step(*tensors[:3], 7.5, row, tensors[3], magnitude=True)
        return torch.cat([result.sample.flatten(), *result.magnitude])

    return {
        "pgd_step linf": (pgd_inputs(shape, device), lambda *t: ops.pgd_step(*t, step_size=0.01, eps=0.03)),
        "pgd_step l2": (
            pgd_inputs(shape, device),
            lambda *t: ops.pgd_step(*t, step_size=0.5, eps=1.0, norm="l2"),
        ),
        "guidance_magnitude": (
            guidance_inputs(shape, device)[:2],
            lambda *t: torch.stack(ops.guidance_magnitude(*t)),
        ),
        "guidance_step": (guidance_inputs(shape, device), guide),
        "group_norm_silu": ([x], norm),
        "attention_columns": ([torch.rand(2, 3, n, 40, device=device) for n in (64, 77)], looked_at),
        "median_filter": ([pictures], lambda t: ops.median_filter(t, 5)),
        "bilateral_filter": ([pictures], lambda t: ops.bilateral_filter(t, 5, 0.1, 2.0)),
        "total_variation": ([pictures], lambda t: ops.total_variation(t, 0.1, iterations=5)),
        "differentiable_jpeg": ([pictures], jpeg),
        "group_norm_silu channels_last": ([x.to(memory_format=torch.channels_last)], norm),
    }


NAMES = list(calls("cpu"))


def test_probe_finds_the_device() -> None:
    assert _native.extension("_cuda").probe() == 0


@pytest.mark.parametrize("name", NAMES)
def test_graph_capture(kernel: str, device: str, name: str) -> None:
    tensors, function = calls(device)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*tensors)
    for _ in range(2):
        for tensor in tensors:
            tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        assert torch.equal(captured, function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(kernel: str, device: str, name: str) -> None:
    tensors, function = calls(device)[name]
    expected = function(*(t * 0.5 for t in tensors))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream the kernel would run before the halves are there
        late = [t * 0.5 for t in tensors]
        result = function(*late)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(kernel: str, device: str, name: str) -> None:
    tensors, function = calls(device)[name]
    first = function(*tensors)
    for _ in range(5):
        assert torch.equal(function(*tensors), first)


@pytest.mark.parametrize("name", NAMES)
def test_does_not_wait_for_the_gpu(kernel: str, device: str, name: str) -> None:
    tensors, function = calls(device)[name]
    function(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_tensors_device(kernel: str, device: str, name: str) -> None:
    tensors, function = calls(device)[name]
    other_tensors, other_function = calls("cuda:1")[name]
    assert torch.equal(other_function(*other_tensors).cpu(), function(*tensors).cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.large
def test_more_than_two_to_the_31_elements(kernel: str, device: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 48 << 30:
        pytest.skip("needs 48 GiB")
    size = 2**31 + 4096
    x = torch.zeros(1, size, device=device)
    grad = torch.zeros(1, size, device=device, dtype=torch.float16)
    grad[0, -5:] = 1
    ops.pgd_step_(x, grad, x.clone(), step_size=0.1, eps=0.2)
    assert x[0, -6:].tolist() == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0.1])
    del grad
    x = x.view(1, 4, -1)
    assert ops.guidance_magnitude(
        x, torch.zeros_like(x[..., :1]).expand_as(x)
    ).difference.item() == pytest.approx(0.05**0.5, rel=1e-4)
