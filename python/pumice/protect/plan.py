"""How much memory protecting pictures takes, and how many of them go through the networks at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pumice.models import DiffusionModel, PromptEmbeds
from pumice.models.arguments import checked_prompt
from pumice.models.memory import peak_bytes
from pumice.training.student import Mode

from .arguments import checked_models
from .cost import SPARE, free_bytes, rows_that_fit, step_bytes
from .latent import denoising_gradient, score_difference
from .pgd import ROWS
from .photoguard_diffusion import Img2Img, ddim_steps

Denoiser = Literal["unused", "forward", "backward", "sampler"]  # how a step goes through it


@dataclass(frozen=True)
class _Task:
    """What of a method takes memory.

    Attributes:
        denoiser: of a step.
        rows: of a pass of the denoiser for each picture.
        surrogate: whether one is trained.
        scratch: whether it is taken back to what it was, which is kept meanwhile.
    """

    denoiser: Denoiser = "backward"
    rows: int = 1
    surrogate: bool = False
    scratch: bool = False


_TASKS: Mapping[str, _Task] = {
    "photoguard": _Task("unused"),
    "photoguard_diffusion": _Task("sampler", rows=10),
    "glaze": _Task("unused"),
    "sds": _Task("forward"),
    "sdst": _Task("forward"),
    "advdm": _Task(),
    "mist": _Task(),
    "caat": _Task(),
    "ace": _Task(surrogate=True),
    "fsmg": _Task(surrogate=True),
    "aspl": _Task(surrogate=True, scratch=True),
    "easpl": _Task(surrogate=True, scratch=True),
    "metacloak": _Task(surrogate=True),
    "select_timesteps": _Task(rows=5),
    "simac": _Task(rows=5, surrogate=True, scratch=True),
}

_UNITS = {"": 1, "B": 1, "M": 10**6, "MB": 10**6, "MIB": 2**20, "G": 10**9, "GB": 10**9, "GIB": 2**30}


@dataclass(frozen=True)
class Plan:
    """What is switched on for a method in the memory that there is.

    Attributes:
        task: the method.
        height, width: of the pictures as they go through the networks.
        device: the model's.
        dtype: of its denoiser.
        memory: bytes that there are.
        weights: bytes of the model and of what the method trains beside it.
        fixed: bytes of a step, whatever the number of pictures.
        each: bytes of a step for each picture.
        training: bytes while a surrogate learns.
        batch_size: pictures of a step, at least 1.
        recompute: whether the encoder is passed forward twice, which is slower and takes less.
        advice: what would help, a sentence each.
    """

    task: str
    height: int
    width: int
    device: str
    dtype: str
    memory: int
    weights: int
    fixed: int
    each: int
    training: int
    batch_size: int
    recompute: bool
    advice: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        """Bytes at the peak."""
        step = self.fixed + self.batch_size * self.each
        return self.weights + (step + self.training if _adds_up(self.device) else max(step, self.training))

    @property
    def fits(self) -> bool:
        """Whether that leaves a tenth of the memory to kernels, the driver and gaps between tensors."""
        return self.estimate <= (1 - SPARE) * self.memory

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"estimate": self.estimate, "fits": self.fits}

    def __str__(self) -> str:
        at_a_time = "1 picture" if self.batch_size == 1 else f"{self.batch_size} pictures"
        lines = [
            f"{self.task}, {self.height} x {self.width}, {self.dtype} on {self.device}: "
            f"{at_a_time} at a time{', encoded twice a step' if self.recompute else ''}",
            f"{_gb(self.estimate)} of {_gb(self.memory)}: weights {_gb(self.weights)}, a step "
            f"{_gb(self.fixed + self.batch_size * self.each)}, {_gb(self.each)} of it for each picture"
            + (f"; training {_gb(self.training)}" if self.training else ""),
        ]
        if not self.fits:
            lines.append(f"This does not fit, with {SPARE:.0%} to spare.")
        return "\n".join([*lines, *self.advice])


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def plan(
    pipe: Any,
    task: str = "advdm",
    vram: int | str | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    surrogate: Mode = "fp32_master",
) -> Plan:
    """Choose `batch_size` and `recompute` of a method for a memory.

    ::

        bytes = weights + max(fixed + batch_size * each, training)
        on a GPU, where the graph of a step keeps its memory while a surrogate learns:
        bytes = weights + fixed + batch_size * each + training

    fixed and each are counted: a step of 1 and of 2 pictures is done on tensors without memory, by the
    kernels that the model's device would take. A tenth of the memory is left to spare. The encoder is passed
    twice only where not even one picture fits otherwise.

    Args:
        pipe: a pipeline, a `DiffusionModel`, or several.
        task: the name of a method of `pumice.protect`, of which the other arguments have their defaults.
        vram: bytes, or a text such as "8G", "8GB" (10^9) or "7.5 GiB" (2^30). Default: what is free on the
            model's device and what the model has of it.
        height, width: of the pictures as they go through the networks, in pixels. Default: the model's own
            size, the largest that `size="tiles"` cuts. "resize" gives that to the shorter side alone: 512 x
            768 of a photograph of 3:2 on a model of 512 x 512.
        surrogate: of a method that trains one, as its own.

    Returns:
        A `Plan`. Where `fits` is False it tells the least that the method needs.

    Scratch memory of kernels and the examples' latents are not counted, nor is what PIL pictures take.

    Raises:
        ValueError: for a method that is not known, a size that the model does not take, or a memory that
            says nothing.
    """
    if task not in _TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(_TASKS)}")
    if surrogate not in get_args(Mode):
        raise ValueError(f"surrogate: got {surrogate!r}, expected one of {', '.join(get_args(Mode))}")
    models = checked_models(pipe)
    first = models[0]
    size = _size(first, height, width)
    resident = sum(weight.nbytes for weight in _weights(models))
    memory = free_bytes(first.device) + resident if vram is None else _checked_bytes(vram)
    copies, training = _trained_bytes(models, task, surrogate)
    weights = resident + copies

    for recompute in (False, True):
        fixed, each = _step_bytes(models, _TASKS[task], size, recompute)
        kept = training if _adds_up(first.device.type) else 0
        rows = rows_that_fit(memory, weights + fixed + kept, each)
        if rows:
            break
    # convolutions number the values of a tensor with 32 bits
    values = max(size[0] * size[1] * model.vae.config.block_out_channels[0] for model in models)
    rows = min(rows, (2**31 - 1) // (values * _TASKS[task].rows))
    if first.device.type == "cpu":
        rows = min(rows, max(1, ROWS // _TASKS[task].rows))

    found = Plan(
        task,
        *size,
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        memory=memory,
        weights=weights,
        fixed=fixed,
        each=each,
        training=training,
        batch_size=max(1, rows),
        recompute=recompute,
    )
    return replace(found, advice=tuple(_advice(found, models, surrogate)))


def _advice(found: Plan, models: Sequence[DiffusionModel], surrogate: Mode) -> Iterator[str]:
    if models[0].dtype == torch.float32 and models[0].device.type == "cuda":
        yield "In bfloat16 the model would take half of that, and a fraction of the time."
    if found.fits or not _TASKS[found.task].surrogate or surrogate == "lora" or found.task == "ace":
        return
    smaller = plan(models, found.task, found.memory, found.height, found.width, surrogate="lora")
    yield f'With surrogate="lora" it would be {_gb(smaller.estimate)}.'


# --- What is counted

_told: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, int]]] = WeakKeyDictionary()


def _step_bytes(
    models: Sequence[DiffusionModel], task: _Task, size: tuple[int, int], recompute: bool
) -> tuple[int, int]:
    """(fixed, each) of a step; counted once for a model, as long as it lives."""
    kinds = tuple((id(model.unet), model.dtype, model.vae.dtype, model.upcast_vae) for model in models)
    key = (kinds, models[0].device, task.denoiser, task.rows, size, recompute)
    known = _told.setdefault(models[0].unet, {})
    if key not in known:
        apart = [_apart(model) for model in models]
        if task.denoiser == "sampler":
            step = partial(_sampler_step, [_sampler(model, task.rows) for model in apart], size, recompute)
        else:
            prompts = [checked_prompt(model, "") for model in apart]
            step = partial(_step, apart, prompts, task, size, recompute)
        with ExitStack() as exits:
            for model in models:
                exits.enter_context(model.frozen(data_gradient=True))
            known[key] = step_bytes(step)
    return known[key]


def _step(
    models: Sequence[DiffusionModel],
    prompts: Sequence[PromptEmbeds],
    task: _Task,
    size: tuple[int, int],
    recompute: bool,
    pictures: int,
) -> None:
    device = models[0].device
    # as they are, as they came, their masks, the gradient
    images, *_beside = torch.zeros(4, pictures, 3, *size, device=device)
    rows = images.repeat_interleave(task.rows, dim=0) if task.rows > 1 else images
    for model, prompt in zip(models, prompts, strict=True):
        noise = torch.zeros(len(rows), *model.latent_shape(*size), device=device)
        t = torch.zeros(len(rows), dtype=torch.long, device=device)
        cotangent = partial(_cotangent, model, task.denoiser, t, noise, prompt)
        model.vjp(rows, cotangent, noise=noise, recompute=recompute)


def _cotangent(
    model: DiffusionModel, denoiser: Denoiser, t: Tensor, noise: Tensor, prompt: PromptEmbeds, z: Tensor
) -> Tensor:
    if denoiser == "unused":
        return 2 * z
    through = score_difference if denoiser == "forward" else denoising_gradient
    return through(model, z, t, noise, prompt)


def _sampler(model: DiffusionModel, reps: int) -> Img2Img:
    """As `photoguard_diffusion` makes it by default."""
    return Img2Img(model, ddim_steps(model.schedule, 0.5, 8, 1.0), (), reps, reps)


def _sampler_step(
    objectives: Sequence[Img2Img], size: tuple[int, int], recompute: bool, pictures: int
) -> None:
    device = objectives[0].model.device
    # as they are, the target, as they came, their masks, the gradient
    images, target, *_beside = torch.zeros(5, pictures, 3, *size, device=device)
    for objective in objectives:
        noise = torch.zeros(pictures, *objective.noise_shape(size), device=device)
        objective.gradient(images, noise, target, recompute=recompute)


def _trained_bytes(models: Sequence[DiffusionModel], task: str, mode: Mode) -> tuple[int, int]:
    """Bytes that are there throughout, and bytes while a surrogate learns."""
    if task == "caat":  # to_k and to_v, float32 masters, their moments, gradients and sums of these
        trained = [
            linear.weight
            for model in models
            for layer in model.cross_attention.values()
            for linear in (layer.to_k, layer.to_v)
        ]
        return sum(weight.nbytes + 24 * weight.numel() for weight in trained), 0
    if not _TASKS[task].surrogate:
        return 0, 0
    if mode == "lora" or task == "ace":  # whose weights are few
        return 0, max(_learning_bytes(model, []) for model in models)
    copies = training = 0
    for model in models:
        trained = [weight for part in (model.unet, *model.text_encoders) for weight in part.parameters()]
        count = sum(weight.numel() for weight in trained)
        own = trained[0].element_size()
        width = 2 if mode == "bf16_faithful" else own
        master = 2 if mode == "bf16_faithful" else 4
        copies += count * (width + (master if master > width else 0))
        copies += count * master if _TASKS[task].scratch else 0
        # two moments, the weights as they were, and all gradients, in either dtype
        learning = max(_learning_bytes(model, trained) * width // own, master * count)
        training = max(training, count * (2 * master + width) + learning)
    return copies, training


def _learning_bytes(model: DiffusionModel, trained: Sequence[Tensor]) -> int:
    """The peak of a training step on a picture of the subject and one of its class, with its gradients."""
    model = _apart(model)
    prompts, device = checked_prompt(model, ""), model.device
    shape = (2, *model.latent_shape())
    of_denoiser = {id(weight) for weight in model.unet.parameters()}  # text encoders' part is small
    weights = [weight for weight in trained if id(weight) in of_denoiser]

    def learn() -> None:
        z = torch.zeros(shape, device=device, requires_grad=True)
        t = torch.zeros(2, dtype=torch.long, device=device)
        torch.autograd.grad(model.predict(z, t, prompts).sum(), [z, *weights])

    with model.frozen(), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        return peak_bytes(learn)


def _apart(model: DiffusionModel) -> DiffusionModel:
    """With tables of its own: those made of tensors without values would be there for the next real step."""
    found = copy.copy(model)
    found.schedule = copy.deepcopy(model.schedule)
    return found


def _weights(models: Sequence[DiffusionModel]) -> list[Tensor]:
    """Parameters and buffers of all parts of the pipelines, each once."""
    parts = [part for model in models for part in model.pipe.components.values()]
    networks = [part for part in parts if isinstance(part, nn.Module)]
    return list({id(w): w for net in networks for w in (*net.parameters(), *net.buffers())}.values())


# --- What a person gives and reads


def _adds_up(device: str) -> bool:
    """Whether a step's memory is still taken while a surrogate learns: by a captured CUDA graph."""
    return device.startswith("cuda")


def _size(model: DiffusionModel, height: int | None, width: int | None) -> tuple[int, int]:
    _, *latents = model.latent_shape(height, width)
    scale = model.vae_scale_factor
    return latents[0] * scale, latents[1] * scale


def _checked_bytes(vram: int | str) -> int:
    text = str(vram).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if isinstance(vram, bool) or found is None or unit is None or float(found[1]) == 0:
        raise ValueError(f"vram: got {vram!r}, expected bytes or a text such as '8GB' or '7.5 GiB'")
    return int(float(found[1]) * unit)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
