"""What the benchmarks of the ops share: the providers of a case, closeness before timing, bytes over time.

pytest benchmarks/ops -o python_files='bench_*.py'       # pytest-benchmark's tables and comparisons
python benchmarks/ops/bench_pgd_step.py [--device cuda] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import machine
from pumice import ops
from pumice.ops import _registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One op on one shape: `eager` is what one would write in torch, `ours` the op, of the same result."""

    op: str
    label: str
    nbytes: int  # read and written by a single pass
    eager: Callable[[], Tensor | tuple[Tensor, ...]]
    ours: Callable[[], Tensor | tuple[Tensor, ...]]
    tolerance: float = 1e-4

    def providers(self, device: str) -> dict[str, Callable[[], Any]]:
        found = {"torch": self.eager, "torch.compile": torch.compile(self.eager, dynamic=False)}
        for name in ("cpu", "cuda", "triton"):
            if name in _registry.OPS[self.op].backends and not _registry.why_not(name, device):
                found[f"pumice {name}"] = functools.partial(_on, name, self.ours)
        return found


def _on(backend: str, function: Callable[[], Any]) -> Any:
    with ops.backend(backend):
        return function()


def assert_close(case: Case, result: Tensor | tuple[Tensor, ...]) -> None:
    for actual, expected in zip(_tuple(result), _tuple(case.eager()), strict=True):
        scale = max(expected.abs().max().item(), 1.0)
        error = (actual.float() - expected.float()).abs().max().item()
        assert error <= case.tolerance * scale, f"{case.op} {case.label}: off by {error:.3g}"


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def milliseconds(function: Callable[[], object], device: str, budget: float = 0.5) -> list[float]:
    """Times of single calls, within about `budget` seconds."""
    for _ in range(3):
        function()
    if device == "cpu":
        times: list[float] = []
        end = time.perf_counter() + budget
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(50)]
    torch.cuda.synchronize()
    for start_event, end_event in events:
        start_event.record()
        function()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of torch's own copy far outside the caches."""
    size = 1 << 28 if device == "cuda" else 1 << 26
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device))
    return 2 * source.nbytes / best * 1e3


def rows(cases: Callable[[str], Iterator[Case]], device: str) -> Iterator[dict[str, Any]]:
    """A row for each case and provider; one that fails is reported in its row."""
    copy = copy_bandwidth(device)
    for case in cases(device):
        torch.compiler.reset()  # there may be more cases than torch.compile takes of one function
        eager = 0.0
        for name, function in case.providers(device).items():
            row: dict[str, Any] = {"op": case.op, "case": case.label, "provider": name, "bytes": case.nbytes}
            try:
                assert_close(case, function())
                times = sorted(milliseconds(function, device))
            except Exception as error:  # the rest of the table is still worth having
                yield row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                continue
            median = statistics.median(times)
            eager = eager or median
            rate = case.nbytes / median * 1e3
            yield row | {
                "ms": median,
                "ms_p20": times[len(times) // 5],
                "ms_p80": times[len(times) * 4 // 5],
                "gb_per_s": rate / 1e9,
                "share_of_copy": rate / copy,
                "times_torch": eager / median,
            }


def table(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print the rows as they come, and hand them on."""
    print(f"{'op':<26} {'case':<38} {'provider':<14} {'ms':>9} {'GB/s':>8} {'of copy':>8} {'x torch':>8}")
    for row in rows:
        start = f"{row['op']:<26} {row['case']:<38} {row['provider']:<14} "
        if "error" in row:
            print(start + row["error"], flush=True)
        else:
            rates = f"{row['gb_per_s']:8.1f} {100 * row['share_of_copy']:7.0f}% {row['times_torch']:8.2f}"
            print(f"{start}{row['ms']:9.3f} {rates}", flush=True)
        yield row


def main(cases: Callable[[str], Iterator[Case]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default=DEVICE, choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine.line(options.device))
    print(f"copy: {copy_bandwidth(options.device) / 1e9:.1f} GB/s")
    described = machine.describe(options.device)
    kept = []
    for row in table(rows(cases, options.device)):
        kept.append(row)
        if options.json:  # after each row: a run that is stopped leaves what it had
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({"machine": described, "rows": kept}, indent=1))


def benchmark_of(cases: Callable[[str], Iterator[Case]]) -> Callable[..., None]:
    """The pytest-benchmark test of a file's cases: one group for each case, one row for each provider."""
    import pytest

    torch.set_num_threads(1)
    labels = [case.label for case in cases("meta")]

    @pytest.mark.parametrize(
        "provider", ["torch", "torch.compile", "pumice cpu", "pumice cuda", "pumice triton"]
    )
    @pytest.mark.parametrize("label", labels)
    def test(benchmark: Any, label: str, provider: str) -> None:
        case = next(case for case in cases(DEVICE) if case.label == label)
        function = case.providers(DEVICE).get(provider)
        if function is None:
            pytest.skip(f"{provider} does not run here")
        assert_close(case, function())

        def call() -> None:
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{case.op} {label}"
        benchmark(call)
        rate = case.nbytes / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "bytes": case.nbytes,
            "gb_per_s": rate / 1e9,
            "of_copy": rate / copy_bandwidth(DEVICE),
        }
        print(f"\n{case.op} {label} {provider}: {case.nbytes / 1e6:.1f} MB, {rate / 1e9:.1f} GB/s")

    return test
