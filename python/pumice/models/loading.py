"""From a pipeline, a path or a hub id to the adapter of its family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import UnsupportedModelError
from .model import DiffusionModel
from .stable_diffusion import StableDiffusion
from .stable_diffusion_xl import StableDiffusionXL

_ADAPTERS: tuple[type[DiffusionModel], ...] = (StableDiffusion, StableDiffusionXL)
_SUPPORTED = [name for adapter in _ADAPTERS for name in adapter.pipelines]

# By the beginnings of their pipelines' names.
_NOT_YET = dict.fromkeys(
    ("StableDiffusion3", "Flux"),
    "not yet this one: it has no cross-attention, text and picture attend to each other in one sequence",
)

# Weights that only one family has, in the layout of single-file checkpoints.
_SINGLE_FILE_KEYS = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}


Backend = Literal["torch", "onnxruntime"]


def load(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "torch",
) -> DiffusionModel:
    """Open a text-to-image model for every method of pumice.

    Args:
        source: a diffusers pipeline (used as it is, not copied), the path of a diffusers folder or of a
            single-file .safetensors checkpoint, a hub id, or a DiffusionModel, which is returned.
        dtype: of all networks, for a path or an id; default float32.
        device: for a path or an id; default the CPU.
        backend: "onnxruntime" runs denoiser and autoencoder there, for methods without gradients
            (`models.onnxruntime`).

    Raises:
        UnsupportedModelError: if the model's family is not supported.
        TypeError: if source is none of the above.
        ValueError: if a path is not a model or has no safetensors weights, an id cannot be read, nothing can
            run on the device, dtype or device are given with a loaded pipeline (`pipe.to` moves it), or for
            an unknown backend or one that is not installed.
    """
    check_backend(backend)
    model = _loaded(source, dtype, device)
    if backend == "torch":
        return model
    from .onnx import onnxruntime

    return onnxruntime(model)


def check_backend(backend: str) -> None:
    """Raise ValueError for one that networks cannot be run by."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")


def _loaded(source: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> DiffusionModel:
    if isinstance(source, str | PathLike):
        check_device(device)
        pipe = _open(str(source))
        for part in pipe.components.values():
            # what already has the dtype is left alone: diffusers warns of every cast
            if isinstance(part, nn.Module) and part.dtype != (dtype or torch.float32):
                part.to(dtype or torch.float32)
        return _adapter(type(pipe))(pipe.to(device=device))
    if dtype is not None or device is not None:
        raise ValueError(
            "dtype, device: got one with a loaded pipeline, expected a path or an id; use pipe.to"
        )
    if isinstance(source, DiffusionModel):
        return source
    if not hasattr(source, "components"):
        raise TypeError(
            f"source: got a {type(source).__name__}, "
            "expected a diffusers pipeline, a path, a hub id or a DiffusionModel"
        )
    return _adapter(type(source))(source)


def check_device(device: torch.device | str | None) -> None:
    """Raise ValueError unless tensors can be made there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"device: {str(device)!r} cannot be used: {reason}") from error


def _adapter(pipeline: type) -> type[DiffusionModel]:
    """The adapter of a pipeline class or of a subclass of one."""
    for ancestor in pipeline.__mro__:
        for adapter in _ADAPTERS:
            if ancestor.__name__ in adapter.pipelines:
                return adapter
    raise _unsupported(pipeline.__name__)


def _unsupported(name: str) -> UnsupportedModelError:
    why = next((f"; {reason}" for start, reason in _NOT_YET.items() if name.startswith(start)), "")
    return UnsupportedModelError(
        f"source: {name} is not supported; supported are {', '.join(_SUPPORTED)}{why}"
    )


def _open(source: str) -> Any:
    """The pipeline of a path or id, refused by its class name before any weights are read or fetched."""
    import diffusers

    path = Path(source)
    if path.is_file():
        return _open_single_file(path)
    if not path.is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise ValueError(f"source: {source!r} is neither an existing path nor a hub id")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"source: {source!r} is not a diffusers folder, it has no model_index.json")
    with one_line_errors(source):
        name = str(diffusers.DiffusionPipeline.load_config(source).get("_class_name"))
    if name not in _SUPPORTED:
        raise _unsupported(name)
    with one_line_errors(source):
        return getattr(diffusers, name).from_pretrained(source, use_safetensors=True)


def _open_single_file(path: Path) -> Any:
    import diffusers

    if path.suffix != ".safetensors":
        raise ValueError(f"source: {str(path)!r} is not a .safetensors file")
    with one_line_errors(path), safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    for prefix, name in _SINGLE_FILE_KEYS.items():
        if any(key.startswith(prefix) for key in keys):
            with one_line_errors(path):
                return getattr(diffusers, name).from_single_file(str(path))
    raise UnsupportedModelError(
        f"source: {str(path)!r} holds no text encoder of Stable Diffusion 1, 2 or XL; no others are supported"
    )


@contextmanager
def one_line_errors(source: str | Path, name: str = "source") -> Iterator[None]:
    """What diffusers raises about unreadable models, in one line that names argument and model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ValueError(f"{name}: {str(source)!r} cannot be loaded: {reason}") from error
