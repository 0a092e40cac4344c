"""Pictures that the model draws to learn from, each once and by one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path

import torch
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pumice.io import Picture, save_lossless
from pumice.models import DiffusionModel, drawing_state, fingerprint
from pumice.models.arguments import warn
from pumice.training.checkpoint import TrainingWarning
from pumice.training.examples import class_batches
from pumice.training.processes import processes


def drawn_pictures(
    model: DiffusionModel,
    wanted: Mapping[str, Sequence[int]],
    seed: int | Sequence[int],
    folder: str | PathLike[str] | None,
    progress: bool,
) -> dict[str, list[Tensor]]:
    """Pictures (3, H, W) in [0, 1], of 8 bits, by their prompts.

    Args:
        model: that draws, by 50 steps of DDIM with guidance 7.5.
        wanted: numbers of those of each prompt; a number has its own noise.
        seed: of the noise.
        folder: to take from what is there, and to keep them in, under `class-<what they depend on>`.
        progress: show a bar.

    Raises:
        ValueError: if one in the folder cannot be read.
    """
    state = processes(model.device)
    every = [(prompt, number) for prompt, numbers in wanted.items() for number in numbers]
    mine = every[state.process_index :: state.num_processes]
    folders = {} if folder is None else _folders(Path(folder), model, wanted, seed)
    found = {
        (prompt, number): Picture.open(path, "checkpoint").pixels
        for prompt, number in mine
        if folders and (path := _path(folders[prompt], number)).exists()
    }
    hidden = not (progress and state.is_main_process)
    with tqdm(total=len(mine), initial=len(found), unit="picture", desc="drawing", disable=hidden) as bar:
        for prompt in wanted:
            missing = [number for of, number in mine if of == prompt and (of, number) not in found]
            batches = class_batches(model, prompt, missing, seed)
            for number, image in zip(missing, chain.from_iterable(batches), strict=True):
                pixels = found[prompt, number] = (image * 255).round().to(torch.uint8)
                if folders and not _written(folders[prompt], number, pixels):
                    folders = {}
                bar.update()
    if state.num_processes > 1:
        nothing = torch.zeros(3, *_size(model), dtype=torch.uint8)
        for each in every:
            found[each] = reduce(found.get(each, nothing).to(model.device), "sum").cpu()
    return {
        prompt: [found[prompt, number].float() / 255 for number in numbers]
        for prompt, numbers in wanted.items()
    }


def shared_out(prompts: Sequence[str], total: int) -> dict[str, range]:
    """Numbers of the pictures of each prompt, `total` for all of them; a repeated one has the same ones."""
    counts: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        count = total // len(prompts) + (place < total % len(prompts))
        counts[prompt] = max(counts.get(prompt, 0), count)
    found, first = {}, 0
    for prompt, count in counts.items():
        if count:
            found[prompt] = range(first, first + count)
            first += count
    return found


def _size(model: DiffusionModel) -> list[int]:
    return [side * model.vae_scale_factor for side in model.latent_shape()[1:]]


def _folders(
    root: Path, model: DiffusionModel, prompts: Iterable[str], seed: int | Sequence[int]
) -> dict[str, Path]:
    """By prompt that of its pictures, named by what else than their number they depend on."""
    of_model, found = [fingerprint(model), drawing_state(model), _size(model)], {}
    for prompt in prompts:
        said = json.dumps([*of_model, prompt, seed], default=str)
        found[prompt] = root / f"class-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
    return found


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.png"


def _written(folder: Path, number: int, pixels: Tensor) -> bool:
    """Whether the picture is kept; a full disk is warned about."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_lossless(Image.fromarray(pixels.permute(1, 2, 0).numpy()), _path(folder, number))
    except OSError as error:
        warn(
            f"checkpoint: pictures that the model drew could not be written ({error.strerror}); they are not "
            "kept",
            TrainingWarning,
        )
        return False
    return True
