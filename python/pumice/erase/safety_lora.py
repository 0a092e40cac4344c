"""A safety module: a LoRA that erases, trained on the base model, put beside what was fine-tuned from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pumice.erase.esd import esd
from pumice.erase.sdd import sdd
from pumice.models import Edit
from pumice.models.arguments import checked_count

Objective = Literal["sdd", "esd"]


def safety_lora(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    objective: Objective = "sdd",
    rank: int = 4,
    learning_rate: float = 1e-4,
    **options: Any,
) -> Edit:
    """Erase concepts by a LoRA that is trained apart from any fine-tune, and put beside it.

    ::

        W* = W0 + dW_safe + dW_finetune

    Both changes are trained on W0, so that fine-tuning never sees the erased model, which it would bring back
    (arXiv:2412.00357)::

        edit = safety_lora(base, "a concept")
        edit.rebased(finetuned).apply(finetuned)

    Args:
        pipe: the base model W0: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not
            changed.
        concepts: as the model's captions word them.
        objective: whose loss it learns by, that of "sdd" or "esd".
        rank: of the LoRA.
        learning_rate: of its matrices, larger than that of weights. The paper's could not be checked, nor its
            rank.
        options: of `sdd` or `esd`.

    Returns:
        An `Edit`, a LoRA; `save_lora` writes it for other programs, and `rebased` fits it to a fine-tune.
        With "sdd" its two matrices are means, each of its own, so that it stays of that rank.

    Raises:
        As `sdd` and `esd`; ValueError for another objective.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective: got {objective!r}, expected one of {', '.join(get_args(Objective))}")
    checked_count("rank", rank)  # None would train weights
    objectives: dict[Objective, Callable[..., Edit]] = {"sdd": sdd, "esd": esd}
    edit = objectives[objective](pipe, concepts, rank=rank, learning_rate=learning_rate, **options)
    return replace(edit, method="safety_lora", settings={"objective": objective, **edit.settings})
