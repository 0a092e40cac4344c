"""The pictures that a mitigation draws, each drawn once and kept in a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pumice.io import Parts, read_image
from pumice.memorization.dori import dori
from pumice.models import DiffusionModel, PromptEmbeds, RowBudget


class Gallery:
    """What one mitigation draws; its files are named after it.

    Args:
        draws: called as a diffusers pipeline; None is the model's own one.
        settings: num_inference_steps, guidance_scale, red_team_steps.
        bar: counts pictures.
    """

    def __init__(
        self,
        name: str,
        model: DiffusionModel,
        draws: Any,
        parts: Parts,
        settings: dict[str, Any],
        *,
        budget: RowBudget,
        bar: tqdm,
    ) -> None:
        self._name, self._model, self._parts, self._settings = name, model, parts, settings
        self._draws = model.pipe if draws is None else draws
        self._budget, self._bar = budget, bar

    def draw(self, kind: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Path]]:
        """Files of the pictures of each prompt, one a seed."""

        def inputs(rows: list[int]) -> dict[str, Any]:
            return {"prompt": [prompts[row] for row in rows]}

        return self._draw(kind, range(len(prompts)), seeds, inputs)

    def attack(
        self, prompts: Sequence[str], references: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[list[Path]]:
        """The same, drawn from embeddings that DoRI makes for each prompt's first reference."""
        draws = self._draws
        while isinstance(draws, partial):
            draws = draws.func
        target = draws if hasattr(draws, "components") else self._model
        size = [side * self._model.vae_scale_factor for side in self._model.latent_shape()[1:]]
        found, size_of_block = [], self._budget.rows
        for first in range(0, len(prompts), size_of_block):
            block = range(len(prompts))[first : first + size_of_block]
            if all(file_name("red", self._name, row, seed) in self._parts for row in block for seed in seeds):
                found += self._draw("red", block, seeds, lambda rows: {})
                continue
            images = torch.stack([_fit(references[row][0], *size) for row in block])
            embeds = dori(
                target,
                images,
                [prompts[row] for row in block],
                steps=self._settings["red_team_steps"],
                progress=not self._bar.disable,
            ).prompt_embeds
            found += self._draw("red", block, seeds, partial(_embedded, embeds, first))
        return found

    def _draw(
        self,
        kind: str,
        rows: range,
        seeds: Sequence[int],
        inputs: Callable[[list[int]], dict[str, Any]],
    ) -> list[list[Path]]:
        wanted = {(row, seed): file_name(kind, self._name, row, seed) for row in rows for seed in seeds}
        left = [pair for pair, file in wanted.items() if file not in self._parts]
        self._bar.update(len(wanted) - len(left))
        while left:
            batch, images, seconds = self._budget.run(partial(self._call, left, inputs))
            for pair, image in zip(batch, images, strict=True):
                self._parts.put(wanted[pair], to_png(image, seconds / len(batch)))
            left = left[len(batch) :]
            self._bar.update(len(batch))
        return [[self._parts.path(wanted[row, seed]) for seed in seeds] for row in rows]

    def _call(
        self, left: list[tuple[int, int]], inputs: Callable[[list[int]], dict[str, Any]], size: int
    ) -> tuple[list[tuple[int, int]], Tensor, float]:
        """The first `size` of those left, their pictures on the CPU, and the seconds that took."""
        batch, start = left[:size], perf_counter()
        images = self._draws(
            **inputs([row for row, _ in batch]),
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            num_inference_steps=self._settings["num_inference_steps"],
            guidance_scale=self._settings["guidance_scale"],
            output_type="pt",
        ).images
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if len(shape) != 4 or shape[0] != len(batch) or shape[1] != 3:
            raise ValueError(
                f"mitigations: {self._name!r} drew {shape} for {len(batch)} prompts, expected a tensor "
                f"({len(batch)}, 3, H, W)"
            )
        images = images.float().cpu()
        if not bool(images.isfinite().all()):
            raise ValueError(f"mitigations: {self._name!r} drew pictures that are not finite")
        return batch, images, perf_counter() - start


def _embedded(embeds: PromptEmbeds, first: int, rows: list[int]) -> dict[str, Any]:
    """How a pipeline takes the embeddings of prompts, the first of which has the number `first`."""
    chosen = embeds[[row - first for row in rows]]
    pooled = {} if chosen.pooled is None else {"pooled_prompt_embeds": chosen.pooled}
    return {"prompt_embeds": chosen.embeds, **pooled}


def file_name(kind: str, name: str, index: int, seed: int) -> str:
    return f"{kind}-{quote(name, safe='')}-{index:05d}-{seed}.png"


def to_png(image: Tensor, seconds: float) -> bytes:
    """A picture (3, H, W) in [0, 1], and how long it took to draw."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    info, file = PngInfo(), io.BytesIO()
    info.add_text("seconds", f"{seconds:.6g}")
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def read_pictures(files: Sequence[Path]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1]."""
    return torch.stack([read_image(file) for file in files])


def seconds_of(file: Path) -> float:
    with Image.open(file) as picture:
        return float(picture.text["seconds"])  # type: ignore[attr-defined]


def _fit(picture: Tensor, height: int, width: int) -> Tensor:
    """The middle of a picture (3, H, W), as large as the model draws, as in training."""
    scale = max(height / picture.shape[1], width / picture.shape[2])
    size = [max(height, round(picture.shape[1] * scale)), max(width, round(picture.shape[2] * scale))]
    whole = F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return whole[:, top : top + height, left : left + width]
