from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pumice
from pumice import _native, ops  # noqa: F401  (registers the ops)
from pumice.ops._registry import OPS

ROOT = Path(__file__).parents[2]
needs_cuda_extension = pytest.mark.skipif(_native.load("_cuda")[0] is None, reason="built without CUDA")


def base(name: str) -> str:
    """An op's own name: of its in-place and backward companions too."""
    return name.removesuffix("_backward").rstrip("_")


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_is_complete(name: str) -> None:
    backends = set(OPS[name].backends)
    assert {"torch"} < backends <= {"torch", "cpu", "cuda", "triton"}, "an op has those that pay"
    module = ROOT / "python" / "pumice" / "ops" / f"{base(name)}.py"
    assert "def reference(" in module.read_text()
    kernels = {"cuda": f"csrc/math/{base(name)}.h", "triton": f"triton_kernels/{base(name)}.py"}
    for path in (
        *(file for backend, file in kernels.items() if backend in backends),
        f"tests/ops/test_{base(name)}.py",
        f"tests/gpu/test_{base(name)}.py",
        f"benchmarks/ops/bench_{base(name)}.py",
    ):
        assert (ROOT / path).is_file(), path


def test_public_ops_are_the_registered_ones() -> None:
    public = {name for name in pumice.ops.__all__ if name.islower() and name != "backend"}
    assert public == {name for name in OPS if not name.endswith("_backward")}


def test_versions_agree() -> None:
    assert pumice.__version__ == metadata.version("pumice")
    for name in ("_cpu", "_cuda"):
        module, _ = _native.load(name)
        if module is not None:
            assert module.__version__ == pumice.__version__, f"pumice.{name} is stale: build again"


@needs_cuda_extension
def test_cuda_extension_loads_without_a_driver() -> None:
    code = "from pumice import _cuda; print(_cuda.probe())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )
    assert int(done.stdout) in (35, 100)  # insufficient driver; no device


@needs_cuda_extension
def test_a_launch_without_a_driver_is_an_error_not_a_crash() -> None:
    arguments = "0, 0, 0, 0, 0, 1, 1, *[0] * 4, 0.1, 0, 0.1, 0.0, 1.0, 0, 0, 0"
    code = f"from pumice import _cuda; _cuda.pgd_step({arguments})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if _native.extension("_cuda").probe() == 0:
        pytest.skip("there is a driver")
    assert done.returncode == 1
    assert "RuntimeError: CUDA error" in done.stderr


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_extension_needs_nothing_of_torch_openmp_or_cuda(name: str) -> None:
    module, why = _native.load(name)
    if module is None:
        pytest.skip(why)
    needed = subprocess.run(
        ["readelf", "-d", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    libraries = {line.split("[")[1].split("]")[0] for line in needed.splitlines() if "NEEDED" in line}
    allowed = ("libstdc++", "libgcc_s", "libc.so", "libm.so", "libpthread", "libdl", "librt", "ld-linux")
    assert all(library.startswith(allowed) for library in libraries), libraries
