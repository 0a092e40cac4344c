"""What the rare word of a personalized model has come to mean: two prompts, drawn and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pumice import models
from pumice.evaluate.scores import checked_scores, mean
from pumice.models import RowBudget
from pumice.models.arguments import check_prompt, check_scale, checked_count, first_seed
from pumice.models.drawing import draw
from pumice.personalize import Personalized
from pumice.personalize.decoupling import without_noise


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What a model draws of a rare word alone, and of the word with its class.

    Attributes:
        rows: one a prompt, the word alone first: `prompt`, and for each judge its mean, with _low and _high,
            the normal 95 % interval over the drawings.
        scores: by prompt and judge, (D,) float64.
        pictures: by prompt, (D, 3, H, W) uint8 on the CPU, of the same noise.
    """

    rows: tuple[dict[str, Any], ...]
    scores: dict[str, dict[str, Tensor]]
    pictures: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, without the pictures."""
        scores = {
            prompt: {judge: values.tolist() for judge, values in found.items()}
            for prompt, found in self.scores.items()
        }
        return {"rows": [dict(row) for row in self.rows], "scores": scores}


@torch.no_grad()
def interpretation(
    pipe: Any,
    word: str = "sks",
    class_noun: str = "person",
    *,
    judges: Mapping[str, Callable[[Tensor], Tensor]],
    template: str = "a photo of {}",
    drawings: int = 8,
    num_inference_steps: int = 100,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 8,
) -> Interpretation:
    """Ask a personalized model what its rare word means: draw it alone, and with the word for its class.

    A model that has taken the shortcut of arXiv:2406.18944 draws the noise of its pictures for "a photo of
    sks", and a damaged subject for "a photo of sks person"; one that has not draws the subject for both.

    Args:
        pipe: a pipeline of diffusers, a path, a hub id, or a `Personalized`, of which one with a noise phrase
            is asked "without" it, as it is drawn from. It is not changed.
        word: that the subject was learned under.
        class_noun: what it is one of.
        judges: by name, pictures (D, 3, H, W) in [0, 1] to (D,), such as identity, quality, and the
            probability of being the subject and no noise (`evaluate.mismatch`).
        template: of both prompts, with {} for the words.
        drawings: of each prompt.
        num_inference_steps: of the pipeline's own scheduler. Default 100, of the paper's code.
        guidance_scale: default 7.5, of the same.
        seed: of the first drawing, one more for each further one, the same for both prompts.
        batch_size: pictures in one call; halved on out-of-memory.

    Returns:
        An `Interpretation`.

    Raises:
        TypeError: if a text is no string.
        ValueError: for a template without {}, numbers out of range, and if what a judge returns does not fit.
    """
    for name, text in {"word": word, "class_noun": class_noun, "template": template}.items():
        check_prompt(name, text)
    if "{}" not in template:
        raise ValueError(f"template: got {template!r}, expected one with {{}} for the words")
    drawings, first = checked_count("drawings", drawings), first_seed(seed)
    check_scale("guidance_scale", guidance_scale)
    inputs = {
        "num_inference_steps": checked_count("num_inference_steps", num_inference_steps),
        "guidance_scale": guidance_scale,
    }
    phrase = pipe.noise_phrase if isinstance(pipe, Personalized) else None
    model = models.load(pipe.pipe if isinstance(pipe, Personalized) else pipe)
    model.check_text_to_image()
    budget = RowBudget(checked_count("batch_size", batch_size))
    pictures, scores, rows = {}, {}, []
    for words in (word, f"{word} {class_noun}"):
        prompt = without_noise(template.replace("{}", words), phrase)
        with model.frozen():
            found = budget.run(partial(_drawn, model.pipe, prompt, range(first, first + drawings), inputs))
        pictures[prompt] = found
        scores[prompt] = {
            name: checked_scores(name, judge(found / 255), drawings) for name, judge in judges.items()
        }
        row: dict[str, Any] = {"prompt": prompt}
        for name, values in scores[prompt].items():
            row |= mean(name, values)
        rows.append(row)
    return Interpretation(tuple(rows), scores, pictures)


def _drawn(pipe: Any, prompt: str, seeds: Sequence[int], inputs: Mapping[str, Any], rows: int) -> Tensor:
    """(D, 3, H, W) uint8, so many in a call."""
    parts = [seeds[start : start + rows] for start in range(0, len(seeds), rows)]
    return torch.cat([draw(pipe, part, 1, prompt=[prompt] * len(part), **inputs)[0] for part in parts])
