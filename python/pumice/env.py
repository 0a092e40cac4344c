"""What was compiled, what loaded, and why something did not."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class Environment:
    """What `pumice.env()` returns; printing it gives the table."""

    pumice: str
    python: str
    system: str
    processor: str
    cpu_level: str
    threads: int
    cpu_extension: str
    cuda_extension: str
    triton: str
    gpu: str
    backends: dict[str, str]
    settings: dict[str, str]
    packages: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {text}" for key, text in value.items()) or "none"
            lines.append(f"{name.replace('_', ' '):<15} {value}")
        return "\n".join(lines)


def env() -> Environment:
    """Describe this installation: extensions, backends, versions, processor and GPU."""
    import torch

    import pumice
    from pumice import _native
    from pumice.ops import _registry

    def extension(name: str) -> str:
        module, why = _native.load(name)
        if module is None:
            return why
        built = f"{module.__version__}"
        if name == "_cuda":
            built += f", CUDA {module.cuda_version}, architectures {module.architectures}"
        return built

    try:
        level = _native.CPU_LEVELS[_native.cpu_level()]
    except (ImportError, ValueError) as error:
        level = str(error)
    gpu = "none: " + _registry.no_gpu_reason()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
        )
        gpu += f", {torch.cuda.device_count()} in all"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Environment(
        pumice=pumice.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        processor=_processor(),
        cpu_level=level,
        threads=torch.get_num_threads(),
        cpu_extension=extension("_cpu"),
        cuda_extension=extension("_cuda"),
        triton=_version("triton"),
        gpu=gpu,
        backends={
            name: _registry.why_not(name, device) or f"runs on {device}" for name in _registry.BACKENDS
        },
        settings={name: value for name, value in sorted(os.environ.items()) if name.startswith("PUMICE_")},
        packages={name: _version(name) for name in _PACKAGES},
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
