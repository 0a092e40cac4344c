"""For every test: no network, no lucky zeros in new memory, Triton interpreted where there is no GPU."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any is imported

sys.path.insert(0, str(Path(__file__).parent))


def _local(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback  # type: ignore[arg-type]
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connecting, or looking up a name, anywhere but on this machine is an error."""
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: object, real: object = real) -> object:
            if self.family != socket.AF_UNIX and not _local(address[0]):  # type: ignore[index]
                raise RuntimeError(f"a test tried to reach the network: {address}")
            return real(self, address)  # type: ignore[operator]

        patch.setattr(socket.socket, name, guarded)
    look_up = socket.getaddrinfo

    def guarded_look_up(host: object, *args: object, **kwargs: object) -> object:
        if not _local(host):
            raise RuntimeError(f"a test tried to reach the network: {host}")
        return look_up(host, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(torch.nan)
    return tensor


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN: an element that nobody writes shows. `@pytest.mark.real_empty` turns it off."""
    if request.node.get_closest_marker("real_empty"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, **k: _poisoned(real(*a, **k)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "large: needs many gigabytes")
    config.addinivalue_line("markers", "real_empty: memory is not poisoned")
