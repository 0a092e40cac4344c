"""SimAC (Wang et al., CVPR 2024): ASPL at the timesteps that reach a picture, and how these are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.models import DiffusionModel, PromptEmbeds
from pumice.models.arguments import check_budget, checked_count, checked_prompt
from pumice.models.draws import Draws
from pumice.training.student import trainable_parts

from .arguments import checked_models
from .aspl import easpl
from .latent import denoising_gradient
from .learner import SurrogateOptions
from .pgd import PGD, Options


def simac(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    class_prompt: str = "a photo of person",
    *,
    clean_images: Any = None,
    max_train_steps: int = 50,
    max_f_train_steps: int = 3,
    max_adv_train_steps: int = 6,
    eps: float = 8 / 255,
    step_size: float = 0.0025,
    **options: Unpack[SurrogateOptions],
) -> Any:
    """Perturb pictures of a subject by `aspl`, at the timesteps that `select_timesteps` finds for each.

    (Wang et al., arXiv:2312.07865.) The timesteps are selected against the model as it is, once.

    Args:
        images, prompt, class_prompt, clean_images, max_train_steps, max_f_train_steps, max_adv_train_steps:
            as of `aspl`.
        pipe: a pipeline, a `DiffusionModel`, or several, as of `easpl`.
        eps: the largest change of a value. Default 8/255, the authors' 16/255 of pictures in [-1, 1].
        step_size: of a step. Default 0.0025, their 0.005 of pictures in [-1, 1].
        options: `protect.SurrogateOptions`.

    Returns:
        The perturbed pictures, in the form in which they came.

    Left out: the paper's loss between features of perturbed and clean pictures. In the released code it is
    added as a plain number and so has no gradient.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    mode, text = options.get("surrogate", "fp32_master"), options.get("train_text_encoder", True)
    for model in checked_models(pipe):  # before the work of selecting
        trainable_parts(model, mode, train_text_encoder=text and mode != "lora", name="surrogate")
    shared = cast(Options, {key: value for key, value in options.items() if key in Options.__annotations__})
    options["timesteps"] = select_timesteps(images, pipe, prompt, eps=eps, step_size=step_size, **shared)
    return easpl(
        images,
        pipe,
        prompt,
        class_prompt,
        clean_images=clean_images,
        max_train_steps=max_train_steps,
        max_f_train_steps=max_f_train_steps,
        max_adv_train_steps=max_adv_train_steps,
        eps=eps,
        step_size=step_size,
        **options,
    )


@torch.inference_mode(False)
def select_timesteps(
    images: Any,
    pipe: Any,
    prompt: str = "a photo of sks person",
    *,
    eps: float = 8 / 255,
    step_size: float = 0.0025,
    rounds: int = 50,
    candidates: int = 5,
    window: int = 20,
    remaining: int = 100,
    **options: Unpack[Options],
) -> list[Tensor]:
    """Find the timesteps whose gradients reach a picture, greedily: what `timesteps=` of any method takes.

    ::

        s(t) = sum |dL_t/dx|        L_t(x) = |epsilon_theta(z_t, t, c) - epsilon|^2
                                    z = a sample of E(x)

    In each round `candidates` timesteps are drawn from those that are allowed, each with noise of its own.
    Those within `window` of the one where s is smallest are allowed no more, and the picture takes one PGD
    step up the loss of the one where s is largest. A picture is done when at most `remaining` are allowed
    (Wang et al., arXiv:2312.07865; the model's own loss, of v where it predicts v). The authors' code goes
    through pictures and candidates one after the other, here they are one batch.

    Args:
        images: (B, 3, H, W) in [0, 1], PIL images or paths.
        pipe: a pipeline, a `DiffusionModel`, or several, whose gradients are summed.
        prompt: c, what the pictures are called. Default that of the authors' code.
        eps: the largest change of a value on the way. Default 8/255, their 16/255 of pictures in [-1, 1].
        step_size: of a step. Default 0.0025, their 0.005 of pictures in [-1, 1].
        rounds: at most. Default 50, of the code.
        candidates: default 5, of the code.
        window: to each side. Default 20, of the code.
        remaining: default 100, of the code; more than 2 `window`, so that some are left.
        options: `protect.Options`; `timesteps` are those to begin with. `batch_size` counts pictures, each of
            which is `candidates` rows of a pass. s is that of pictures as `transforms` left them, and of the
            whole picture whatever the `mask`.

    Returns:
        For each picture its timesteps, (n,) int64 on the CPU, ascending.

    Raises:
        TypeError, ValueError: naming the argument that is out of range or not of its kind.
    """
    rounds, candidates = checked_count("rounds", rounds), checked_count("candidates", candidates)
    window, remaining = checked_count("window", window, least=0), checked_count("remaining", remaining)
    check_budget("step_size", step_size)
    if remaining <= 2 * window:
        raise ValueError(f"remaining: got {remaining}, expected more than 2 * window = {2 * window}")
    pgd = PGD(images, pipe, eps=eps, random_start=False, rows=candidates, **options)
    search = _Search(pgd, prompt, candidates)
    with tqdm(total=rounds, unit="round", disable=not pgd.progress) as bar:
        for _ in range(rounds):
            active = [each for each, allowed in enumerate(search.allowed) if len(allowed) > remaining]
            if not active or pgd.eps == 0:
                break
            search.draw(pgd.draws, pgd.steps)
            pgd.ascend([search], 1, step_size, bar=bar)
            search.forbid(active, window)
    return search.allowed


class _Search:
    """The denoising loss at several timesteps: its gradient is that of the timestep where it is largest.

    Attributes:
        allowed: timesteps of each given picture.
    """

    def __init__(self, pgd: PGD, prompt: str, candidates: int) -> None:
        self.noised = True
        self._models = [(model, checked_prompt(model, prompt)) for model in pgd.models]
        self._of = [of for of, _ in pgd.pictures.parts]
        # parts of one picture have their timesteps in common
        self._first = [self._of.index(given) for given in range(pgd.pictures.given)]
        last = min(model.schedule.num_train_timesteps for model in pgd.models)
        begin = [torch.arange(last)] * len(self._of) if pgd.timesteps is None else pgd.timesteps
        self.allowed = [begin[first].cpu().unique() for first in self._first]
        # s, written where a CUDA graph can write it
        self._sums = torch.zeros(len(self._of), candidates, device=pgd.device)
        self._drawn: list[Tensor] = []

    def draw(self, draws: Draws, step: int) -> None:
        """The candidates of a round, for each given picture."""
        share = draws.uniform(self._first, "candidates", step, self._sums.shape[1:]).cpu()
        self._drawn = [t[(u * len(t)).long()] for u, t in zip(share, self.allowed, strict=True)]

    def forbid(self, active: Sequence[int], window: int) -> None:
        """Take out of `allowed` what is near the candidate with the smallest gradient."""
        sums = torch.zeros(len(self.allowed), self._sums.shape[1])
        sums.index_add_(0, torch.tensor(self._of), self._sums.cpu())
        for each in active:
            worst = self._drawn[each][sums[each].argmin()]
            self.allowed[each] = self.allowed[each][(self.allowed[each] - worst).abs() > window]

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        t = torch.stack([self._drawn[self._of[picture]] for picture in pictures])
        found = [torch.tensor(pictures), t]
        for model, _ in self._models:
            shape = (t.shape[1], *model.latent_shape(*size))
            found += [
                draws.normal(pictures, what, step, shape)
                for what in ("candidate posterior", "candidate noise")
            ]
        return tuple(each.to(self._sums.device) for each in found)

    def gradient(self, images: Tensor, *inputs: Tensor, recompute: bool = False) -> Tensor:
        pictures, t, *noises = inputs
        rows = images.repeat_interleave(t.shape[1], dim=0)
        total = torch.zeros_like(rows)
        for (model, embeds), posterior, noise in zip(self._models, noises[::2], noises[1::2], strict=True):
            total += _gradient(model, embeds, rows, t, posterior, noise, recompute)
        gradients = total.unflatten(0, t.shape)
        sums = gradients.abs().sum((2, 3, 4))
        self._sums.index_copy_(0, pictures, sums)
        return gradients[torch.arange(len(t), device=t.device), sums.argmax(1)]


def _gradient(
    model: DiffusionModel,
    embeds: PromptEmbeds,
    rows: Tensor,
    t: Tensor,
    posterior: Tensor,
    noise: Tensor,
    recompute: bool,
) -> Tensor:
    def cotangent(z: Tensor) -> Tensor:
        return denoising_gradient(model, z, t.flatten(), noise.flatten(0, 1), embeds)

    return model.vjp(rows, cotangent, noise=posterior.flatten(0, 1), recompute=recompute)
