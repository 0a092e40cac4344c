"""The noise schedule of a model, and the one place where epsilon, v and x0 are converted into each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .errors import UnsupportedModelError

PredictionType = Literal["epsilon", "v_prediction"]

# What of a diffusers scheduler's config fixes the noise levels, and what the steps of DDIM over them.
_NOISE_KEYS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
}
_STEP_KEYS = {"set_alpha_to_one", "steps_offset", "timestep_spacing"}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels x_t = alpha_t x0 + sigma_t epsilon of a diffusion model, alpha_t^2 + sigma_t^2 = 1.

    Timesteps are ints, 0-dimensional or (B,) integer tensors; with (B,) each sample has its own. Results are
    float32 (float64 for float64 inputs), whatever precision the network ran in.

    Attributes:
        alphas_cumprod: (T,) float64 on the CPU, alpha_t^2.
        final_alpha_cumprod: alpha^2 that the last DDIM step ends at.
        prediction_type: what the network outputs, "epsilon" or "v_prediction" (v = alpha epsilon - sigma x0).
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: PredictionType
    _ddim: dict[str, Any] = field(repr=False)
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the schedule from the config of a diffusers scheduler of any kind that has betas.

        Where the config leaves the steps to the scheduler's own defaults, DDIM's are taken, as by
        `DDIMScheduler.from_config`; the noise levels are always those of the scheduler.

        Raises:
            UnsupportedModelError: for a schedule without betas (flow matching, EDM) or other predictions.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        if "beta_schedule" not in config:
            raise UnsupportedModelError(
                "scheduler: has no beta_schedule (flow matching?), expected one like DDIM's"
            )
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UnsupportedModelError(
                f"scheduler: prediction_type is {prediction_type!r}, expected 'epsilon' or 'v_prediction'"
            )
        stated = _STEP_KEYS - set(config.get("_use_default_values", ()))
        ddim = {key: config[key] for key in sorted(_NOISE_KEYS | stated) if key in config}
        try:
            scheduler = _ddim_scheduler(ddim)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"scheduler: beta_schedule is {ddim['beta_schedule']!r}, expected one that DDIM has"
            ) from error
        return cls(
            alphas_cumprod=scheduler.alphas_cumprod.double(),
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            prediction_type=cast(PredictionType, prediction_type),
            _ddim=ddim,
        )

    @property
    def config(self) -> dict[str, Any]:
        """What it was made from, in the words of diffusers' DDIM, and what the network predicts."""
        return {**self._ddim, "prediction_type": self.prediction_type}

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise, alpha = 0."""
        return bool(self.alphas_cumprod[-1] == 0)

    def alpha_sigma(
        self,
        timesteps: int | Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each of the shape of `timesteps`, on `device` (default: that of `timesteps`).

        Raises:
            TypeError: if timesteps are not integers.
            ValueError: if an int or a CPU tensor leaves [0, T); a CUDA tensor is not read back to check.
        """
        t = torch.as_tensor(timesteps)
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"timesteps: got {t.dtype}, expected integers")
        if t.device.type == "cpu" and t.numel() and not (0 <= t.min() and t.max() < self.num_train_timesteps):
            raise ValueError(
                f"timesteps: got values from {int(t.min())} to {int(t.max())}, "
                f"expected 0 to {self.num_train_timesteps - 1}"
            )
        device = torch.device(device) if device is not None else t.device
        # not table[:, t], which would read a 0-dimensional t back from the GPU
        alpha, sigma = self._table(device, dtype).index_select(1, t.to(device).flatten()).reshape(2, *t.shape)
        return alpha, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        alpha, sigma, x0, noise = self._prepare(timesteps, x0, noise)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """What the network is trained to output for x_t = alpha_t x0 + sigma_t noise."""
        alpha, sigma, x0, noise = self._prepare(timesteps, x0, noise)
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * x0

    def to_epsilon(self, output: Tensor, x_t: Tensor, timesteps: int | Tensor) -> Tensor:
        """epsilon from the network's output at x_t; from v: epsilon = alpha_t v + sigma_t x_t."""
        alpha, sigma, output, x_t = self._prepare(timesteps, output, x_t)
        return output if self.prediction_type == "epsilon" else alpha * output + sigma * x_t

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """What a difference of two outputs at one x_t is to be multiplied by to be one of epsilons, float64.

        1, or alpha_t where the network predicts v: epsilon_1 - epsilon_2 = alpha_t (v_1 - v_2).
        """
        alpha, _ = self.alpha_sigma(timesteps)
        return alpha if self.prediction_type == "v_prediction" else torch.ones_like(alpha)

    def to_x0(self, output: Tensor, x_t: Tensor, timesteps: int | Tensor) -> Tensor:
        """x0 from the network's output at x_t: (x_t - sigma_t epsilon) / alpha_t, or alpha_t x_t - sigma_t v.

        Raises:
            ValueError: for an epsilon model at pure noise (alpha = 0), which does not determine x0.
        """
        alpha, sigma, output, x_t = self._prepare(timesteps, output, x_t)
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * output
        if self.zero_terminal_snr and bool((alpha == 0).any()):
            raise ValueError(
                f"timesteps: {self.num_train_timesteps - 1} is pure noise (alpha = 0), from which an epsilon "
                "prediction does not determine x0; expected a smaller timestep"
            )
        return (x_t - sigma * output) / alpha

    def to_v(self, output: Tensor, x_t: Tensor, timesteps: int | Tensor) -> Tensor:
        """v = alpha_t epsilon - sigma_t x0 from the network's output at x_t; raises as `to_x0`."""
        alpha, sigma, output, x_t = self._prepare(timesteps, output, x_t)
        if self.prediction_type == "v_prediction":
            return output
        return alpha * output - sigma * self.to_x0(output, x_t, timesteps)

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """The timesteps that diffusers' DDIM visits, descending, (steps,) int64 on the CPU.

        Raises:
            ValueError: for less than 1 or more than T steps, or if the config's offset leaves the schedule.
        """
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps: got {num_inference_steps}, expected 1 to {self.num_train_timesteps}"
            )
        scheduler = _ddim_scheduler(self._ddim)
        scheduler.set_timesteps(num_inference_steps)
        if scheduler.timesteps[0] >= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps} with the model's steps_offset "
                f"{scheduler.config.steps_offset} starts past its last timestep, expected fewer steps"
            )
        return cast(Tensor, scheduler.timesteps)

    def ddim_coefficients(self, num_inference_steps: int) -> Tensor:
        """alpha_t, sigma_t, alpha_prev, sigma_prev of each deterministic DDIM step, (steps, 4) float64, CPU.

        A step is x_prev = alpha_prev x0 + sigma_prev epsilon. As in diffusers, the previous timestep is
        t - T // steps, and the last step ends at `final_alpha_cumprod`.
        """
        t = self.timesteps(num_inference_steps)
        previous = t - self.num_train_timesteps // num_inference_steps
        squared = self.alphas_cumprod[previous.clamp(min=0)]
        squared = torch.where(previous >= 0, squared, self.final_alpha_cumprod)
        return torch.stack((*self.alpha_sigma(t), squared.sqrt(), (1 - squared).sqrt()), dim=1)

    def _prepare(self, timesteps: int | Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """alpha_t and sigma_t that broadcast over the tensors, then the tensors, all in one precision."""
        dtype = torch.float32
        for x in tensors:
            dtype = torch.promote_types(dtype, x.dtype)
        batch = tensors[0].shape
        t = torch.as_tensor(timesteps)
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, batch[0])):
            raise ValueError(f"timesteps: got shape {tuple(t.shape)}, expected () or ({batch[0]},)")
        # a single timestep on the CPU stays there: its coefficients then reach a GPU as kernel arguments
        device = t.device if t.ndim == 0 and t.device.type == "cpu" else tensors[0].device
        alpha, sigma = self.alpha_sigma(t, device=device, dtype=dtype)
        if t.ndim == 1:
            alpha, sigma = (c.reshape(-1, *[1] * (len(batch) - 1)) for c in (alpha, sigma))
        return (alpha, sigma, *(x.to(dtype) for x in tensors))

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(2, T): alpha and sigma, kept on every device in use, so that no loop there waits for a copy."""
        key = (device, dtype)
        if key not in self._tables:
            alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[key] = torch.stack((alpha, sigma)).to(dtype).to(device)
        return self._tables[key]


def _ddim_scheduler(config: Mapping[str, Any]) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**config)
