"""The way from noisy pictures back to clean ones, as a table: which timesteps, and what each step adds up.

::

    x_0   = alpha * picture + sigma * noise                                       noised to the first timestep
    x_i+1 = of_x x_i + of_x0 x0_i + of_last x0_i-1 + exp((v log_large + (1 - v) log_small) / 2) * noise_i

with x0_i what the denoiser makes of x_i, and v the share that a learned variance has of its range. Ancestral
steps, DPM-Solver++ and a single prediction of x0 are all of this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pumice.models import NoiseSchedule
from pumice.models.arguments import checked_count

Sampler = Literal["ddpm", "dpmsolver++", "one_shot"]
SOLVER_STEPS = 30
_RESPACED = 250


@dataclass(frozen=True, eq=False)
class Walk:
    """Steps from a timestep down to clean pictures.

    Attributes:
        timesteps: (n,) int64, descending.
        alpha, sigma: of the first timestep.
        coefficients: (n, 5) float64: of_x, of_x0, of_last, log_small, log_large.
        noisy: of each step, whether it adds noise.
    """

    timesteps: Tensor
    alpha: float
    sigma: float
    coefficients: Tensor
    noisy: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


def walk(
    schedule: NoiseSchedule,
    first: int,
    sampler: Sampler = "ddpm",
    num_inference_steps: int | None = None,
    *,
    name: str = "t",
) -> Walk:
    """The walk from timestep `first` by a sampler.

    Args:
        schedule: of the denoiser.
        first: the timestep that pictures are noised to.
        sampler: "ddpm" takes all timesteps down to 0 (arXiv:2006.11239), "dpmsolver++" a few, without noise
            (2M, arXiv:2211.01095), "one_shot" predicts x0 once.
        num_inference_steps: of "dpmsolver++"; default 30, or as many as there are timesteps.
        name: of the argument that `first` came from, for errors.

    Raises:
        ValueError: naming the argument.
    """
    last = schedule.num_train_timesteps - 1
    if not 0 <= first <= last:
        raise ValueError(f"{name}: got timestep {first}, expected 0 to {last}, the model's schedule")
    if schedule.alphas_cumprod[first] == 0:
        raise ValueError(
            f"{name}: at timestep {first} nothing is left of the pictures, expected a smaller one"
        )
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(get_args(Sampler))}")
    if num_inference_steps is not None and sampler != "dpmsolver++":
        raise ValueError(f"num_inference_steps: got {num_inference_steps}, expected none for {sampler!r}")
    if sampler == "ddpm":
        return ancestral(schedule, range(first, -1, -1))
    if sampler == "one_shot":
        return ancestral(schedule, [first])
    count = min(SOLVER_STEPS, first + 1) if num_inference_steps is None else num_inference_steps
    if checked_count("num_inference_steps", count) > first + 1:
        raise ValueError(f"num_inference_steps: got {count}, expected at most {first + 1}")
    # down to where the last step begins: -1 stands for clean pictures
    timesteps = torch.linspace(first, -1, count + 1, dtype=torch.float64).round().long()
    return _solver(schedule, timesteps[:-1])


def first_of(schedule: NoiseSchedule, t: int) -> int:
    """The timestep from which it is t steps to clean pictures, t of 1 to T: the one before t.

    Raises:
        ValueError: for another t.
    """
    if checked_count("t", t) > schedule.num_train_timesteps:
        raise ValueError(f"t: got {t}, expected 1 to {schedule.num_train_timesteps}, the model's schedule")
    return t - 1


def ancestral(schedule: NoiseSchedule, timesteps: Sequence[int], end: int | None = None) -> Walk:
    """Ancestral steps over descending timesteps, from each to the next one.

    ::

        mu    = (sqrt(A') beta x0 + sqrt(a) (1 - A') x) / (1 - A)       A, A' = abar now and next, a = A / A'
        beta  = 1 - a,    beta~ = beta (1 - A') / (1 - A)               the two ends of the variance

    The last step goes to clean pictures (A' = 1) and adds no noise, unless `end` is given, where it ends.
    """
    t = torch.as_tensor(list(timesteps))
    now = schedule.alphas_cumprod[t]
    final = now.new_ones(1) if end is None else schedule.alphas_cumprod[end : end + 1]
    after = torch.cat((now[1:], final))
    ratio = now / after
    beta = 1 - ratio
    small = beta * (1 - after) / (1 - now)
    of_x0, of_x = after.sqrt() * beta / (1 - now), ratio.sqrt() * (1 - after) / (1 - now)
    small = torch.where(after == 1, beta, small)  # of the last step, which adds no noise, log 0 would be NaN
    rows = (of_x, of_x0, torch.zeros_like(now), small.log(), beta.log())
    return _of(schedule, t, torch.stack(rows, dim=1), tuple((after < 1).tolist()))


def _solver(schedule: NoiseSchedule, t: Tensor) -> Walk:
    """DPM-Solver++(2M): with h the step in lambda = log(alpha / sigma), and r that before it over it,

    ::

        x' = (sigma' / sigma) x - alpha' (exp(-h) - 1) ((1 + 1 / (2 r)) x0 - 1 / (2 r) x0_last)

    of first order at both ends; the last step goes to clean pictures, x' = x0.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    position = (alpha / sigma).log()
    rows = torch.zeros(len(t), 5, dtype=torch.float64)
    for step in range(len(t) - 1):
        h = position[step + 1] - position[step]
        whole = -alpha[step + 1] * torch.expm1(-h)
        bend = 0.5 * h / (position[step] - position[step - 1]) if step else 0.0
        rows[step, 0] = sigma[step + 1] / sigma[step]
        rows[step, 1], rows[step, 2] = whole * (1 + bend), -whole * bend
    rows[-1, 1] = 1
    return _of(schedule, t, rows, (False,) * len(t))


def _of(schedule: NoiseSchedule, t: Tensor, rows: Tensor, noisy: tuple[bool, ...]) -> Walk:
    alpha, sigma = schedule.alpha_sigma(t[0])
    return Walk(t, float(alpha), float(sigma), rows, noisy)


def respaced(schedule: NoiseSchedule, count: int) -> list[int]:
    """`count` timesteps spread over the whole schedule, ascending, as guided diffusion respaces them."""
    last = schedule.num_train_timesteps - 1
    return [round(number * last / (count - 1)) for number in range(count)] if count > 1 else [0]


def check_default_walk(sampler: Sampler, num_inference_steps: int | None) -> None:
    """Of variants "ds", which have a walk of their own."""
    if sampler != "ddpm":
        raise ValueError(f"sampler: got {sampler!r}, expected the default for variant='ds'")
    if num_inference_steps is not None:
        raise ValueError(f"num_inference_steps: got {num_inference_steps}, expected none for variant='ds'")


def rescheduled(schedule: NoiseSchedule, index: int) -> Walk:
    """Of variants "ds": index t of a schedule of 250 down to index 1; the step to index 0 is left out."""
    if not 1 <= index < _RESPACED:
        raise ValueError(f"t: got {index}, expected 1 to {_RESPACED - 1} for variant='ds'")
    timesteps = respaced(schedule, _RESPACED)
    return ancestral(schedule, timesteps[index:0:-1], end=timesteps[0])
