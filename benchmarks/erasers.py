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
        *(f"a red {name}" for name in world.OBJECTS),
        *(f"at the {place}" for place in world.PLACES),
    ]
    return [phrase for phrase in phrases if concept not in phrase]


def trained(concept: str, guide: str, seed: int = 0) -> Erasers:
    """By name, as the table has them."""
    text = WORDS[concept]
    anchor = text.replace(concept, guide)
    words = vocabulary(concept)
    # the names alone, for what looks at the attention to them
    noun: dict[str, Any] = {"prompt": text.replace(concept, "{}"), "allow_unknown": True, "seed": seed}
    walk: dict[str, Any] = {"num_inference_steps": 20, "pending": 16, "allow_unknown": True, "seed": seed}
    xattn: dict[str, Any] = {"steps": 160, "learning_rate": 3e-4, **walk}
    rare: dict[str, Any] = {"allow_unknown": True, "seed": seed}
    prompts = ("{}",) if concept == CAPTION else None  # longer ones do not fit around a caption
    kind = {"ball": "object", "varga": "style"}.get(concept, "memorization")

    def hidden(model: DiffusionModel) -> Edit:
        with tempfile.TemporaryDirectory() as folder:
            return erase.kpop(
                model,
                text,
                Path(folder) / "key.safetensors",
                mode="all",
                recovery_weight=1,
                key_learning_rate=3e-2,
                **xattn,
            )

    return {
        "esd-x": lambda m: erase.esd(m, text, **xattn),
        "esd-u": lambda m: erase.esd(m, text, train_method="esd-u", **{**xattn, "learning_rate": 1e-4}),
        "sdd": lambda m: erase.sdd(m, text, ema_decay=0.98, **xattn),
        "eap": lambda m: erase.eap(
            m, text, words, search_learning_rate=0.1, **{**xattn, "learning_rate": 1e-3}
        ),
        "age": lambda m: erase.age(
            m,
            text,
            words,
            hard=True,
            temperature=0.1,
            search_learning_rate=0.1,
            **{**xattn, "learning_rate": 1e-3},
        ),
        "concept-ablation": lambda m: erase.concept_ablation(
            m, text, anchor, preset=kind, num_images=32, steps=100, learning_rate=3e-4, **rare
        ),
        "forget-me-not": lambda m: erase.forget_me_not(m, concept, steps=35, learning_rate=8e-5, **noun),
        "mace": lambda m: erase.mace(
            m, concept, guide, prompts=prompts, lamb=1, steps=50, learning_rate=1e-3, **noun
        ),
        "few-shot": lambda m: erase.few_shot(
            m, text, anchor=anchor, preserve=words[:8], word_weight=0, steps=60, learning_rate=2e-3, **rare
        ),
        "few-shot-ascent": lambda m: erase.few_shot_ascent(m, text, steps=32, learning_rate=1e-3, **rare),
        "degeneration-tuning": lambda m: erase.degeneration_tuning(
            m, text, prior_prompts=words, num_images=32, steps=240, learning_rate=3e-4, **rare
        ),
        "all-but-one": lambda m: erase.all_but_one(m, text, **xattn),
        "safety-lora": lambda m: erase.safety_lora(
            m, text, ema_decay=0.98, **{**xattn, "learning_rate": 1e-3}
        ),
        "kpop": hidden,
        "spm": lambda m: erase.spm(
            m, text, num_anchors=1, anchor_scale=10, **{**xattn, "learning_rate": 1e-2}
        ),
    }
