"""Pictures of a model and of its edits, from the same noise and in the same batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pumice.models import Added, Edit, Mapped, hook_edits
from pumice.models.edit import TEXT

ORIGINAL = "none"
"""The name of the model without an edit."""


def checked_edits(edits: Mapping[str, Edit]) -> dict[str, Edit | None]:
    """The model as it is, and then the edits by name."""
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits: got a {type(edits).__name__}, expected edits by name")
    for name, edit in edits.items():
        if not isinstance(name, str) or not isinstance(edit, Edit):
            raise TypeError(f"edits: got a {type(edit).__name__} under {name!r}, expected edits by name")
        if name in ("", ORIGINAL):
            raise ValueError(f"edits: got the name {name!r}, expected another; {ORIGINAL!r} is added")
    return {ORIGINAL: None, **edits}


def groups(edits: Mapping[str, Edit | None], most: int) -> list[dict[str, Edit | None]]:
    """Which edits share batches: at most so many maps of text embeddings; one that is no map is alone."""
    together = {name: edit for name, edit in edits.items() if edit is None or _is_map(edit)}
    names = list(together)
    parts = [names[start : start + most] for start in range(0, len(names), most)]
    alone = [[name] for name in edits if name not in together]
    return [{name: edits[name] for name in part} for part in parts + alone]


def edited(pipe: Any, edits: Sequence[Edit | None]) -> AbstractContextManager[None]:
    """Inside the block, sample i of every batch is drawn under `edits[i % len(edits)]`, one of `groups`."""
    if not any(edits):
        return nullcontext()
    first = edits[0]
    if len(edits) == 1 and first is not None and not _is_map(first):
        return first.on(pipe)
    return hook_edits(pipe, edits)


def checked_labels(found: Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """What `classify` returned for so many pictures, in lower case."""
    if len(found) != count:
        raise ValueError(f"classify: returned {len(found)} lists of labels, expected {count}, one a picture")
    for labels in found:
        if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"classify: returned {labels!r} for a picture, expected a list of labels")
    return [tuple(label.casefold() for label in labels) for labels in found]


def _is_map(edit: Edit) -> bool:
    return all(
        isinstance(change, Mapped | Added) and not name.startswith(TEXT)
        for name, change in edit.changes.items()
    )
