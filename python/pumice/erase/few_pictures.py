"""What trains text encoders on few pictures: the pictures, noised, templates, and which layers there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.models import DiffusionModel
from pumice.models.draws import Draws
from pumice.models.edit import TEXT
from pumice.models.errors import UnsupportedModelError
from pumice.training.examples import Examples
from pumice.training.pictures import check_one_size, digest, in_turn, learnable, of_each

Noised = Callable[[int, Sequence[int], Sequence[str]], tuple[Tensor, Tensor, Tensor]]
"""From a step, some of its rows and their concepts to z_t, t and the noise."""


def given_pictures(
    images: Any, concepts: Sequence[str], model: DiffusionModel
) -> dict[str, list[Tensor]] | None:
    """Those of each concept, if there are any."""
    if images is None:
        return None
    found = {
        concept: learnable(own, model)
        for concept, own in zip(concepts, of_each(images, concepts), strict=True)
    }
    check_one_size(picture for own in found.values() for picture in own)
    return found


def digests(pictures: Mapping[str, Sequence[Tensor]] | None) -> list[str] | None:
    return None if pictures is None else [digest(own) for own in pictures.values()]


def named(templates: Sequence[str], concepts: Sequence[str]) -> list[str]:
    return [template.replace("{}", concept) for template, concept in zip(templates, concepts, strict=True)]


def picked(texts: Sequence[str], draws: Draws, rows: Sequence[int], what: str, step: int) -> list[str]:
    """One at random for each row."""
    return [texts[index] for index in draws.integers(rows, what, step, len(texts)).tolist()]


def of_pictures(
    model: DiffusionModel, pictures: Mapping[str, Sequence[Tensor]], draws: Draws, count: int
) -> Noised:
    """z_t, t and the noise of a step's rows: pictures of their concepts, all of them in turn."""
    examples = {concept: Examples(model, found, concept) for concept, found in pictures.items()}

    def of_rows(step: int, rows: Sequence[int], of: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        clean = []
        for row, concept in zip(rows, of, strict=True):
            own = examples[concept]
            place = in_turn(draws, f"order of {concept}", step * count + row, len(own))
            clean.append(own.latents(place, draws, row, step))
        return noised(model, torch.stack(clean), draws, step, rows)

    return of_rows


def noised(
    model: DiffusionModel, z: Tensor, draws: Draws, step: int, rows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, t and the noise of rows of z."""
    t = draws.integers(rows, "timestep", step, model.schedule.num_train_timesteps)
    noise = draws.normal(rows, "noise", step, z.shape[1:])
    return model.add_noise(z, noise, t), t, noise


def text_layers(model: DiffusionModel) -> Iterator[tuple[str, nn.Module, list[str], list[str]]]:
    """Name and module of each text encoder, and its layers and the norms behind them that the denoiser reads.

    Raises:
        UnsupportedModelError: for encoders of another kind than CLIP's.
    """
    for name, encoder in zip(TEXT, model.text_encoders, strict=False):
        modules = dict(encoder.named_modules())
        layers = [path for path in modules if f"{path}.self_attn" in modules and f"{path}.mlp" in modules]
        if not layers:
            raise UnsupportedModelError(f"pipe: {name} is a {type(encoder).__name__}, expected CLIP's")
        norms = [
            path
            for path, module in modules.items()
            if isinstance(module, nn.LayerNorm) and path.rpartition(".")[0] not in layers
        ]
        if len(model.text_encoders) > 1:  # Stable Diffusion XL reads what enters the last layer
            layers, norms = layers[:-1], []
        yield name, encoder, layers, norms
