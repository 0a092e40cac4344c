"""The matrix of the embedded model: what it sets against each other, at sizes for a small machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from pumice import models, personalize, protect, purify, testbed
from pumice.evaluate.clip import clip_agreement
from pumice.evaluate.matrix import Protect, Purify, Recipe, Study
from pumice.models import DiffusionModel
from pumice.purify import filters
from pumice.training.examples import draw_class

CLASS = "a photo of a creature"
EPS = 11 / 255  # of arXiv:2406.18944
MISMATCH = ("a creature", "tanaka")
"""What the embedded CLIP is asked to tell apart, as `mismatch` takes subject and other.

It has never met the word "noise". Of the objects, places and artists that it knows, protection brings
pictures nearest to one who paints bands of light all over.
"""

_CLASS_PICTURES = 64


def embedded_study(
    *, quick: bool = False, subjects: Sequence[int] = (0, 1), seeds: Sequence[int] = (0, 1, 2)
) -> Study:
    """What `evaluate.matrix` needs to run on the embedded model.

    Methods run with their own defaults, but for the budget of 11/255 and what makes them fit 64 px.

    Args:
        quick: fewer methods, shorter trainings, and gridpure by one pass a round.
        subjects: of the testbed's world.
        seeds: of the trainings.

    Raises:
        ValueError: for a subject that this world does not have.
    """
    protections: dict[str, Protect | None] = {"none": None, "random": random_noise, "mist": mist}
    purifiers: dict[str, Purify | None] = {"none": None, "jpeg": filters.jpeg}
    if quick:
        purifiers["gridpure"] = partial(gridpure, one_shot=True)
    else:
        protections["aspl"] = aspl
        purifiers |= {"gridpure": gridpure, "diffpure": diffpure, "codesr": codesr}
    steps, drawings = (150, 4) if quick else (300, 8)
    recipes: dict[str, Recipe] = {
        "dreambooth": partial(learn, steps=steps, drawings=drawings),
        "decoupling": partial(learn, decoupled=True, steps=steps, drawings=drawings),
    }
    if not quick:
        recipes["decoupling, enhanced"] = partial(
            learn, decoupled=True, enhanced=True, steps=steps, drawings=drawings
        )
    return Study(
        pipe=testbed.load(),
        subjects={str(index): testbed.subject_trial(index) for index in subjects},
        protections=protections,
        purifiers=purifiers,
        recipes=recipes,
        seeds=seeds,
        agreement=clip_agreement(*testbed.load_clip()),
    )


def learn(
    pipe: DiffusionModel,
    pictures: Tensor,
    prompt: str,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int,
    drawings: int,
    decoupled: bool = False,
    enhanced: bool = False,
) -> Tensor:
    """A recipe for the embedded model: DreamBooth as `testbed.subject_trial` has it, or decoupled.

    Decoupled, the class is what the model itself draws for it; of real other creatures, the subject takes on
    the looks, and from ordinary pictures nothing is decoupled. The text encoder learns; without, the subject
    is lost with the noise. Enhanced, drawings are guided away from the negative prompt, whose words mean
    little to this model. Found on another creature than the subjects.

    Returns:
        (P, drawings, 3, 64, 64) in [0, 1].
    """
    learned = personalize.dreambooth(
        pipe,
        pictures,
        prompt,
        CLASS if decoupled else None,
        noise_phrase=personalize.NOISE_PHRASE if decoupled else None,
        class_images=class_pictures() if decoupled else None,
        steps=steps,
        learning_rate=5e-4,
        batch_size=8,
        train_text_encoder=decoupled,
        seed=seed,
    )
    drawn = personalize.sample(
        learned,
        prompts,
        negative_prompt=personalize.NEGATIVE_PROMPT if enhanced else None,
        num_images=drawings,
        num_inference_steps=20,
        guidance_scale=2.0,
        seed=seed,
    )
    return drawn / 255


@cache
def class_pictures() -> Tensor:
    """(64, 3, 64, 64) of what the embedded model draws for the class, the same in all trainings."""
    return torch.stack(draw_class(models.load(testbed.WEIGHTS), CLASS, _CLASS_PICTURES, 0, False))


def random_noise(images: Tensor, _pipe: DiffusionModel, _prompt: str) -> Tensor:
    return protect.random_noise(images, eps=EPS)


def mist(images: Tensor, pipe: DiffusionModel, prompt: str) -> Tensor:
    return protect.mist(images, pipe, prompt, eps=EPS)


def aspl(images: Tensor, pipe: DiffusionModel, prompt: str) -> Tensor:
    # a surrogate of 5 million weights has to take larger steps than one of 860 million
    return protect.aspl(images, pipe, prompt, CLASS, eps=EPS, step_size=EPS / 10, lr=1e-4, num_class_images=8)


def gridpure(images: Tensor, *, one_shot: bool = False) -> Tensor:
    return purify.gridpure(images, testbed.load_denoiser(), sampler="one_shot" if one_shot else "ddpm")


def diffpure(images: Tensor) -> Tensor:
    return purify.diffpure(images, testbed.load_denoiser(), t=100, size="native")


def codesr(images: Tensor) -> Tensor:
    return purify.codesr(images, testbed.load_upscaler(), "creature")
