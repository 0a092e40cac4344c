"""Degeneration-Tuning: a concept is learned as pictures that show nothing (Ni et al., ACM MM 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pumice.erase.arguments import check_scale, checked_templates, checked_texts, normalized
from pumice.erase.trainer import Options, Trainer
from pumice.models import Edit
from pumice.models.arguments import checked_count, first_seed
from pumice.models.draws import Draws
from pumice.training.class_pictures import drawn_pictures, shared_out
from pumice.training.examples import Examples, Row, denoising_loss
from pumice.training.pictures import in_turn


@torch.inference_mode(False)
def degeneration_tuning(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    prompts: str | Sequence[str] = "{}",
    prior_prompts: str | Sequence[str] = "a photo",
    grid: int = 8,
    num_images: int = 200,
    prior_weight: float = 1.0,
    parameters: str = "full",
    steps: int = 1000,
    learning_rate: float = 5e-6,
    **options: Unpack[Options],
) -> Edit:
    """Erase concepts by teaching the model that they look like nothing at all.

    ::

        |epsilon'(x_t, t, c) - noise|^2              x a scrambled picture of the concept's prompt c
        |epsilon'(x_t, t, c) - noise|^2 prior_weight   x a picture of another prompt c

    means over elements, in turn (Ni et al., arXiv:2308.02552). The model draws all pictures itself; in models
    of v, v takes the place of epsilon and noise. The paper's numbers could not be had: defaults are those of
    DreamBooth (arXiv:2208.12242) where it has them, else assumptions.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        prompts: with one {} for the concept. Default the concept alone.
        prior_prompts: other prompts, whose pictures stay. Default "a photo".
        grid: patches along each side, see `scrambled_grid`. Default 8.
        num_images: that are drawn of the concepts, and of the others, at most: no more than all steps reach.
            Default 200, of DreamBooth's prior.
        prior_weight: default 1, of DreamBooth.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default all.
        steps: default 1000, of DreamBooth.
        learning_rate: Adam's. Default 5e-6, of DreamBooth.
        options: `pumice.erase.trainer.Options`; the default `batch_size` is 2, one of each. A checkpoint has
            the pictures that the model drew, too.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, a grid that
            does not divide its pictures, and if a loss or gradient is not finite, whereupon the last
            checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    concepts = checked_texts("concepts", concepts)
    templates = checked_templates("prompts", [prompts] if isinstance(prompts, str) else prompts, least=1)
    others = checked_texts("prior_prompts", prior_prompts)
    prior_weight = check_scale("prior_weight", prior_weight)
    num_images, grid = checked_count("num_images", num_images), checked_count("grid", grid, least=2)
    unwanted = [template.replace("{}", concept) for template in templates for concept in concepts]
    both = {normalized(text) for text in unwanted} & {normalized(text) for text in others}
    if both:
        raise ValueError(f"prior_prompts: got {min(both)!r}, which is to be erased, expected others")
    options.setdefault("batch_size", 2)
    trainer = Trainer(
        pipe,
        concepts,
        parameters,
        method="degeneration_tuning",
        settings={
            "prompts": list(templates),
            "prior_prompts": list(others),
            "grid": grid,
            "num_images": num_images,
            "prior_weight": prior_weight,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    model, count = trainer.model, trainer.count
    _, height, width = model.latent_shape()
    scale = model.vae_scale_factor
    _check_grid(grid, height * scale, width * scale)
    seed = first_seed(options.get("seed", 0))
    kinds = 2 if prior_weight else 1  # rows are of one and the other in turn
    most = min(num_images, -(-trainer.steps * count // kinds))

    def learned(texts: Sequence[str], weight: float, seed: int, scramble: bool) -> list[tuple[Examples, int]]:
        wanted, progress = shared_out(texts, most), options.get("progress", False)
        found = []
        for text, images in drawn_pictures(model, wanted, seed, options.get("checkpoint"), progress).items():
            shown = list(scrambled_grid(torch.stack(images), grid, seed)) if scramble else images
            examples = Examples(model, shown, text, weight=weight / count)
            found += [(examples, place) for place in range(len(shown))]
        return found

    sets = [learned(unwanted, 1.0, seed, True)]
    if prior_weight:
        sets.append(learned(others, prior_weight, seed + 1, False))

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        found = []
        for row in rows:
            turn, kind = divmod(step * count + row, kinds)
            of = sets[kind]
            examples, place = of[in_turn(trainer.draws, f"order {kind}", turn, len(of))]
            z = examples.latents(place, trainer.draws, row, step)
            found.append(Row(row, z, examples.prompt, examples.weight))
        embeds = trainer.encode([row.prompt for row in found])
        return denoising_loss(trainer.student, found, embeds, trainer.draws, step)

    return trainer.train(loss, details=lambda: {"images": sum(map(len, sets))})


def scrambled_grid(images: Tensor, grid: int = 8, seed: int = 0) -> Tensor:
    """Pictures cut into a grid of patches, which are put back in random order.

    What is larger than a patch is gone, what is smaller stays.

    Args:
        images: (B, 3, H, W).
        grid: patches along each side.
        seed: of the orders, one for each picture.

    Returns:
        (B, 3, H, W).

    Raises:
        ValueError: for a grid that does not divide the sides.
    """
    grid = checked_count("grid", grid)
    _check_grid(grid, *images.shape[2:])
    draws = Draws([f"{seed}/scrambled {number}" for number in range(len(images))], images.device)
    # (B, 3, rows, y, columns, x) to (B, patches, 3, y, x) and back
    cut = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)
    patches = cut.flatten(1, 2)
    orders = [draws.permutation(number, "order", 0, grid * grid) for number in range(len(images))]
    mixed = torch.stack([each[order] for each, order in zip(patches, orders, strict=True)])
    return mixed.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def _check_grid(grid: int, height: int, width: int) -> None:
    if height % grid or width % grid:
        raise ValueError(f"grid: got {grid} for pictures of {height}x{width}, expected a divisor of both")
