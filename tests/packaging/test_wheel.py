"""What a built wheel and sdist hold. Slow: they are built here, without CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("scikit_build_core", "pybind11", "build")),
        reason="needs build, scikit-build-core and pybind11",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and, built from it, the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        str(folder),
    ]
    environment = os.environ | {"PUMICE_CUDA": "OFF"}
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_wheel_has_one_top_level_name(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pumice"}
    inside = {name.split("/", 1)[1] for name in names if name.startswith("pumice/")}
    assert {"__init__.py", "py.typed", "ops/pgd_step.py", "triton_kernels/pgd_step.py"} <= inside
    assert any(name.startswith("_cpu.") for name in inside)
    assert not any(name.endswith((".cu", ".cpp", ".h", ".cuh")) for name in inside)


def test_wheel_works_with_the_source_away(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, pumice; from pumice import ops\n"
        "assert pumice.__file__.startswith(sys.argv[1]), pumice.__file__\n"
        "from pumice import _cpu; assert _cpu.__file__.startswith(sys.argv[1])\n"
        "x = torch.rand(1, 3, 8, 8)\n"
        "with ops.backend('cpu'): print(ops.pgd_step(x, x, x, step_size=0.1, eps=0.1).shape)\n"
    )
    # -S -E keep an editable install's finder away; what torch needs comes back through the path.
    site = os.pathsep.join(path for path in sys.path if "site-packages" in path or "lib" in path)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": site, "PATH": os.environ["PATH"]},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_sdist_holds_what_a_build_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "pyproject.toml", "csrc/math/pgd_step.h", "triton_kernels/pgd_step.py"} <= names
    assert not any(name.startswith((".venv", "build/", "benchmarks/results")) for name in names)
