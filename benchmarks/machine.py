"""The line that every table of numbers begins with."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Processor or GPU, versions, threads, commit."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }
    if device == "cuda":
        found["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    for package in ("torch", "triton", "diffusers", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def line(device: str) -> str:
    return ", ".join(
        f"{name} {value}" if name != "device" else str(value) for name, value in describe(device).items()
    )


def folder(device: str) -> Path:
    """Where the results of this machine go."""
    name = re.sub(r"[^a-z0-9]+", "-", str(describe(device)["device"]).lower()).strip("-")
    return Path(__file__).parent / "results" / name


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"model name\s*:\s*(.+)", text)
    return model.group(1).strip() if model else platform.machine()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
