"""Pictures of the subject's class, drawn by the model, each once and by one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pumice.io import Picture, save_lossless
from pumice.models import DiffusionModel, drawing_state, fingerprint
from pumice.training.examples import class_batches
from pumice.training.processes import processes

from .arguments import warn


def drawn_class(
    model: DiffusionModel, prompt: str, count: int, seed: int, folder: Path | None, progress: bool
) -> list[Tensor]:
    """`count` pictures of a class, (3, H, W) in [0, 1] each, of 8 bits.

    Args:
        model: that draws, by 50 steps of DDIM with guidance 7.5.
        prompt: of the class.
        count: how many.
        seed: of their noise.
        folder: to take from what is there, and to keep them in, under `class-<what they depend on>`.
        progress: show a bar.

    Raises:
        ValueError: if one in the folder cannot be read.
    """
    state = processes(model.device)
    mine = range(state.process_index, count, state.num_processes)
    if folder is not None:
        folder = folder / f"class-{_key(model, prompt, seed)}"
    found = {} if folder is None else _read(folder, mine)
    missing = [number for number in mine if number not in found]
    if missing and state.is_main_process:
        warn(f"class_images: got none, the model draws {count} of {prompt!r}")
    hidden = not (progress and state.is_main_process)
    with tqdm(total=len(mine), initial=len(found), unit="class picture", disable=hidden) as bar:
        for number, image in zip(
            missing, chain.from_iterable(class_batches(model, prompt, missing, seed)), strict=True
        ):
            found[number] = (image * 255).round().to(torch.uint8)
            if folder is not None and not _written(folder, number, found[number]):
                folder = None
            bar.update()
    if state.num_processes > 1:
        nothing = torch.zeros(3, *_size(model), dtype=torch.uint8)
        for number in range(count):
            own = found.get(number, nothing).to(model.device)
            found[number] = reduce(own, "sum").cpu()
    return [found[number].float() / 255 for number in range(count)]


def _size(model: DiffusionModel) -> list[int]:
    return [side * model.vae_scale_factor for side in model.latent_shape()[1:]]


def _key(model: DiffusionModel, prompt: str, seed: int) -> str:
    """Names what else than its number a picture depends on."""
    said = [fingerprint(model), drawing_state(model), _size(model), prompt, seed]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.png"


def _read(folder: Path, numbers: Iterable[int]) -> dict[int, Tensor]:
    there = [number for number in numbers if _path(folder, number).exists()]
    return {number: Picture.open(_path(folder, number), "checkpoint").pixels for number in there}


def _written(folder: Path, number: int, pixels: Tensor) -> bool:
    """Whether the picture is kept; a full disk is warned about."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_lossless(Image.fromarray(pixels.permute(1, 2, 0).numpy()), _path(folder, number))
    except OSError as error:
        warn(f"checkpoint: class pictures could not be written ({error.strerror}); they are not kept")
        return False
    return True
