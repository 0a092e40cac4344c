"""What protecting a subject of the testbed's world is judged by: pictures, how they are learned, judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumice.testbed import world
from pumice.testbed.shipped import load_identity

_LEARNED, _REFERENCES = range(8), range(100, 116)


@dataclass(frozen=True, eq=False)
class SubjectTrial:
    """Arguments of `evaluate.protection` for one subject.

    Attributes:
        pictures: (8, 3, 64, 64) float32 in [0, 1], to be protected and learned.
        references: (16, 3, 64, 64), other pictures of it.
        prompt: that it is learned under, in words that the model has not seen.
        prompts: that are drawn.
        identity: pictures (N, 3, 64, 64) in [0, 1] to (N,), how much they show the subject.
        quality: the same, how clean they are.
        learning: how it is learned and drawn, the other arguments of `evaluate.learnability`.
    """

    pictures: Tensor
    references: Tensor
    prompt: str
    prompts: tuple[str, ...]
    identity: Callable[[Tensor], Tensor]
    quality: Callable[[Tensor], Tensor]
    learning: dict[str, Any]


def subject_trial(index: int) -> SubjectTrial:
    """The trial of subject `index`, 0 <= index < world.SUBJECT_COUNT.

    How it is learned was chosen on unprotected pictures of other creatures: a training that is short, and
    after which they are drawn alike from every noise. Of subjects 0 and 1 drawings then have an identity of
    0.90 (their own pictures 0.94, drawings of the model that learned nothing 0.18) and a quality of 0.82
    (0.92 and 0.85).

    Raises:
        ValueError: for a subject that this world does not have.
    """
    net, references = load_identity(), _pictures(index, _REFERENCES)
    return SubjectTrial(
        pictures=_pictures(index, _LEARNED),
        references=references,
        prompt="a photo of a sks creature",
        prompts=("a photo of a sks creature", "a photo of a sks creature in the forest"),
        identity=lambda images: net.identity_score(images, references),
        quality=net.quality,
        learning={
            "steps": 300,
            "learning_rate": 5e-4,
            "batch_size": 8,
            "drawings": 8,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
        },
    )


def _pictures(index: int, numbers: range) -> Tensor:
    pictures = torch.stack([torch.from_numpy(world.subject(index, number)) for number in numbers])
    return (pictures * 255).round() / 255  # as a file has them
