"""The engine that detectors share: prompts x seeds in full batches, and nothing computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import pumice
from pumice import ops
from pumice.io import check_writable, write_whole
from pumice.models import DiffusionModel, GuidedSampler, PromptEmbeds, RowBudget, fingerprint


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """x_T of every seed, (S, C, h, w) float32 on the CPU, whatever the model's device.

    It is what a diffusers pipeline starts from with `generator=torch.Generator().manual_seed(seed)`.
    """
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """B pairs of prompt and seed, as one call of the denoiser has them.

    Attributes:
        prompts: B of them.
        seed: (B,), places in the list of seeds, on the device.
        eos: (B,), where each prompt's EOS is, on the device.
    """

    prompts: PromptEmbeds
    seed: Tensor
    eos: Tensor

    def __getitem__(self, index: slice) -> Rows:
        """A view: nothing is copied, and nothing sent to the device."""
        return Rows(self.prompts[index], self.seed[index], self.eos[index])


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a guided trajectory, before it is taken.

    Attributes:
        index: of the step.
        x: (B, C, h, w) float32.
        cond, uncond: the model's raw outputs with and without the prompt, float32.
        magnitude: (B,) float32, |epsilon_cond - epsilon_uncond|.
    """

    index: int
    x: Tensor
    cond: Tensor
    uncond: Tensor
    magnitude: Tensor


class Screen:
    """One model, one list of seeds, one sampler: what metrics measure with.

    The latents of a seed are the same for every prompt until a prompt has moved them. So the unconditional
    predictions on pure noise are computed once a seed and timestep, and kept in `cache`, if one is given, for
    the next time. Calls of the denoiser have a fixed number of rows, the last one filled up, so that a row's
    rounding does not depend on how many others there are; only a job of less than one call runs at its own
    size.

    Attributes:
        model, sampler: as given.
        noise: (S, C, h, w) float32 on the device.
    """

    def __init__(
        self,
        model: DiffusionModel,
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 32,
        cache: Path | None = None,
    ) -> None:
        self.model = model
        self.sampler = GuidedSampler(model, num_inference_steps, guidance_scale)
        self.noise = initial_noise(seeds, model.latent_shape(height, width)).to(model.device)
        self._seeds = tuple(seeds)
        self._budget = RowBudget(batch_size)
        self._uncond_embeds = model.unconditional()
        self._uncond: dict[int, Tensor] = {}
        self._epsilon_scale = model.schedule.epsilon_scale(self.sampler.timesteps).tolist()
        self._table = None if cache is None else _Table(cache, self)

    def measure(
        self,
        work: Callable[[Screen, Rows], Tensor],
        prompts: PromptEmbeds,
        seeds: Sequence[int],
        advance: Callable[[int], object],
        job: int | None = None,
    ) -> Tensor:
        """`work`, a metric's `measure`, of P prompts and the seeds at given places, (P, S, K) on the device.

        `job` is how many rows the whole list has, if this is a part of it: then calls are filled up to what
        the list's others have. `advance` is told after every call of the denoiser how many of its rows were
        new.
        """
        own = len(prompts) * len(seeds)
        values = self._budget.run(
            lambda rows: self._run(work, prompts, seeds, min(rows, job or own), advance)
        )
        return values.reshape(len(prompts), len(seeds), -1)

    def unconditional(self, step: int) -> Tensor:
        """The raw unconditional predictions of pure noise at that step's timestep, (S, C, h, w) float32."""
        if step not in self._uncond:
            timestep = int(self.sampler.timesteps[step])
            stored = None if self._table is None else self._table.get(timestep)
            if stored is None:
                stored = self._budget.run(lambda rows: self._predict_unconditional(step, rows))
                if self._table is not None:
                    self._table.put(timestep, stored)
            self._uncond[step] = stored.to(self.model.device)
        return self._uncond[step]

    def predict(self, x: Tensor, step: int, prompts: PromptEmbeds | None = None) -> Tensor:
        """The model's raw output, float32; without prompts the unconditional one."""
        embeds = self._uncond_embeds if prompts is None else prompts
        return self.model.predict(x, self.sampler.t[step], embeds).float()

    def epsilon(self, output: Tensor, x: Tensor, step: int) -> Tensor:
        """epsilon of a raw output at x."""
        return self.model.schedule.to_epsilon(output, x, self.sampler.timesteps[step])

    def difference(self, cond: Tensor, uncond: Tensor, step: int) -> Tensor:
        """epsilon_cond - epsilon_uncond of two raw outputs at one x."""
        return (cond - uncond) * self._epsilon_scale[step]

    def trajectory(self, rows: Rows, steps: int) -> Iterator[Step]:
        """The first `steps` steps of guided DDIM; the conditional prediction is each step's last call."""
        x, uncond = self.noise[rows.seed], self.unconditional(0)[rows.seed]
        for index in range(steps):
            if index > 0:
                uncond = self.predict(x, index)
            cond = self.predict(x, index, rows.prompts)
            if index + 1 < steps:
                following, magnitude = self.sampler.step(index, x, cond, uncond)
            else:
                following, magnitude = x, ops.guidance_magnitude(cond, uncond)
            assert magnitude is not None
            yield Step(index, x, cond, uncond, magnitude.difference * self._epsilon_scale[index])
            x = following

    def _run(
        self,
        work: Callable[[Screen, Rows], Tensor],
        prompts: PromptEmbeds,
        seeds: Sequence[int],
        rows: int,
        advance: Callable[[int], object],
    ) -> Tensor:
        total = len(prompts) * len(seeds)
        row = torch.arange(-(-total // rows) * rows)
        row = torch.where(row < total, row, 0)  # past the end, the first row again
        whole = prompts[(row // len(seeds)).tolist()]
        # all that the calls need is sent to the device here, so that none of them waits for it
        every = Rows(
            whole,
            torch.as_tensor(seeds)[row % len(seeds)].to(self.model.device),
            torch.tensor([tokens.eos for tokens in whole.tokens], device=self.model.device),
        )
        found = []
        for start in range(0, total, rows):
            found.append(work(self, every[start : start + rows]))
            advance(min(rows, total - start))
        return torch.cat(found)[:total]

    def _predict_unconditional(self, step: int, rows: int) -> Tensor:
        return torch.cat([self.predict(part, step) for part in self.noise.split(rows)])


class _Table:
    """Unconditional predictions on disk: a file for each model, picture size, list of seeds and timestep."""

    def __init__(self, folder: Path, screen: Screen) -> None:
        check_writable(folder, "cache")
        model = screen.model
        key = {
            "weights": fingerprint(model),
            "schedule": model.schedule.config,
            # zeros instead of the empty prompt, in some of Stable Diffusion XL's pipelines
            "zeros": model.pipe.config.get("force_zeros_for_empty_prompt"),
            "device": model.device.type,
            "noise": list(screen.noise.shape),
            "seeds": screen._seeds,
            "pumice": pumice.__version__,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self._folder, self._key = folder, digest[:32]

    def get(self, timestep: int) -> Tensor | None:
        path = self._path(timestep)
        return load_file(path)["uncond"] if path.exists() else None

    def put(self, timestep: int, uncond: Tensor) -> None:
        write_whole(self._path(timestep), save({"uncond": uncond.cpu()}))

    def _path(self, timestep: int) -> Path:
        return self._folder / f"unconditional-{self._key}-{timestep}.safetensors"
