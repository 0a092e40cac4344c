"""Everything that only a GPU can show, in one command and under ten minutes: `python benchmarks/gpu.py`.

Builds pumice._cuda for this GPU, runs tests/gpu, compute-sanitizer, the op benchmarks and the end-to-end
benchmarks, prints their tables, and writes one JSON to benchmarks/results/<gpu>/. Needs torch, triton, nvcc
and pytest; build tools that are missing are taken from wheels in ./.whl. A part that fails is reported and
the others go on; each has a share of the time, and is stopped when it is used up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
SITE = WORK / "site"  # the package as installed would be, first on the path of every part
DEPENDENCIES = WORK / "dependencies"

SANITIZED = """
import torch
from pumice import ops
torch.manual_seed(0)
x, cond, uncond, noise = torch.randn(4, 2, 8, 33, 37, device="cuda")
row = torch.tensor([0.8, 0.6, 0.9, 0.3, 0.05, 0.4], device="cuda")
weight, bias = torch.randn(2, 8, device="cuda")
matrices = torch.randn(2, 33, 65, device="cuda")
up, down = torch.randn(64, 5, device="cuda"), torch.randn(5, 64, device="cuda")
with ops.backend("cuda"):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        edited = matrices.to(dtype)
        for columns in (edited[..., 1:], edited[..., :64].contiguous()):
            ops.low_rank_edit_(list(columns), up, down)
        for layout in (torch.contiguous_format, torch.channels_last):
            a, b, c, d = (t.to(dtype).contiguous(memory_format=layout) for t in (x, cond, uncond, noise))
            for norm in ("linf", "l2"):
                ops.pgd_step(x, a, x, step_size=0.1, eps=0.2, norm=norm)
            ops.bilateral_filter(a[:, :3], 5, 0.5, 2.0)
            for size in (3, 5, 7):
                ops.median_filter(a, size)
            for isotropic in (True, False):
                ops.total_variation(a, 0.1, iterations=3, isotropic=isotropic)
            picture = a[:, :3].detach().requires_grad_()
            ops.differentiable_jpeg(picture, 50).backward(picture.detach())
            ops.guidance_magnitude(b, c[:1])
            for magnitude in (False, True):
                ops.guidance_step(a, b, c, 7.5, row, d, magnitude=magnitude)
            leaf = a.requires_grad_()
            y = ops.group_norm_silu(leaf, 2, weight.to(dtype).requires_grad_(), bias)
            y.backward(y.detach())
torch.cuda.synchronize()
"""


class Part:
    """One part of the run: its commands share a log, an outcome and a time limit."""

    def __init__(self, name: str, limit: float):
        self.name, self.limit = name, limit
        self.start = time.monotonic()
        self.outcome: dict[str, Any] = {"ok": True}
        print(f"\n=== {name}", flush=True)

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> str:
        """The output of a command, shown as it comes; a failure is written down."""
        left = self.limit - (time.monotonic() - self.start)
        environment = (
            os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SITE, DEPENDENCIES)))} | (env or {})
        )
        lines: list[str] = []
        try:
            process = subprocess.Popen(
                ["timeout", "-k", "5", str(max(1, int(left))), *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            status = process.wait()
        except OSError as error:
            return self.fail(str(error))
        if status:
            self.fail(
                "ran out of its time"
                if status in (124, 137)
                else f"{Path(command[0]).name} ended with {status}"
            )
            self.outcome["tail"] = "".join(lines[-15:])
        return "".join(lines)

    def fail(self, why: str) -> str:
        self.outcome |= {"ok": False, "why": why}
        print(f"!!! {self.name}: {why}", flush=True)
        return ""

    def end(self) -> dict[str, Any]:
        return self.outcome | {"seconds": round(time.monotonic() - self.start, 1)}


def build(limit: float) -> dict[str, Any]:
    """The package in SITE, with _cpu and _cuda built for this GPU alone."""
    import torch

    part = Part("build", limit)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "python" / "pumice", SITE / "pumice", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(ROOT / "triton_kernels", SITE / "pumice" / "triton_kernels")
    # An editable install's import hook would go before the path.
    hook = "ScikitBuildRedirectingFinder"
    drop = f"import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != {hook!r}]\n"
    (SITE / "sitecustomize.py").write_text(drop)
    wheels = ROOT / ".whl"
    if wheels.is_dir():
        DEPENDENCIES.mkdir(parents=True, exist_ok=True)
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade")
        part.run(*pip, "--target", DEPENDENCIES, *sorted(wheels.glob("*.whl")))
    directory = part.run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    major, minor = torch.cuda.get_device_capability()
    configure = ["cmake", "-S", ROOT, "-B", WORK / "cmake", f"-Dpybind11_DIR={directory}", "-DPUMICE_CUDA=ON"]
    configure += [f"-DPUMICE_CUDA_ARCHITECTURES={major}{minor}-real", f"-DPython_EXECUTABLE={sys.executable}"]
    part.run(*configure)
    part.run("cmake", "--build", WORK / "cmake", "--parallel", str(os.cpu_count() or 1))
    part.run("cmake", "--install", WORK / "cmake", "--prefix", SITE / "pumice")
    part.run(sys.executable, "-c", "import pumice; print(pumice.env()); import pumice._cpu, pumice._cuda")
    return part.end()


def tests(limit: float) -> dict[str, Any]:
    part = Part("tests/gpu", limit)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]
    output = part.run(*command)
    summary = [line for line in output.splitlines() if " passed" in line or " failed" in line]
    return part.end() | {"summary": summary[-1] if summary else ""}


def sanitize(tool: str, limit: float) -> dict[str, Any]:
    part = Part(tool, limit)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    script = WORK / "sanitized.py"
    script.write_text(SANITIZED)
    # torch's caching allocator would hide a read past the end of a tensor inside its own block.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    output = part.run(
        sanitizer, "--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=pumice", sys.executable,
        script, env=environment,
    )  # fmt: skip
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    return part.end() | {"summary": summary[-1].strip("= ") if summary else ""}


def benchmark(script: Path, limit: float) -> dict[str, Any]:
    part = Part(script.stem, limit)
    result = WORK / f"{script.stem}.json"
    result.unlink(missing_ok=True)
    part.run(sys.executable, script, "--json", result)
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError):
        part.fail("it left no JSON")
        return part.end()
    failed = sum("error" in row for row in found.get("rows", []))
    if failed:
        part.fail(f"{failed} rows failed")
    return part.end() | {"result": found}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="the time for everything")
    parser.add_argument(
        "--out", type=Path, help="where to write the JSON (default: benchmarks/results/<gpu>)"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch

    import machine

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to run", file=sys.stderr)
        return 2
    print(machine.line("cuda"))
    end = time.monotonic() + 60 * options.minutes
    folder = options.out or machine.folder("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = folder / f"{now:%Y-%m-%d-%H%M}.json"
    report: dict[str, Any] = {"machine": machine.describe("cuda"), "date": now.isoformat(), "parts": {}}

    op_scripts = sorted((ROOT / "benchmarks" / "ops").glob("bench_*.py"))
    end_to_end = sorted((ROOT / "benchmarks").glob("e2e_*.py"))
    parts = [("build", 150.0, build), ("tests", 150.0, tests)]
    parts += [
        (tool, 60.0, lambda limit, tool=tool: sanitize(tool, limit)) for tool in ("memcheck", "racecheck")
    ]
    parts += [(s.stem, 75.0, lambda limit, s=s: benchmark(s, limit)) for s in op_scripts]
    parts += [(s.stem, 150.0, lambda limit, s=s: benchmark(s, limit)) for s in end_to_end]
    for name, share, function in parts:
        left = end - time.monotonic()
        if left < 5:
            report["parts"][name] = {"ok": False, "why": "no time was left"}
            continue
        try:
            report["parts"][name] = function(min(share, left))
        except Exception as error:  # one part must not take the others with it
            print(f"!!! {name}: {error}", flush=True)
            report["parts"][name] = {"ok": False, "why": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(report, indent=1))  # after each part: a machine may be taken away

    print(f"\n{machine.line('cuda')}")
    for name, outcome in report["parts"].items():
        note = outcome.get("summary") or outcome.get("why", "")
        print(
            f"{name:<26} {'ok' if outcome['ok'] else 'FAILED':<7} {outcome.get('seconds', 0):6.1f} s  {note}"
        )
    print(f"written to {path}")
    return 0 if all(outcome["ok"] for outcome in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
