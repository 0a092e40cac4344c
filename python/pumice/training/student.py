"""A copy of a model whose weights train; the model itself stays as it is.

Weights change in place, so what was captured as a CUDA graph goes on with the new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pumice.models import Added, Shifted
from pumice.models.arguments import checked_prompt
from pumice.models.changes import Change
from pumice.models.draws import Draws
from pumice.models.edit import TEXT, weights
from pumice.models.errors import UnsupportedModelError
from pumice.models.model import DiffusionModel
from pumice.models.prompts import PromptEmbeds

Mode = Literal["fp32_master", "bf16_faithful", "lora"]

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
LEARNING_RATES: dict[Mode, float] = {"fp32_master": 5e-7, "bf16_faithful": 5e-7, "lora": 5e-4}
"""AdamW's, of Anti-DreamBooth's code (arXiv:2303.15433)."""

FLOAT16_SCALE = 2.0**10  # of losses, else small gradients vanish in float16


class Learner:
    """A copy of a model, what of it trains, and what an optimizer moves.

    Args:
        model: the copy.
        weights: what is trained, by name, as the networks have it.
        trains_text: whether prompts are encoded by what is trained.
        wide: whether the optimizer moves float32 copies of narrower weights.

    Attributes:
        model, weights, trains_text: as given.
        masters: what the optimizer moves: the weights themselves, or wider copies.
        scale: that losses are to be multiplied by before the backward pass.
    """

    def __init__(
        self, model: DiffusionModel, weights: dict[str, nn.Parameter], *, trains_text: bool, wide: bool
    ) -> None:
        self.model, self.weights, self.trains_text = model, weights, trains_text
        self.masters: list[Tensor] = [
            weight.detach().float() if wide and weight.element_size() < 4 else weight
            for weight in weights.values()
        ]
        self.scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        self._embeds: dict[str, PromptEmbeds] = {}

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Prompts encoded, anew where text encoders train."""
        if self.trains_text:
            return self.model.encode_prompt(list(prompts))
        for prompt in prompts:
            if prompt not in self._embeds:
                self._embeds[prompt] = checked_prompt(self.model, prompt)
        return PromptEmbeds.cat([self._embeds[prompt] for prompt in prompts])

    def gather(self) -> None:
        """Move gradients from the weights to what the optimizer moves, in its precision and unscaled.

        What overflowed in float16 stays infinite or NaN.
        """
        for master, weight in zip(self.masters, self.weights.values(), strict=True):
            if weight.grad is None:
                continue
            gradient, weight.grad = weight.grad.to(master.dtype), None
            master.grad = gradient if self.scale == 1 else gradient / self.scale

    @torch.no_grad()
    def publish(self) -> None:
        """Bring what the optimizer moved to the networks."""
        for master, weight in zip(self.masters, self.weights.values(), strict=True):
            if master is not weight:
                weight.copy_(master)

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Set what is trained, as `masters` had it."""
        for master, kept in zip(self.masters, state, strict=True):
            master.copy_(kept)
        self.publish()

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.weights.values(), *self.masters):
            tensor.grad = None


class Student(Learner):
    """A denoiser, and text encoders, that train beside the model that they were copied from.

    Args:
        source: the model.
        mode: what is trained.

            - "fp32_master": all weights, in float32; the networks compute in the pipeline's dtype.
            - "bf16_faithful": all weights, in bfloat16, as some released code does it; small updates round
              away.
            - "lora": matrices of low rank at attention projections; all other weights are the pipeline's own.
        train_text_encoder: of text encoders, too.
        rank: of "lora".
        seed: of its first matrices.

    Attributes:
        model: the copy. Its autoencoder is the pipeline's.
        mode: as given.

    Memory on the device, in bytes for each trained weight: 4, or 6 with "fp32_master" on networks in 16 bits.

    Raises:
        ValueError: for another mode.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """

    def __init__(
        self, source: DiffusionModel, mode: Mode, *, train_text_encoder: bool, rank: int, seed: int
    ) -> None:
        parts = trainable_parts(source, mode, train_text_encoder=train_text_encoder)
        self.mode = mode
        model = with_copies(source, parts, mode)
        weights: dict[str, nn.Parameter] = {}
        draws = Draws([f"{seed}/surrogate"], source.device)
        for name in parts:
            network = getattr(model.pipe, name)
            if mode == "lora":
                _add_lora(network, TEXT_LORA_TARGETS if "text" in name else LORA_TARGETS, rank, draws)
            for key, weight in network.named_parameters():
                if mode != "lora" or "lora_" in key:
                    weights[f"{name}.{key}"] = weight.requires_grad_()
        super().__init__(model, weights, trains_text=train_text_encoder, wide=mode == "fp32_master")


class Part(Learner):
    """A model some of whose weights train, beside the model that they were copied from.

    All other weights are the pipeline's own: what a second model would take is the trained part alone.

    Args:
        source: the model.
        names: of the weights, as an `Edit` names them.
        rank: train matrices of this rank beside weights of linear layers; norms and biases, of which there
            is no lower rank, train as they are.
        seed: of the first matrices.

    Attributes:
        model: the copy.
        rank: as given.

    Raises:
        ValueError: for no weights, and with `rank` for weights of other layers.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """

    def __init__(
        self, source: DiffusionModel, names: Sequence[str], *, rank: int | None = None, seed: int = 0
    ) -> None:
        if not names:
            raise ValueError("parameters: got none, expected weights that train")
        self.rank, self._source = rank, source
        mode: Mode = "fp32_master" if rank is None else "lora"
        trains_text = any(name.startswith(TEXT) for name in names)
        parts = trainable_parts(source, mode, train_text_encoder=trains_text)
        parts = {part: network for part, network in parts.items() if part == "unet" or _of(part, names)}
        model = copy.copy(source)
        model._device = source.device  # diffusers walks through all modules to tell
        model.pipe = copy.copy(source.pipe)
        draws = Draws([f"{seed}/part"], source.device)
        found: dict[str, nn.Parameter] = {}
        for part, network in parts.items():
            whole = own = set(_of(part, names))
            if rank:
                whole = {name for name, weight in network.named_parameters() if weight.ndim < 2} & own
            copied = _copied(network, whole)
            if own - whole:
                _add_lora(copied, [name.removesuffix(".weight") for name in own - whole], rank or 0, draws)
            setattr(model.pipe, part, copied)
            for path, weight in copied.named_parameters():
                key = path.replace(".base_layer.", ".")  # of a layer that has a LoRA beside it
                if key in whole or "lora_" in key:
                    found[key if part == "unet" else f"{part}.{key}"] = weight.requires_grad_()
        super().__init__(model, found, trains_text=trains_text, wide=True)

    @torch.no_grad()
    def changes(self, values: Sequence[Tensor] | None = None) -> dict[str, Change]:
        """What was learned, by the name of the weight; weights that did not move are left out.

        values: in the place of `masters`.
        """
        values = self.masters if values is None else values
        named = dict(zip(self.weights, (value.detach().float().cpu() for value in values), strict=True))
        found: dict[str, Change] = {}
        before = weights(self._source)
        for name, up in named.items():
            if name in before:
                delta = up - before[name].detach().float().cpu()
                if bool(delta.any()):
                    found[name] = Shifted(delta.contiguous())
            elif ".lora_B." in name:
                layer = name.partition(".lora_B.")[0]
                down = named[name.replace(".lora_B.", ".lora_A.")]
                if bool(up.any()):  # alpha is the rank
                    found[f"{layer}.weight"] = Added(up.flatten(1).contiguous(), down.flatten(1).contiguous())
        return found


def _of(part: str, names: Sequence[str]) -> list[str]:
    """Those of a network, as it names them itself."""
    if part == "unet":
        return [name for name in names if not name.startswith(TEXT)]
    return [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]


def check_moves(
    weights: Sequence[Tensor], learning_rate: float, steps: int, otherwise: str = "rank=4"
) -> None:
    """Make sure that what is learned survives being written in the pipeline's dtype.

    AdamW moves a weight by at most about the learning rate in a step. In a dtype of precision u, weights near
    w are u 2^floor(log2 |w|) apart, and w moves by half of that.

    Raises:
        ValueError: if more than half of them would not move; `otherwise` is what would do.
    """
    farthest, stuck, total = learning_rate * steps, 0, sum(map(torch.numel, weights))
    for weight in weights:
        size = weight.detach().abs().float()
        mantissa = torch.frexp(size).mantissa  # |w| / mantissa = 2^(floor(log2 |w|) + 1)
        stuck += int((torch.finfo(weight.dtype).eps / 4 * size > farthest * mantissa).sum())
    if stuck > 0.5 * total:
        dtype = str(weights[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"learning_rate: got {learning_rate:g}, at which {stuck / total:.0%} of the weights, in {dtype}, "
            f"do not move in {steps} steps; expected a larger one, a float32 pipeline, or {otherwise}"
        )


def trainable_parts(
    model: DiffusionModel, mode: Mode, *, train_text_encoder: bool, name: str = "mode"
) -> dict[str, nn.Module]:
    """By name the networks that a student of `mode` (the argument `name`) has copies of, not compiled.

    Raises:
        TypeError: if `train_text_encoder` is no bool.
        ValueError: for another mode.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"{name}: got {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if not isinstance(train_text_encoder, bool):  # "no" would be true
        raise TypeError(f"train_text_encoder: got {train_text_encoder!r}, expected a bool")
    parts = [model.unet, *(model.text_encoders if train_text_encoder else ())]
    named = {id(part): name for name, part in model.pipe.components.items()}
    found = {named[id(part)]: getattr(part, "_orig_mod", part) for part in parts}
    for part_name, part in found.items():
        if reason := _untrainable(part):
            raise UnsupportedModelError(f"{part_name}: {reason}")
    return found


def with_copies(source: DiffusionModel, parts: Mapping[str, nn.Module], mode: Mode) -> DiffusionModel:
    """The model with frozen copies in the place of some networks: with weights of their own, or with "lora"
    ones that read those of the original."""
    model = copy.copy(source)
    model._device = source.device  # diffusers walks through all modules to tell
    model.pipe = copy.copy(source.pipe)
    for name, part in parts.items():
        own = () if mode == "lora" else dict(part.named_parameters())
        setattr(model.pipe, name, _copied(part, own, torch.bfloat16 if mode == "bf16_faithful" else None))
    return model


def _copied(network: nn.Module, own: Collection[str], dtype: torch.dtype | None = None) -> Any:
    """A frozen copy that has some weights of its own, in `dtype`, and reads all others from the network."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for name, weight in network.named_parameters():
        data = weight.detach()
        memo[id(weight)] = nn.Parameter(
            data.to(dtype or data.dtype, copy=True) if name in own else data, requires_grad=False
        )
    return copy.deepcopy(network, memo).eval()


def _add_lora(network: Any, targets: Sequence[str], rank: int, draws: Draws) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay where they are
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    for name, weight in network.named_parameters():
        if "lora_" in name:  # which is made as narrow as the rest
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        if "lora_A" in name:
            weight.data.copy_(draws.normal([0], name, 0, weight.shape)[0] / rank)


def _untrainable(network: nn.Module) -> str | None:
    """Why the weights of a network cannot be copied and trained."""
    if hasattr(network, "exported_from"):
        return "it runs in ONNX Runtime; load it with backend='torch'"
    for module in network.modules():
        if hasattr(module, "base_layer"):
            return "a LoRA adapter is attached; fuse it, then call unload_lora_weights()"
        if hasattr(module, "_hf_hook"):
            return "it is offloaded; expected a pipeline that is wholly on its device"
    for name, weight in network.named_parameters():
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            return f"{name} is a {weight.dtype} {type(weight.data).__name__}, expected float16 or wider"
    return None
