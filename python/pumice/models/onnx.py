"""Networks exported to ONNX and run by ONNX Runtime in place of torch."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any, overload

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .fingerprint import digest
from .model import DiffusionModel
from .pixel import PixelDenoiser

_KINDS = {torch.float32: 1, torch.float16: 10}  # of ONNX's TensorProto


@overload
def onnxruntime(model: DiffusionModel, folder: str | PathLike[str] | None = ...) -> DiffusionModel: ...
@overload
def onnxruntime(model: PixelDenoiser, folder: str | PathLike[str] | None = ...) -> PixelDenoiser: ...
def onnxruntime(model: Any, folder: str | PathLike[str] | None = None) -> Any:
    """The model with its denoiser and autoencoder run by ONNX Runtime, for all that needs no gradients.

    The networks are exported by torch's dynamo exporter, for any batch and size of pictures: the denoiser in
    its own dtype, the autoencoder in float32. On a GPU the CUDA provider runs them (of onnxruntime-gpu), else
    the CPU provider, with as many threads as torch has. Text encoders stay in torch. What is changed in the
    model later does not reach the graphs.

    Args:
        model: is not changed.
        folder: where graphs are written, and read if they are there; each is named by its weights. By default
            a temporary one.

    Returns:
        A model of the same kind.

    Raises:
        ValueError: if onnx, onnxscript or onnxruntime is not installed (`pip install "pumice[onnx]"`), or the
            provider of the model's device is missing.
        UnsupportedModelError: for networks that ONNX Runtime cannot run, bfloat16 among them; and later, when
            a gradient or a look at weights is asked for.
    """
    _check_installed(model.device)
    graphs = Path(tempfile.mkdtemp(prefix="pumice-onnx-") if folder is None else folder)
    found = _of_pixels(model, graphs) if isinstance(model, PixelDenoiser) else _of_latents(model, graphs)
    if folder is None:
        weakref.finalize(found, shutil.rmtree, graphs, ignore_errors=True)
    return found


def _of_pixels(model: PixelDenoiser, graphs: Path) -> PixelDenoiser:
    found = copy.copy(model)
    found.unet = Denoiser(model.unet, graphs)
    return found


def _of_latents(model: DiffusionModel, graphs: Path) -> DiffusionModel:
    found = copy.copy(model)
    found.pipe = copy.copy(model.pipe)
    found.pipe.unet = Denoiser(model.eager_unet, graphs)
    found.pipe.vae = _Autoencoder(model.vae, graphs)
    return found


class Graph:
    """A function of tensors as ONNX Runtime runs it.

    Args:
        path: of the graph; exported if it is not there.
        network: that it is of.
        inputs: examples by name, with a batch of 2; how their first and their last two dimensions are called.
        shape: of the output, from those of the inputs.
    """

    def __init__(
        self, path: Path, network: nn.Module, inputs: dict[str, Tensor], shape: Callable[..., Sequence[int]]
    ) -> None:
        first = next(iter(inputs.values()))
        if first.dtype not in _KINDS:
            raise UnsupportedModelError(
                f"backend: onnxruntime got a network in {first.dtype}, expected float32 or float16"
            )
        self._names, self._shape = tuple(inputs), shape
        if path.exists():
            self._session = _session(path, first.device)
        else:
            self._session = _exported(network, inputs, path)

    def __call__(self, *tensors: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise UnsupportedModelError("backend: onnxruntime gives no gradients, which this method needs")
        tensors = tuple(tensor.detach().contiguous() for tensor in tensors)
        first = tensors[0]
        output = first.new_empty(self._shape(*(tensor.shape for tensor in tensors)))
        binding = self._session.io_binding()
        for name, tensor in zip(self._names, tensors, strict=True):
            binding.bind_input(name, *_place(tensor))
        binding.bind_output("output", *_place(output))
        if first.is_cuda:
            torch.cuda.current_stream(first.device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)
        return output


class _Network(nn.Module):
    """What the pipeline and the methods ask of a network besides calling it."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._source = (source,)  # no submodule: nothing of it is to run
        self.config = source.config

    @property
    def exported_from(self) -> nn.Module:
        return self._source[0]

    @property
    def device(self) -> torch.device:
        return self.exported_from.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.exported_from.dtype  # type: ignore[return-value]


class Denoiser(_Network):
    """A UNet2DModel or UNet2DConditionModel."""

    def __init__(self, source: Any, graphs: Path) -> None:
        super().__init__(source)
        config, like = source.config, {"device": source.device, "dtype": source.dtype}
        side = config.sample_size if isinstance(config.sample_size, int) else 16
        x = torch.zeros(2, config.in_channels, side, side, **like)
        inputs = {
            "x": x,
            "timestep": torch.zeros(2, device=source.device),
        }  # some schedulers' are no integers
        if width := config.get("cross_attention_dim"):
            inputs["embeds"] = torch.zeros(2, 8, width, **like)
        if config.get("addition_embed_type") == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs |= {"text": torch.zeros(2, pooled, **like), "time": torch.zeros(2, 6, **like)}

        def shape(x: torch.Size, *others: torch.Size) -> Sequence[int]:
            return x[0], config.out_channels, *x[2:]

        path = graphs / f"denoiser-{digest(source)[:16]}.onnx"
        self._graph = Graph(path, _DenoiserCall(source), inputs, shape)

    def forward(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        if given := [name for name, value in others.items() if value is not None]:
            raise UnsupportedModelError(f"backend: onnxruntime's denoiser takes no {given[0]}")
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float()
        inputs = [sample, t]
        if encoder_hidden_states is not None:
            inputs.append(encoder_hidden_states)
        if added_cond_kwargs is not None:
            inputs += [added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]]
        output = self._graph(*inputs)
        return SimpleNamespace(sample=output) if return_dict else (output,)


class _Autoencoder(_Network):
    """An AutoencoderKL, in float32: many overflow in 16 bits."""

    def __init__(self, source: Any, graphs: Path) -> None:
        super().__init__(source)
        config, name = source.config, digest(source)[:16]
        if source.dtype != torch.float32:
            source = nn.Module.to(copy.deepcopy(source), torch.float32)
        like = {"device": source.device, "dtype": source.dtype}
        scale, latent = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        self._encode = Graph(
            graphs / f"encoder-{name}.onnx",
            _EncoderCall(source),
            {"x": torch.zeros(2, config.in_channels, 8 * scale, 8 * scale, **like)},
            lambda x: (x[0], 2 * latent, x[2] // scale, x[3] // scale),
        )
        self._decode = Graph(
            graphs / f"decoder-{name}.onnx",
            _DecoderCall(source),
            {"x": torch.zeros(2, latent, 8, 8, **like)},
            lambda x: (x[0], config.out_channels, x[2] * scale, x[3] * scale),
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(self._encode(x))
        return SimpleNamespace(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        output = self._decode(z)
        return SimpleNamespace(sample=output) if return_dict else (output,)


class _DenoiserCall(nn.Module):
    """What is exported of a denoiser: tensors in, a tensor out."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        embeds: Tensor | None = None,
        text: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        more: dict[str, Any] = {} if embeds is None else {"encoder_hidden_states": embeds}
        if text is not None:
            more["added_cond_kwargs"] = {"text_embeds": text, "time_ids": time}
        return self.network(x, timestep, return_dict=False, **more)[0]


class _EncoderCall(nn.Module):
    """What is exported of an encoder: mean and logarithm of the variance, one below the other."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.encode(x, return_dict=False)[0].parameters


class _DecoderCall(nn.Module):
    """What is exported of a decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.decode(x, return_dict=False)[0]


def _check_installed(device: torch.device) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'backend: onnxruntime needs {error.name}, which is not installed: pip install "pumice[onnx]"'
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ValueError(
            "backend: the model is on a GPU and this onnxruntime has no CUDA provider: install "
            "onnxruntime-gpu, or move the model to the CPU"
        )


def _exported(network: nn.Module, inputs: dict[str, Tensor], path: Path) -> Any:
    """Write a graph and the file of its weights, both if it runs; its session."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dynamic = torch.export.Dim.DYNAMIC
    varying: dict[str, dict[int, Any]] = {}
    for name, tensor in inputs.items():
        varying[name] = {0: dynamic}
        if tensor.ndim == 4:
            varying[name] |= {2: dynamic, 3: dynamic}
        if tensor.ndim == 3:
            varying[name][1] = dynamic
    training = {module: module.training for module in network.modules()}
    with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as partial:
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        try:
            program = torch.onnx.export(
                network.eval(),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=varying,
                input_names=list(inputs),
                output_names=["output"],
                custom_translation_table=_translations(),
                verbose=False,
            )
        finally:
            for module, mode in training.items():
                module.training = mode
        assert program is not None
        # the graph names the file of its weights, so both get their names before they get their place
        program.save(Path(partial) / path.name, external_data=True)
        session = _session(Path(partial) / path.name, next(iter(inputs.values())).device)
        for file in sorted(os.listdir(partial), key=lambda name: name == path.name):
            (Path(partial) / file).replace(path.parent / file)
    return session


def _session(path: Path, device: torch.device) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), *providers]
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of a dozen kinds that have nothing in common
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"backend: onnxruntime cannot run {path.stem}: {reason}; float32 may do"
        ) from error


def _place(tensor: Tensor) -> tuple[str, int, Any, list[int], int]:
    """Device, its number, type, shape and address, as ONNX Runtime binds them."""
    place = tensor.device.type, tensor.device.index or 0
    return *place, _KINDS[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def _translations() -> dict[Any, Callable[..., Any]]:
    """The operators of pumice that a denoiser or autoencoder may have in it, in ONNX's own."""
    import numpy as np
    import onnx
    from onnxscript import opset18 as op

    def constant(values: Any) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(values)))

    def group_norm_silu(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
        shape = op.Shape(x)
        grouped = op.Reshape(x, constant([0, groups, -1]))
        one, zero = (op.CastLike(constant([value] * groups), x) for value in (1.0, 0.0))
        normal = op.Reshape(op.InstanceNormalization(grouped, one, zero, epsilon=eps), shape)
        flat = op.Reshape(normal, constant([0, 0, -1]))
        z = op.Add(op.Mul(flat, op.Unsqueeze(weight, constant([1]))), op.Unsqueeze(bias, constant([1])))
        y = op.Reshape(op.Mul(z, op.Sigmoid(z)), shape)
        return y, op.Identity(y), op.Identity(y)  # statistics, which only a backward pass reads

    return {torch.ops.pumice.group_norm_silu.default: group_norm_silu}
