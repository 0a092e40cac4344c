"""CAAT (Xu et al., CVPR 2024): pictures that climb the denoising loss while cross-attention descends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pumice.models import DiffusionModel
from pumice.models.arguments import check_budget, check_scale, checked_count, checked_prompt
from pumice.models.draws import Draws

from .latent import LatentObjective
from .pgd import PGD, Options


@torch.inference_mode(False)
def caat(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of a person",
    *,
    lr: float = 1e-5,
    eps: float = 0.025,
    step_size: float = 0.0025,
    steps: int = 250,
    random_start: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Perturb pictures against a model that learns them with its cross-attention on the way.

    ::

        min_{K,V} max_x L(x)        L(x) = E_{t, epsilon} |epsilon_theta(z_t, t, c) - epsilon|^2
                                    z = a sample of E(x), v for models that predict v

    Each step passes encoder and denoiser once, forward and backward (Xu et al., arXiv:2404.15081): the
    pictures go a PGD step up the loss, and to_k and to_v of all cross-attention layers an AdamW step down its
    mean over all pictures. So pictures that belong together go together; the result does not depend on
    `batch_size`. K and V are float32 copies, which the network reads in its own dtype; the pipeline's own
    tensors are never written to and are back in place at the end.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, each of which learns; their gradients are summed.
        prompt: c, what the pictures are called. Default that of the authors' script.
        lr: of AdamW (betas 0.9 and 0.999, weight decay 0.01). Default 1e-5, of the script.
        eps: the largest change of a value. Default 0.025, the script's 0.05 of pictures in [-1, 1]; the
            code's own default is twice that.
        step_size: of a step. Default 0.0025, the script's 0.005 of pictures in [-1, 1].
        steps: default 250, of the script.
        random_start: default no, as in the code.
        options: `protect.Options`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Left out of the authors' code: flips and crops (pass `transforms`), and prior preservation, which also
    doubles lr.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: if to_k and to_v are fused, quantised, offloaded or have a LoRA adapter.
    """
    check_scale("lr", lr)
    steps = checked_count("steps", steps)
    check_budget("step_size", step_size)
    pgd = PGD(images, pipe, eps=eps, random_start=random_start, **options)
    with ExitStack() as exits:
        objectives = [
            _Adversaries(model, prompt, exits.enter_context(_copied(model)), lr, len(pgd.pictures.working))
            for model in pgd.models
        ]
        pgd.ascend(objectives, steps, step_size)
    return pgd.finish()


@contextmanager
def _copied(model: DiffusionModel) -> Iterator[list[Tensor]]:
    """Inside the block to_k and to_v have weights of their own; the caller's come back untouched."""
    model.check_editable()
    linears = [linear for layer in model.cross_attention.values() for linear in (layer.to_k, layer.to_v)]
    weights = [linear.weight for linear in linears]
    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight.detach().clone())
        yield [linear.weight for linear in linears]
    finally:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight


class _Adversaries(LatentObjective):
    """The denoising loss, climbed by pictures and descended by `weights`: one backward pass for both."""

    def __init__(
        self, model: DiffusionModel, prompt: str, weights: list[Tensor], lr: float, pictures: int
    ) -> None:
        super().__init__(model, self._denoise, sample=True, noised=True)
        self._embeds = checked_prompt(model, prompt)
        self._weights, self._pictures = weights, pictures
        # steps of lr would be lost beside weights in half precision
        self._masters = [_at_least_float32(weight) for weight in weights]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr)
        self._gradients = [torch.zeros_like(master) for master in self._masters]  # of the last pass
        # of the passes of this step, by the pictures' size, and with which picture they begin
        self._sums: dict[tuple[int, int], tuple[int, list[Tensor]]] = {}
        self._last: tuple[int, tuple[int, int]] | None = None

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """As of any objective; being called before each pass, the place to use what the last one found."""
        if self._last is not None:
            self._add(self._last[1])
            if step != self._last[0]:
                self._learn()
        first, _ = self._sums.get(size, (pictures[0], None))
        if pictures[0] == first:  # again, if the pass ran out of memory: nothing counts twice
            self._sums[size] = first, [torch.zeros_like(master) for master in self._masters]
        self._last = step, size
        return super().inputs(pictures, step, size, draws, timesteps)

    def _denoise(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        for weight in self._weights:
            weight.requires_grad_()  # the loop around froze everything
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            output = self.model.predict(self.model.add_noise(z, noise, t), t, self._embeds)
            loss = (output.to(z.dtype) - self.model.schedule.target(z, noise, t)).square().sum()
        dz, *found = torch.autograd.grad(loss, [z, *self._weights])
        for mine, gradient in zip(self._gradients, found, strict=True):
            mine.copy_(gradient)
        return dz

    def _add(self, size: tuple[int, int]) -> None:
        """The last pass's part of the gradient of the mean over pictures and values."""
        share = 1 / (self._pictures * math.prod(self.model.latent_shape(*size)))
        for total, gradient in zip(self._sums[size][1], self._gradients, strict=True):
            total.add_(gradient, alpha=share)

    def _learn(self) -> None:
        for index, master in enumerate(self._masters):
            gradient = torch.stack([sums[index] for _, sums in self._sums.values()]).sum(0)
            master.grad = gradient.nan_to_num(0, 0, 0)  # float16 may overflow: such an entry waits
        self._optimizer.step()
        self._sums.clear()
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)  # in place, where a CUDA graph reads it


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
