"""Pictures of a model and of its edits, from the same noise and in the same batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pumice.models import Added, Edit, Mapped, hook_edits

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


def draw(pipe: Any, seeds: Sequence[int], copies: int, **inputs: Any) -> Tensor:
    """Pictures (copies, B, 3, H, W), uint8 on the CPU, of B seeds.

    The copies of a sample stand beside each other in the batch and start from the same noise, each from a
    generator of its own, so that a picture does not depend on what else is drawn.
    """
    with _bare(pipe):
        images = pipe(
            **inputs,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds for _ in range(copies)],
            output_type="pt",
        ).images
    images = images.float().cpu()
    if not bool(images.isfinite().all()):
        raise ValueError("pipe: it drew pictures that are not finite")
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.unflatten(0, (len(seeds), copies)).transpose(0, 1)


@contextmanager
def _bare(pipe: Any) -> Iterator[None]:
    """Inside the block, no checker blackens pictures, which would look erased, and no bar is shown."""
    checker, bar = getattr(pipe, "safety_checker", None), dict(getattr(pipe, "_progress_bar_config", {}))
    try:
        pipe.set_progress_bar_config(**{**bar, "disable": True})
        if checker is not None:
            pipe.safety_checker = None
        yield
    finally:
        pipe.set_progress_bar_config(**bar)
        if checker is not None:
            pipe.safety_checker = checker


def checked_labels(found: Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """What `classify` returned for so many pictures, in lower case."""
    if len(found) != count:
        raise ValueError(f"classify: returned {len(found)} lists of labels, expected {count}, one a picture")
    for labels in found:
        if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"classify: returned {labels!r} for a picture, expected a list of labels")
    return [tuple(label.casefold() for label in labels) for labels in found]


def _is_map(edit: Edit) -> bool:
    return all(isinstance(change, Mapped | Added) for change in edit.changes.values())
