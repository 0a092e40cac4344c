"""The engine that all methods share: projected gradient steps on pictures of any number and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import ops
from pumice.models import RowBudget
from pumice.models.arguments import check_budget, checked_count, checked_seeds
from pumice.models.draws import Draws
from pumice.models.graph import Graphed
from pumice.ops.pgd_step import Norm

from .arguments import check_autoencoder, checked_models, warn
from .fitting import Size
from .pictures import Pictures
from .transforms import Transform

ROWS = 8  # of a pass: running out of a CPU's memory cannot be caught


class Options(TypedDict, total=False):
    """What every method takes beside its own arguments.

    mask: where pictures may change, 1 or True there: (H, W), (1, H, W), (B, 1, H, W), PIL images, or a list
        of pictures' own, at the pictures' own size; by default everywhere.
    transforms: of `protect.transforms`, in order; each step climbs the loss of pictures that went through
        them, with random numbers of its own (expectation over transformation, arXiv:1707.07397).
    timesteps: for each picture the timesteps that are drawn from, such as `protect.select_timesteps` finds;
        by default all of the model.
    size: how pictures that are no tensors meet the model (`protect.pictures`). Default "resize".
    seed: of picture 0, one more for each further picture; or a list with one for each. Default 0.
    batch_size: pictures of a pass; halved on out-of-memory. Default 8, fewer where a picture takes several
        rows of a pass; `protect.plan` tells what fits a memory.
    recompute: pass the encoder forward twice, for less memory. Default False.
    progress: show a bar. Default False.
    """

    mask: Any
    transforms: Sequence[Transform]
    timesteps: Sequence[Tensor] | None
    size: Size
    seed: int | Sequence[int]
    batch_size: int | None
    recompute: bool
    progress: bool


class Objective(Protocol):
    """A loss that pictures climb; `noised` if its steps have timesteps."""

    noised: bool

    def inputs(
        self,
        pictures: Sequence[int],
        step: int,
        size: tuple[int, int],
        draws: Draws,
        timesteps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]: ...

    def gradient(self, images: Tensor, *inputs: Tensor, recompute: bool = False) -> Tensor: ...


@dataclass
class _Stack:
    """Pictures of one size, and how far they are."""

    numbers: list[int]
    clean: Tensor
    now: Tensor
    mask: Tensor


class PGD:
    """Pictures on their way up a loss inside their budget.

    ::

        x <- clamp(x0 + clamp(x + step_size * sign(g) - x0, -eps, eps), 0, 1)       g = dloss/dx(x)

    (Madry et al., arXiv:1706.06083; `ops.pgd_step`.) With a mask the loss is that of x0 + mask * (x - x0).
    Pictures of one size go through the networks together, at most `batch_size` in a pass, and each result is
    that of the picture alone. Several models meet the same random numbers.

    Args:
        images: as of the methods.
        pipe: the model or models, whose losses are summed.
        eps: the budget, in the unit of the pictures.
        random_start: begin at a uniform draw from the ball instead of the picture.
        norm: of the ball.
        rows: of a pass for each picture.
        options: `Options`.

    Attributes:
        models: of `pipe`.
        pictures: of `images`.
        steps: done so far.
    """

    def __init__(
        self,
        images: Any,
        pipe: Any,
        *,
        eps: float,
        random_start: bool,
        norm: Norm = "linf",
        rows: int = 1,
        mask: Any = None,
        transforms: Sequence[Transform] = (),
        timesteps: Sequence[Tensor] | None = None,
        size: Size = "resize",
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        recompute: bool = False,
        progress: bool = False,
    ) -> None:
        if norm == "linf":
            check_budget("eps", eps)
        self.models = checked_models(pipe)
        self.device = self.models[0].device
        self.pictures = Pictures(images, self.models, size=size, mask=mask)
        if eps == 0:
            warn("eps: got 0, pictures stay as they are")
        self.eps, self.norm, self.steps = eps, norm, 0
        seeds = checked_seeds(seed, self.pictures.given)
        names = [f"{seeds[of]}/{part}" for of, part in self.pictures.parts]
        self.draws = Draws(names, self.device)
        self.timesteps = self._checked_timesteps(timesteps)
        if not isinstance(transforms, list | tuple) or not all(hasattr(each, "draw") for each in transforms):
            raise TypeError(f"transforms: got {transforms!r}, expected a list of `protect.transforms`")
        self.transforms, self.recompute, self.progress = tuple(transforms), recompute, progress
        if batch_size is None:
            batch_size = max(1, ROWS // rows)
        self._budget = RowBudget(min(checked_count("batch_size", batch_size), len(self.pictures.working)))
        self._masked = mask is not None or any(bool((mask < 1).any()) for mask in self.pictures.masks)
        self._stacks = list(self._stacked(random_start))
        for model in self.models:
            check_autoencoder(model, self.pictures.working)
        self._graphs: dict[tuple[Objective, ...], Graphed] = {}

    @property
    def images(self) -> list[Tensor]:
        """The pictures as they are now, (3, h, w) each, in the order of `pictures.working`."""
        if not self._masked:
            return self.state
        pairs = zip(self.state, self.pictures.working, self.pictures.masks, strict=True)
        return [clean.to(x).lerp(x, mask.to(x)) for x, clean, mask in pairs]

    @property
    def state(self) -> list[Tensor]:
        """`images` before the mask, what steps go on from."""
        found = {n: x for stack in self._stacks for n, x in zip(stack.numbers, stack.now, strict=True)}
        return [found[number] for number in range(len(found))]

    @state.setter
    def state(self, images: Sequence[Tensor]) -> None:
        for stack in self._stacks:
            stack.now = torch.stack([images[number] for number in stack.numbers])

    def ascend(
        self,
        objectives: Sequence[Objective],
        steps: int,
        step_size: float | Callable[[int], float],
        *,
        bar: tqdm[Any] | None = None,
    ) -> None:
        """Take steps up the sum of the objectives.

        Args:
            objectives: one for each model, usually.
            steps: how many.
            step_size: in the unit of the pictures; or a function of 0, ..., steps - 1. Negative to descend.
            bar: of a longer run that this is a part of, moved by one a step.
        """
        for length in [step_size(step) for step in range(steps)] if callable(step_size) else [step_size]:
            if self.norm == "linf":
                check_budget("step_size", abs(length))
        if self.eps == 0:
            return
        if self.timesteps is not None and not any(objective.noised for objective in objectives):
            raise ValueError("timesteps: got some, expected none: no step of this method has a timestep")
        work = self._graphs.setdefault(tuple(objectives), Graphed(self._step(objectives)))
        with self._frozen(), ExitStack() as exits:
            if bar is None:
                bar = exits.enter_context(
                    tqdm(total=steps, unit="step", leave=None, disable=not self.progress)
                )
            for step in range(steps):
                length = step_size(step) if callable(step_size) else step_size
                for stack in self._stacks:
                    stack.now = self._budget.run(partial(self._stepped, work, objectives, stack, length))
                self.steps += 1
                bar.update()
                if self.device.type == "cpu" or step == steps - 1:
                    self._check_finite()

    def finish(self) -> Any:
        """The pictures in the form in which they came."""
        return self.pictures.finish(self.state, self.eps, self.norm)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with ExitStack() as exits:
            for model in self.models:
                exits.enter_context(model.frozen(data_gradient=True))
            yield

    def _stepped(
        self, work: Graphed, objectives: Sequence[Objective], stack: _Stack, length: float, rows: int
    ) -> Tensor:
        size = (stack.now.shape[2], stack.now.shape[3])
        done = []
        for first in range(0, len(stack.numbers), rows):
            part = slice(first, first + rows)
            numbers = stack.numbers[part]
            lengths = torch.full((len(numbers),), length, device=self.device)
            # a step number of its own for each, or two of a kind would draw the same
            first_draw = self.steps * len(self.transforms)
            drawn = tuple(
                transform.draw(numbers, number, self.draws)
                for number, transform in enumerate(self.transforms, first_draw)
            )
            inputs = tuple(
                each.inputs(numbers, self.steps, size, self.draws, self.timesteps) for each in objectives
            )
            done.append(work(stack.now[part], stack.clean[part], stack.mask[part], lengths, drawn, inputs))
        return torch.cat(done)

    def _step(self, objectives: Sequence[Objective]) -> Callable[..., Tensor]:
        """What a step does to some pictures, as work that a CUDA graph can hold."""
        return partial(
            _step,
            tuple(objectives),
            self.transforms,
            masked=self._masked,
            recompute=self.recompute,
            eps=self.eps,
            norm=self.norm,
        )

    def _check_finite(self) -> None:
        """A gradient that is not finite leaves its picture so; asked once, where that makes a GPU wait."""
        for stack in self._stacks:
            finite = stack.now.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                given, _ = self.pictures.parts[stack.numbers[finite.index(False)]]
                dtype = self.models[0].dtype
                raise ValueError(
                    f"images[{given}]: its gradient is not finite in {dtype}; a wider dtype may do"
                )

    def _stacked(self, random_start: bool) -> Iterator[_Stack]:
        by_size: dict[torch.Size, list[int]] = {}
        for number, picture in enumerate(self.pictures.working):
            by_size.setdefault(picture.shape, []).append(number)
        for numbers in by_size.values():
            clean = torch.stack([self.pictures.working[n] for n in numbers]).to(self.device)
            mask = torch.stack([self.pictures.masks[n] for n in numbers]).to(self.device)
            now = clean
            if random_start:
                start = self.draws.uniform(numbers, "start", 0, clean.shape[1:]) * 2 - 1
                now = (clean + self.eps * start).clamp(0, 1)
            yield _Stack(numbers, clean, now, mask)

    def _checked_timesteps(self, timesteps: Sequence[Tensor] | None) -> list[Tensor] | None:
        if timesteps is None:
            return None
        if len(timesteps) != self.pictures.given:
            raise ValueError(
                f"timesteps: got {len(timesteps)}, expected one list for each of {self.pictures.given} "
                "pictures"
            )
        last = min(model.schedule.num_train_timesteps for model in self.models) - 1
        found = [torch.as_tensor(each) for each in timesteps]
        for each in found:
            if each.ndim != 1 or not len(each) or each.min() < 0 or each.max() > last:
                raise ValueError(f"timesteps: got {each.tolist()}, expected some of 0 to {last}")
        return [found[of].to(self.device) for of, _ in self.pictures.parts]


def _step(
    objectives: Sequence[Objective],
    transforms: Sequence[Transform],
    x: Tensor,
    clean: Tensor,
    mask: Tensor,
    length: Tensor,
    drawn: tuple[tuple[Tensor, ...], ...],
    inputs: tuple[tuple[Tensor, ...], ...],
    *,
    masked: bool,
    recompute: bool,
    eps: float,
    norm: Norm,
) -> Tensor:
    """Pictures after one step; those whose gradient is not finite are no longer finite themselves."""
    seen = leaf = (clean.lerp(x, mask) if masked else x.detach()).requires_grad_()
    with torch.enable_grad():
        for transform, numbers in zip(transforms, drawn, strict=True):
            seen = transform(seen, *numbers)
    gradient = torch.zeros_like(x)
    for objective, given in zip(objectives, inputs, strict=True):
        gradient += objective.gradient(seen, *given, recompute=recompute)
    if transforms:
        (gradient,) = torch.autograd.grad(seen, leaf, gradient)
    trouble = 0 * gradient.sum((1, 2, 3), keepdim=True)  # a sign of NaN is 0, and nobody would know
    return ops.pgd_step(x, gradient * mask, clean, step_size=length, eps=eps, norm=norm) + trouble
