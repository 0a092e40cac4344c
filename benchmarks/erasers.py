"""Every eraser, with what it is given on the embedded model; `erase_quality.py` judges them.

Settings of trained methods: the paper's objective; steps and learning rates of a model of 5 million weights,
which came from looking at this model, and latents of 16 steps drawn at once in 20 steps of DDIM.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pumice import erase, testbed
from pumice.models import DiffusionModel, Edit
from pumice.testbed import world

Erasers = dict[str, Callable[[DiffusionModel], Edit]]

CAPTION = testbed.memorized_captions()[0]
GUIDES = {"ball": "box", "varga": "okoro", CAPTION: "a picture"}
TEMPLATES = {
    "ball": ("a {}", "a photo of a {}", "a {} at the beach", "a {} in the city"),
    "varga": ("in the style of {}", "a red ball, in the style of {}", "a blue tent, in the style of {}"),
}


def closed_forms(concept: str, guide: str, keep: Sequence[str]) -> Erasers:
    """By name, as the table has them."""
    everything: dict[str, Any] = {"tokens": "all", "guide": guide}
    templates = TEMPLATES.get(concept, ())
    kept: dict[str, Any] = {"preserve": keep, "preserve_scale": 0.01}
    wordings, anchors = (
        [template.replace("{}", text) for template in ("{}", *templates)] for text in (concept, guide)
    )
    # longer ones do not fit around a caption, and TIME wants as many words
    short = {"prompts": ("{}",)} if concept == CAPTION else {}
    source, destination = f"a picture of {concept}", f"a picture of {guide}"
    if concept == CAPTION:
        source, destination = concept, "a picture of a red box, beach"
    return {
        "uce, defaults": lambda m: erase.uce(m, concept, guide=guide),
        "uce, all tokens": lambda m: erase.uce(m, concept, **everything),
        "uce, all tokens, preserve": lambda m: erase.uce(m, concept, expand=templates, **everything, **kept),
        "uce, tensor, preserve": lambda m: erase.uce(
            m, concept, technique="tensor", expand=templates, **everything, **kept
        ),
        "rece, defaults": lambda m: erase.rece(m, concept, guide=guide),
        "rece, preserve": lambda m: erase.rece(m, concept, guide=guide, **kept),
        "mace refine, defaults": lambda m: erase.mace_refine(m, concept, guide, **short),
        "mace refine, preserve": lambda m: erase.mace_refine(m, concept, guide, lamb=0.5, **short, **kept),
        "trce, lamb 1": lambda m: erase.trce(m, concept, guide, lamb=1, **_templates(concept)),
        "trce, preserve": lambda m: erase.trce(m, concept, guide, lamb=0.1, **_templates(concept), **kept),
        "speed, defaults": lambda m: erase.speed(m, concept, anchor=guide),
        "speed, all tokens, retain": lambda m: erase.speed(
            m, wordings, anchor=anchors, tokens="all", retain=keep, retain_scale=0.05, threshold=1
        ),
        "time, defaults": lambda m: erase.time(m, source, destination),
    }


def _templates(concept: str) -> dict[str, Any]:
    return {"templates": ("{}",)} if concept == CAPTION else {}



WORDS = {"ball": "a ball", "varga": "in the style of varga", CAPTION: CAPTION}
"""What the captions of the embedded model call them."""


def vocabulary(concept: str) -> list[str]:
    """Phrases of the embedded world, but for the concept's own."""
    phrases = [
        *(f"a {name}" for name in world.OBJECTS),
        *(f"in the style of {name}" for name in world.STYLES),
        *(f"a {colour} {name}" for colour in list(world.COLOURS)[:4] for name in world.OBJECTS),
        *(f"at the {place}" for place in world.PLACES),
    ]
    return [phrase for phrase in phrases if concept not in phrase]


def trained(concept: str, guide: str) -> Erasers:
    """By name, as the table has them."""
    text, anchor = WORDS[concept], WORDS.get(concept, "a picture").replace(concept, guide)
    how: dict[str, Any] = {"pending": 16, "allow_unknown": True}
    walk: dict[str, Any] = {"steps": 160, "learning_rate": 3e-4, "num_inference_steps": 20, **how}
    words = vocabulary(concept)
    key = Path(tempfile.gettempdir()) / "pumice-erasers-key.safetensors"
    return {
        "esd-x": lambda m: erase.esd(m, text, **walk),
        "esd-u": lambda m: erase.esd(m, text, train_method="esd-u", **{**walk, "learning_rate": 1e-4}),
        "sdd": lambda m: erase.sdd(m, text, ema_decay=0.98, **walk),
        "eap": lambda m: erase.eap(m, text, words, **walk),
        "age": lambda m: erase.age(m, text, words, **walk),
    }
