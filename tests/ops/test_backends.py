from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pumice import _native, ops
from pumice.ops import _registry


def step(device: str = "cpu") -> torch.Tensor:
    x = torch.full((1, 4), 0.5, device=device)
    return ops.pgd_step(x, torch.ones_like(x), x, step_size=0.1, eps=0.2)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that pgd_step went through."""
    calls: list[str] = []
    real = _registry.OPS["pgd_step"].backends

    def spy(name: str) -> object:
        return lambda *args: (calls.append(name), real[name](*args))[1]

    monkeypatch.setitem(
        _registry.OPS, "pgd_step", _registry.Op("pgd_step", {name: spy(name) for name in real})
    )
    monkeypatch.setattr(_registry, "_choose", lambda op, args: choose(_registry.OPS[op.name], args))
    choose = _CHOOSE
    return calls


_CHOOSE = _registry._choose


def test_auto_takes_the_fastest(used: list[str]) -> None:
    step()
    with ops.backend("torch"):
        step()
        with ops.backend("auto"):
            step()
        step()
    step()
    assert used == ["cpu", "torch", "cpu", "torch", "cpu"]


def test_environment_variable(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUMICE_BACKEND", "torch")
    step()
    with ops.backend("cpu"):
        step()
    monkeypatch.setenv("PUMICE_BACKEND", "fpga")
    with pytest.raises(
        ops.BackendError, match=r"^PUMICE_BACKEND: no backend 'fpga'; there are torch, cpu, cuda"
    ):
        step()
    assert used == ["torch", "cpu"]


def test_the_choice_ends_with_the_block_also_after_an_error() -> None:
    with pytest.raises(KeyError), ops.backend("torch"):
        raise KeyError
    assert _registry._chosen is None


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend: no backend 'gpu'"), ops.backend("gpu"):
        pass
    if not torch.cuda.is_available():
        with (
            pytest.raises(ops.BackendError, match=r"^backend 'cuda' cannot run: .*CUDA"),
            ops.backend("cuda"),
        ):
            pass
    monkeypatch.setattr(_native, "load", lambda name: (None, f"pumice.{name} is missing: not built"))
    with (
        pytest.raises(ops.BackendError, match=r"^backend 'cpu' cannot run: pumice\._cpu is missing"),
        ops.backend("cpu"),
    ):
        pass


def test_without_the_extension_auto_is_plain_torch(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda name: (None, "not built"))
    step()
    assert used == ["torch"]


def test_float64_is_plain_torch(used: list[str]) -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    ops.pgd_step(x, x, x, step_size=0.1, eps=0.1)
    why = r"^backend 'cpu' cannot run pgd_step on cpu .* torch.float64"
    with pytest.raises(ops.BackendError, match=why), ops.backend("cpu"):
        ops.pgd_step(x, x, x, step_size=0.1, eps=0.1)
    assert used == ["torch"]


def test_instruction_level(monkeypatch: pytest.MonkeyPatch) -> None:
    best = _native.extension("_cpu").best_isa()
    for level, name in enumerate(_native.CPU_LEVELS):
        monkeypatch.setenv("PUMICE_CPU_ISA", name)
        if level <= best:
            assert _native.cpu_level() == level
        else:
            with pytest.raises(ValueError, match="this processor only has"):
                _native.cpu_level()
    monkeypatch.setenv("PUMICE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"^PUMICE_CPU_ISA='sse9': expected one of default, avx2, avx512"):
        _native.cpu_level()


def test_import_is_cheap() -> None:
    code = "import sys, pumice; print(sorted({'torch', 'diffusers', 'triton', 'numpy'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_env() -> None:
    import pumice

    described = pumice.env()
    assert described.pumice == pumice.__version__
    assert described.backends["cpu"]
    assert set(described.to_dict()["packages"]) >= {"torch", "triton"}
    assert "cuda extension" in str(described)
