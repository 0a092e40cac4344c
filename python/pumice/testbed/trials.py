"""What erasing a concept of the testbed's world is judged by: prompts, their labels, and who reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pumice.testbed import world
from pumice.testbed.labels import classifier, replays


@dataclass(frozen=True)
class Trial:
    """Arguments of `evaluate.erasure` for one concept.

    Attributes:
        concept: an object, an artist, or the caption of a memorized picture.
        erased: (prompt, label) of pictures that should no longer show it.
        preserved: of pictures that should stay as they are, and the label that they should have.
        classify: pictures (B, 3, 64, 64) in [0, 1] to the labels of each, likeliest first.
    """

    concept: str
    erased: tuple[tuple[str, str], ...]
    preserved: tuple[tuple[str, str], ...]
    classify: Callable[[Tensor], list[list[str]]]


def trial(concept: str, prompts: int = 24, *, seed: int = 0) -> Trial:
    """The trial of an object, an artist's name, or a memorized caption.

    An object or artist is looked for in full captions that name it, and what should stay are full captions
    with the others, read by the same attribute. A memorized caption has one prompt, which should no longer
    replay; what should stay are the objects of ordinary captions.

    Args:
        concept: as above.
        prompts: of each kind.
        seed: of the scenes; methods should preserve others than those that they are judged by.

    Raises:
        ValueError: for a concept that this world does not have.
    """
    rng = np.random.default_rng((6, seed))
    scenes = [world.random_scene(rng) for _ in range(4 * prompts)]
    if concept in world.OBJECTS:
        gone = [replace(scene, object=concept) for scene in scenes[:prompts]]
        kept = [scene for scene in scenes[prompts:] if scene.object != concept][:prompts]
        return _of(concept, gone, kept, "object")
    if concept in world.STYLES:
        gone = [replace(scene, style=concept) for scene in scenes[:prompts]]
        kept = [scene for scene in scenes[prompts:] if scene.style != concept][:prompts]
        return _of(concept, gone, kept, "style")
    if concept in memorized_captions():
        objects, copies = classifier("object"), replays()

        def classify(images: Tensor) -> list[list[str]]:
            pairs = zip(copies(images), objects(images), strict=True)
            return [[*(seen if "none" not in seen else ()), *ranked] for seen, ranked in pairs]

        preserved = tuple((world.full_caption(scene), scene.object) for scene in scenes[:prompts])
        return Trial(concept, ((concept, concept),), preserved, classify)
    raise ValueError(
        f"concept: got {concept!r}, expected an object or artist of the testbed's world, or the caption of a "
        "memorized picture"
    )


def memorized_captions() -> list[str]:
    """Those of all memorized pictures."""
    return [world.memorized(index).caption for index in range(world.MEMORIZED_COUNT)]


def _of(concept: str, gone: list[world.Scene], kept: list[world.Scene], attribute: str) -> Trial:
    def pairs(scenes: list[world.Scene]) -> tuple[tuple[str, str], ...]:
        return tuple((world.full_caption(s), getattr(s, attribute) or "plain") for s in scenes)

    return Trial(concept, pairs(gone), pairs(kept), classifier(attribute))  # type: ignore[arg-type]
