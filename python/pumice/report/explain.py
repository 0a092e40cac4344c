"""Which words of prompts matter, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pumice.memorization.explain import Explanation

from .page import render


def explain_page(explanations: Sequence[Explanation], *, model: str, details: dict[str, Any]) -> str:
    """The page: each prompt with its words shaded by significance, and the words ranked with their numbers.

    Args:
        model: what was asked, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML without any link to another file and without scripts. Every text in it is escaped.
    """
    prompts = []
    for explanation in explanations:
        highest = max(word.score for word in explanation.words)
        words: list[dict[str, Any]] = [
            {"text": word.text, "score": word.score, "share": word.score / highest if highest else 0.0}
            for word in explanation.words
        ]
        prompts.append(
            {
                "text": explanation.prompt,
                "magnitude": explanation.magnitude,
                "highest": highest,
                "words": words,
                "ranked": sorted(words, key=lambda word: -word["score"]),
            }
        )
    return render("explain.html", model=model, details=details, prompts=prompts)
