"""Pictures of a model and of its edits, from the same noise and in the same batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pumice.models import Added, Edit, Shifted, hook_edits
from pumice.models.changes import Chain, Change
from pumice.models.edit import TEXT
from pumice.models.hooking import zeroes

ORIGINAL = "none"
"""The name of the model without an edit."""

_ENTRIES = 2**30  # of whole weights that edits of one batch add to: 4 GiB in float32


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
    """Which edits share batches: at most so many that can be hooked for little time and memory."""
    found: list[dict[str, Edit | None]] = []
    entries = 0
    for name, edit in edits.items():
        if edit is not None and not _can_share(edit):
            continue
        entries += (size := _entries(edit))
        if not found or len(found[-1]) == most or entries > _ENTRIES:
            found.append({})
            entries = size
        found[-1][name] = edit
    return found + [{name: edit} for name, edit in edits.items() if edit is not None and not _can_share(edit)]


def edited(
    pipe: Any, edits: Sequence[Edit | None], *, base: str | None = None
) -> AbstractContextManager[None]:
    """Inside the block, sample i of every batch is drawn under `edits[i % len(edits)]`, one of `groups`.

    base: the model's fingerprint, if that is known, as `hook_edits` takes it.
    """
    first = edits[0]
    if len(edits) > 1:
        return hook_edits(pipe, edits, base=base)
    return nullcontext() if first is None else first.on(pipe)


def checked_labels(found: Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """What `classify` returned for so many pictures, in lower case."""
    if len(found) != count:
        raise ValueError(f"classify: returned {len(found)} lists of labels, expected {count}, one a picture")
    for labels in found:
        if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"classify: returned {labels!r} for a picture, expected a list of labels")
    return [tuple(label.casefold() for label in labels) for labels in found]


def _can_share(edit: Edit) -> bool:
    """Whether samples beside it can be under other edits, and in less time than in batches of their own."""
    return not any(
        name.startswith(TEXT) or zeroes(change) or _convolves(change) for name, change in edit.changes.items()
    )


def _convolves(change: Change) -> bool:
    """Whether hooks have as much to do as the convolution itself."""
    if isinstance(change, Chain):
        return any(map(_convolves, change.parts))
    return isinstance(change, Shifted) and change.delta.ndim == 4


def _entries(edit: Edit | None) -> int:
    """Of whole weights that it adds to, which hooks have on the device."""
    return 0 if edit is None else sum(map(_whole, edit.changes.values()))


def _whole(change: Change) -> int:
    if isinstance(change, Chain):  # which hooks multiply out
        return max(
            len(part.up) * part.down.shape[1] if isinstance(part, Added) else _whole(part)
            for part in change.parts
        )
    return change.delta.numel() if isinstance(change, Shifted) else 0
