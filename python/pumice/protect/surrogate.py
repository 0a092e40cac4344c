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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pumice import models
from pumice.models import PromptEmbeds
from pumice.models.arguments import check_scale, checked_prompt, first_seed
from pumice.models.draws import Draws
from pumice.training.examples import Examples, Row, by_shape, denoising_loss
from pumice.training.student import LEARNING_RATES, Mode, Student, trainable_parts

from .arguments import warn


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
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
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
        self._mode, self._seed = mode, first_seed(seed)
        self._trains_text = mode != "lora" and train_text_encoder
        source = models.load(pipe)
        trainable_parts(source, mode, train_text_encoder=self._trains_text, name="surrogate")
        self._lr = LEARNING_RATES[mode] if lr is None else lr
        check_scale("lr", self._lr)
        self._student = Student(
            source, mode, train_text_encoder=self._trains_text, rank=rank, seed=self._seed
        )
        self.model = self._student.model
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

        In float16, what overflows moves nothing.

        Raises:
            ValueError: if weights are no longer finite.
        """
        before = (
            None
            if self._known_to_move
            else [weight.detach().clone() for weight in self._student.weights.values()]
        )
        optimizer = torch.optim.AdamW(
            self._student.masters, self._lr, betas=(0.9, 0.999), weight_decay=1e-2, fused=True
        )
        seeds = [f"{self._seed}/surrogate/{row}" for row in range(len(examples) * batch_size)]
        draws = Draws(seeds, self.model.device)
        try:
            for step in range(steps):
                for rows in self._rows(examples, range(step * batch_size, (step + 1) * batch_size), draws):
                    self._backward(rows, draws)
                self._student.gather()
                if self._student.scale != 1:
                    for master in self._student.masters:
                        if master.grad is not None:
                            master.grad.nan_to_num_(0, 0, 0)
                optimizer.step()
                optimizer.zero_grad()
                self._student.publish()
                self._steps += 1
                after(step + 1)
        finally:
            self._student.clear()
        finite = torch.stack([weight.isfinite().all() for weight in self._student.weights.values()])
        if not finite.all():
            raise ValueError(
                f"lr: got {self._lr:g}, at which weights are no longer finite; expected a smaller one"
            )
        self._encode_again()
        if before is not None and steps:
            change = _relative_change(before, list(self._student.weights.values()))
            self._known_to_move = change > torch.finfo(torch.float32).eps
            if not self._known_to_move:
                warn(f"lr: {self._lr:g} moves no weight in {self.model.dtype}, the surrogate learned nothing")

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is trained inside the block is undone at its end, to the bit."""
        state = [master.detach().clone() for master in self._student.masters]
        try:
            yield
        finally:
            self.restore(state)

    def snapshot(self) -> list[Tensor]:
        """All that was trained, as a copy on the CPU."""
        return [master.detach().to("cpu", copy=True) for master in self._student.masters]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Go back to a snapshot."""
        self._student.restore(snapshot)
        self._encode_again()

    def _rows(self, examples: Sequence[Examples], numbers: range, draws: Draws) -> list[list[Row]]:
        """What a step learns, by the shape of latents."""
        rows = []
        for part, each in enumerate(examples):
            for slot, number in enumerate(numbers):
                row = part * len(numbers) + slot
                z = each.latents(number % len(each), draws, row, self._steps)
                rows.append(Row(row, z, each.prompt, each.weight / len(numbers)))
        return by_shape(rows)

    @torch.enable_grad()
    def _backward(self, rows: Sequence[Row], draws: Draws) -> None:
        prompts = [row.prompt for row in rows]
        if self._trains_text:
            embeds = self.model.encode_prompt(prompts)
        else:
            embeds = PromptEmbeds.cat([self.embeds(prompt) for prompt in prompts])
        loss = denoising_loss(self.model, rows, embeds, draws, self._steps)
        (loss * self._student.scale).backward()

    @torch.no_grad()
    def _encode_again(self) -> None:
        if not self._trains_text:
            return
        for prompt, kept in self._embeds.items():
            now = checked_prompt(self.model, prompt)
            kept.embeds.copy_(now.embeds)
            if kept.pooled is not None and now.pooled is not None:
                kept.pooled.copy_(now.pooled)


@torch.no_grad()
def _relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    changes = [(new.float() - old.float()).norm() for old, new in zip(before, after, strict=True)]
    return float(torch.stack(changes).norm() / torch.stack([old.float().norm() for old in before]).norm())
