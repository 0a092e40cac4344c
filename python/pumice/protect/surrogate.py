"""A copy of a model that learns while pictures are protected against it; the model itself stays as it is.

::

    surrogate = Surrogate(model, "lora")
    subject = Examples(surrogate.model, pictures, "a photo of sks person")        # protect/dreambooth.py
    embeds = surrogate.embeds("a photo of sks person")     # the same tensors, up to date whatever follows
    with surrogate.scratch():                              # undone at its end, to the bit
        surrogate.train([subject, *of_its_class], 3)
        pgd.ascend([an objective of surrogate.model and embeds], 6, step_size)
    state = surrogate.snapshot()
    surrogate.restore(state)

Weights and embeddings change in place, so what was captured as a CUDA graph goes on with the new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pumice import models
from pumice.models import DiffusionModel, PromptEmbeds, UnsupportedModelError
from pumice.models.arguments import check_scale, checked_prompt, first_seed
from pumice.models.draws import Draws
from pumice.models.examples import Examples
from pumice.models.freezing import untrainable

from .arguments import warn

Mode = Literal["fp32_master", "bf16_faithful", "lora"]

_LR = {"fp32_master": 5e-7, "bf16_faithful": 5e-7, "lora": 5e-4}
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_FLOAT16_SCALE = 2.0**10  # else small gradients vanish in float16


class Surrogate:
    """A denoiser, and text encoders, that train beside the model that they were copied from.

    Args:
        pipe: a pipeline or a `DiffusionModel`.
        mode: what is trained.

            - "fp32_master": all weights, in float32; the networks compute in the pipeline's dtype.
            - "bf16_faithful": all weights, in bfloat16, as the released code of Anti-DreamBooth and MetaCloak
              does it. At their learning rate rounding swallows the update of 99 % of the weights.
            - "lora": matrices of low rank at the denoiser's attention projections; all other weights are the
              pipeline's own, and text encoders stay as they are.
        lr: AdamW's. Default 5e-7, or 5e-4 for "lora", both of Anti-DreamBooth's code (arXiv:2303.15433).
        train_text_encoder: when all weights are trained, those of text encoders, too.
        rank: of "lora". Default 4, of the same code.
        seed: of all random numbers; of a list, as protections take it, the first.

    Attributes:
        model: the copy. Its autoencoder is the pipeline's.

    Memory on the device, in bytes for each trained weight: 4, or 6 with "fp32_master" on networks in 16 bits;
    4 more inside `scratch`; 12 more while training. With "bf16_faithful" 2, 2 and 6.

    Raises:
        ValueError: for another mode, or a learning rate out of range.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """

    def __init__(
        self,
        pipe: Any,
        mode: Mode = "fp32_master",
        *,
        lr: float | None = None,
        train_text_encoder: bool = True,
        rank: int = 4,
        seed: int | Sequence[int] = 0,
    ) -> None:
        source = models.load(pipe)
        copied = trainable_parts(source, mode, train_text_encoder=train_text_encoder)
        self._mode, self._seed = mode, first_seed(seed)
        self._lr = _LR[mode] if lr is None else lr
        check_scale("lr", self._lr)
        self._trains_text = train_text_encoder and mode != "lora"
        self.model = copy.copy(source)
        self.model.pipe = copy.copy(source.pipe)
        for name, part in copied.items():
            setattr(self.model.pipe, name, self._copied(part))
        if mode == "lora":
            self._add_lora(rank)
        networks = (self.model.unet, *(self.model.text_encoders if self._trains_text else ()))
        self._weights: list[Tensor] = [
            weight.requires_grad_()
            for network in networks
            for name, weight in network.named_parameters()
            if mode != "lora" or "lora_" in name
        ]
        # what the optimizer moves: the weights themselves, or wider copies
        self._masters = [
            weight.detach().float() if mode == "fp32_master" and weight.element_size() < 4 else weight
            for weight in self._weights
        ]
        self._scale = _FLOAT16_SCALE if self.model.dtype == torch.float16 else 1.0
        self._embeds: dict[str, PromptEmbeds] = {}
        self._steps = 0  # of all trainings, so that each step has random numbers of its own
        self._known_to_move = mode == "bf16_faithful"  # of which nobody expects it

    def embeds(self, prompt: str) -> PromptEmbeds:
        """The encoded prompt; what text encoders learn later reaches the very same tensors."""
        if prompt not in self._embeds:
            self._embeds[prompt] = checked_prompt(self.model, prompt)
        return self._embeds[prompt]

    def train(
        self,
        examples: Sequence[Examples],
        steps: int,
        *,
        batch_size: int = 1,
        after: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Take steps of AdamW down the denoising loss of DreamBooth (Ruiz et al., arXiv:2208.12242).

        ::

            L = sum over sets  weight * mean |prediction(z_t, t, c) - target|^2

        with a sample z of the posterior, a timestep and a noise for each picture and step. As in the code of
        Anti-DreamBooth, step k sees the pictures k * batch_size, ... modulo their number, so that three steps
        never meet a fourth, and every call begins with moments of zero; betas 0.9 and 0.999, weight decay
        0.01. Gradients are not clipped: that code hands an exhausted iterator to the clipping.

        Args:
            examples: the subject's, and its class's.
            steps: how many.
            batch_size: pictures of each set in a step.
            after: called with 1, 2, ... after each step.
        """
        before = None if self._known_to_move else [weight.detach().clone() for weight in self._weights]
        optimizer = torch.optim.AdamW(
            self._masters, self._lr, betas=(0.9, 0.999), weight_decay=1e-2, fused=True
        )
        seeds = [f"{self._seed}/surrogate/{row}" for row in range(len(examples) * batch_size)]
        draws = Draws(seeds, self.model.device)
        try:
            for step in range(steps):
                for rows in self._rows(examples, range(step * batch_size, (step + 1) * batch_size), draws):
                    self._backward(rows, draws)
                self._move(optimizer)
                self._steps += 1
                after(step + 1)
        finally:
            for tensor in (*self._weights, *self._masters):
                tensor.grad = None
        self._encode_again()
        if before is not None and steps:
            self._known_to_move = _relative_change(before, self._weights) > torch.finfo(torch.float32).eps
            if not self._known_to_move:
                warn(f"lr: {self._lr:g} moves no weight in {self.model.dtype}, the surrogate learned nothing")

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is trained inside the block is undone at its end, to the bit."""
        state = [master.detach().clone() for master in self._masters]
        try:
            yield
        finally:
            self.restore(state)

    def snapshot(self) -> list[Tensor]:
        """All that was trained, as a copy on the CPU."""
        return [master.detach().to("cpu", copy=True) for master in self._masters]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        with torch.no_grad():
            for master, kept in zip(self._masters, snapshot, strict=True):
                master.copy_(kept)
        self._publish()
        self._encode_again()

    def _copied(self, network: nn.Module) -> nn.Module:
        """A copy with weights of its own, or with "lora" one that reads those of the original."""
        memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
        for weight in network.parameters():
            dtype = torch.bfloat16 if self._mode == "bf16_faithful" else weight.dtype
            data = weight.detach()
            memo[id(weight)] = nn.Parameter(
                data if self._mode == "lora" else data.to(dtype, copy=True), requires_grad=False
            )
        return copy.deepcopy(network, memo).eval()

    def _add_lora(self, rank: int) -> None:
        from peft import LoraConfig

        unet, draws = self.model.unet, Draws([f"{self._seed}/surrogate"], self.model.device)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay where they are
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_LORA_TARGETS))
        for name, weight in unet.named_parameters():
            if "lora_" in name:  # which diffusers makes as narrow as the rest
                weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            if "lora_A" in name:
                weight.data.copy_(draws.normal([0], name, 0, weight.shape)[0] / rank)

    def _rows(self, examples: Sequence[Examples], numbers: range, draws: Draws) -> list[list[_Row]]:
        """What a step learns, by the shape of latents."""
        found: dict[torch.Size, list[_Row]] = {}
        for part, each in enumerate(examples):
            for slot, number in enumerate(numbers):
                row = part * len(numbers) + slot
                z = each.latents(number % len(each), draws, row, self._steps)
                found.setdefault(z.shape, []).append(_Row(row, z, each.prompt, each.weight / len(numbers)))
        return list(found.values())

    @torch.enable_grad()
    def _backward(self, rows: Sequence[_Row], draws: Draws) -> None:
        model, of = self.model, [row.number for row in rows]
        z = torch.stack([row.latents for row in rows])
        t = draws.integers(of, "timestep", self._steps, model.schedule.num_train_timesteps)
        noise = draws.normal(of, "noise", self._steps, z.shape[1:])
        prompts = [row.prompt for row in rows]
        if self._trains_text:
            embeds = model.encode_prompt(prompts)
        else:
            embeds = PromptEmbeds.cat([self.embeds(prompt) for prompt in prompts])
        output = model.predict(model.add_noise(z, noise, t), t, embeds)
        error = (output.to(z.dtype) - model.schedule.target(z, noise, t)).square().flatten(1).mean(1)
        loss = sum(row.weight * each for row, each in zip(rows, error, strict=True))
        (loss * self._scale).backward()

    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        for master, weight in zip(self._masters, self._weights, strict=True):
            if weight.grad is None:
                continue
            gradient, weight.grad = weight.grad.to(master.dtype), None
            if self._scale != 1:  # what overflowed moves nothing
                gradient = (gradient / self._scale).nan_to_num(0, 0, 0)
            master.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for master, weight in zip(self._masters, self._weights, strict=True):
            if master is not weight:
                weight.copy_(master)

    @torch.no_grad()
    def _encode_again(self) -> None:
        if not self._trains_text:
            return
        for prompt, kept in self._embeds.items():
            now = checked_prompt(self.model, prompt)
            kept.embeds.copy_(now.embeds)
            if kept.pooled is not None and now.pooled is not None:
                kept.pooled.copy_(now.pooled)


class _Row(NamedTuple):
    number: int
    latents: Tensor
    prompt: str
    weight: float


@torch.no_grad()
def _relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    changes = [(new.float() - old.float()).norm() for old, new in zip(before, after, strict=True)]
    return float(torch.stack(changes).norm() / torch.stack([old.float().norm() for old in before]).norm())


def trainable_parts(model: DiffusionModel, mode: Mode, *, train_text_encoder: bool) -> dict[str, nn.Module]:
    """By name the networks that a surrogate of `mode` has copies of, not compiled.

    Raises:
        ValueError: for another mode.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"surrogate: got {mode!r}, expected one of {', '.join(get_args(Mode))}")
    parts = [model.unet, *(model.text_encoders if train_text_encoder and mode != "lora" else ())]
    found = {
        name: getattr(part, "_orig_mod", part)
        for name, part in model.pipe.components.items()
        if any(part is one for one in parts)
    }
    for name, part in found.items():
        if reason := untrainable(part):
            raise UnsupportedModelError(f"{name}: {reason}")
    return found
