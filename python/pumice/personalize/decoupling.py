"""Contrastive decoupling: a phrase that the noise of pictures is put down to, and that drawings go without.

Of "Investigating and Defending Shortcut Learning in Personalized Diffusion Models" (arXiv:2406.18944): a
subject's pictures are learned "with" the noise phrase, those of its class "without" it, and so is drawn; what
protects the pictures is then learned as the phrase's meaning instead of the subject's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pumice.models.arguments import check_prompt

NOISE_PHRASE = "bhj noisy pattern"
"""That of the authors' code; the paper writes "XX noisy pattern"."""

NEGATIVE_PROMPT = "noisy, lowres, artifact, pattern"
"""What quality-enhanced sampling guides away from, of the authors' code."""


def with_noise(prompt: str, noise_phrase: str | None) -> str:
    """The prompt of a subject's pictures."""
    return f"{prompt}, {noise_phrase}" if noise_phrase else prompt


def without_noise(prompt: str, noise_phrase: str | None) -> str:
    """The prompt of pictures of the class, and of drawings."""
    return f"{prompt}, without {noise_phrase}" if noise_phrase else prompt


def check_prompts(prompt: str, class_prompt: str | None, noise_phrase: str | None) -> None:
    """Make sure that a subject has a name, and that the noise has another one and a class that goes without.

    Raises:
        TypeError: if one is no string.
        ValueError: if a prompt is empty, or the subject's has no word that that of the class lacks; if the
            noise phrase is empty, has a word that names the subject, or comes without a class.
    """
    check_prompt("prompt", prompt)
    if not _words(prompt):
        raise ValueError(f"prompt: got {prompt!r}, expected words such as 'a photo of sks person'")
    named = _words(prompt)
    if class_prompt is not None:
        check_prompt("class_prompt", class_prompt)
        if not _words(class_prompt):
            raise ValueError(f"class_prompt: got {class_prompt!r}, expected words, or None")
        named = [word for word in named if word not in _words(class_prompt)]
        if not named:
            raise ValueError(
                f"prompt: got {prompt!r}, which names no subject: class_prompt {class_prompt!r} has all "
                "of its words; expected a rare word too, such as 'sks'"
            )
    if noise_phrase is None:
        return
    check_prompt("noise_phrase", noise_phrase)
    if not _words(noise_phrase):
        raise ValueError(f"noise_phrase: got {noise_phrase!r}, expected words, or None")
    shared = [word for word in _words(noise_phrase) if word in named]
    if shared:
        raise ValueError(
            f"noise_phrase: got {noise_phrase!r}, which has {shared[0]!r} in common with the subject's prompt"
        )
    if class_prompt is None:
        raise ValueError(
            "class_prompt: got none, expected one with a noise_phrase: pictures of the class are what "
            "'without' it is learned from"
        )


def _words(text: str) -> Sequence[str]:
    return re.findall(r"\w+", text.casefold())
