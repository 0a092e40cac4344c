"""What the methods of this folder take, checked in one place."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterable, Sequence


class ErasureWarning(UserWarning):
    """The edit was made, but what it does may not be what was wanted."""


def checked_texts(name: str, texts: str | Sequence[str], *, least: int = 1) -> tuple[str, ...]:
    """Strings that are not blank, each once, whatever their case and spacing."""
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: got a {type(texts).__name__}, expected strings")
    found = (texts,) if isinstance(texts, str) else tuple(texts)
    seen: dict[str, str] = {}
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"{name}: got a {type(text).__name__}, expected strings")
        key = normalized(text)
        if not key:
            raise ValueError(f"{name}: got {text!r}, expected texts that are not empty")
        if key in seen:
            raise ValueError(f"{name}: got {seen[key]!r} and {text!r}, expected each once")
        seen[key] = text
    if len(found) < least:
        raise ValueError(f"{name}: got {len(found)}, expected at least {least}")
    return found


def checked_guides(
    guide: str | Sequence[str], concepts: Sequence[str], name: str = "guide"
) -> tuple[str, ...]:
    """One guide for each concept, other than the concept; a blank one is allowed."""
    if isinstance(guide, bytes) or not isinstance(guide, Iterable):
        raise TypeError(f"{name}: got a {type(guide).__name__}, expected strings")
    guides = (guide,) * len(concepts) if isinstance(guide, str) else tuple(guide)
    if len(guides) != len(concepts):
        raise ValueError(
            f"{name}: got {len(guides)}, expected one, or one for each of {len(concepts)} concepts"
        )
    for concept, text in zip(concepts, guides, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"{name}: got a {type(text).__name__}, expected strings")
        if normalized(text) == normalized(concept):
            raise ValueError(f"{name}: got {text!r} for {concept!r}, expected something else")
    return guides


def checked_preserve(
    preserve: str | Sequence[str], concepts: Sequence[str], name: str = "preserve"
) -> tuple[str, ...]:
    """Texts to preserve; none is a concept, and one that speaks of a concept is warned about."""
    if isinstance(preserve, Iterable) and not isinstance(preserve, str | bytes):
        # lists of files repeat themselves, which weighs nothing
        preserve = list(
            {normalized(text) if isinstance(text, str) else text: text for text in preserve}.values()
        )
    found = checked_texts(name, preserve, least=0)
    erased = {normalized(concept): concept for concept in concepts}
    speaking = []
    for text in found:
        key = normalized(text)
        if key in erased:
            raise ValueError(f"{name}: got the concept {text!r} itself, expected texts without it")
        speaking += [(text, concept) for concept in concepts if speaks_of(text, concept)][:1]
    if speaking:
        text, concept = speaking[0]
        more = f" ({len(speaking) - 1} more texts do so)" if len(speaking) > 1 else ""
        warn(f"{name}: {text!r} speaks of {concept!r}, which is to be erased{more}: each weakens the other")
    return found


def speaks_of(text: str, concept: str) -> bool:
    """Whether the concept's words are in the text."""
    text, concept = normalized(text), normalized(concept)
    # the first is fast, for thousands of texts and concepts
    return concept in text and re.search(rf"(?<!\w){re.escape(concept)}(?!\w)", text) is not None


def checked_templates(name: str, templates: Sequence[str], *, least: int = 0) -> tuple[str, ...]:
    """Texts that have one place for the concept, each once."""
    if isinstance(templates, str) or not isinstance(templates, Iterable):
        raise TypeError(f"{name}: got a {type(templates).__name__}, expected a list of templates")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"{name}: got {template!r}, expected templates with one {{}} for the concept")
    if len(templates) < least:
        raise ValueError(f"{name}: got {len(templates)}, expected at least {least}")
    return tuple(dict.fromkeys(templates))


def check_scale(name: str, value: float, *, positive: bool = False) -> float:
    """A finite number that is not negative."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got a {type(value).__name__}, expected a number")
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "positive" if positive else "non-negative"
        raise ValueError(f"{name}: got {value}, expected a {kind} number")
    return value


def too_few_rows(lamb: float, error: Exception) -> ValueError:
    """What a singular equation means to who called."""
    return ValueError(f"lamb: got {lamb} with too few rows to preserve, expected a larger one ({error})")


def normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def warn(message: str) -> None:
    """Warn at the line that called pumice."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("pumice", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ErasureWarning, stacklevel=level)
