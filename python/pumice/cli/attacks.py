"""The attacks of `pumice evaluate erase`: what they work on there, and how long."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing them takes seconds, which --help should not
    from torch import Tensor

    from pumice.evaluate import Erasure
    from pumice.evaluate.attacks import Attack
    from pumice.models import DiffusionModel, Edit
    from pumice.report.erasure import Failed
    from pumice.testbed import Trial

# Functions of pumice.evaluate.attacks, with dashes.
ATTACKS = ("concept-inversion", "unlearn-diff-atk", "p4d", "ring-a-bell", "relearning")
PICTURES = 6  # of the concept, about the papers'
_TIMESTEP = 40  # steps at each, of UnlearnDiffAtk


def parsed(text: str) -> dict[str, int | None]:
    """The attacks of "NAME[=STEPS],..." or "all[=STEPS]", and the steps of each, if any were given."""
    found: dict[str, int | None] = {}
    for part in text.split(","):
        name, has, steps = (each.strip() for each in part.partition("="))
        if name not in ("all", *ATTACKS):
            raise ValueError(f"--attacks: got {name!r}, expected some of {', '.join(ATTACKS)}, or all")
        if has and not (steps.isdecimal() and int(steps)):
            raise ValueError(f"--attacks: got {steps!r} steps of {name}, expected a number of at least 1")
        for each in ATTACKS if name == "all" else [name]:
            found[each] = int(steps) if has else None
    return found


def attack(
    opened: DiffusionModel,
    edits: Mapping[str, Edit],
    trial: Trial,
    found: Erasure,
    chosen: Mapping[str, int | None],
    **how: Any,
) -> Iterator[Attack | Failed]:
    """Each of the attacks on each label of a trial, from its prompts and what the model draws of them without
    an edit; one that fails does not end the others. `how` is what all attacks take."""
    from pumice.evaluate import attacks
    from pumice.report.erasure import Failed

    for label in dict.fromkeys(label for _, label in trial.erased):
        places = [place for place, (_, other) in enumerate(trial.erased) if other == label]
        seeds = len(found.settings["seeds"])
        # of pictures that do show it, if there are any
        shown = [p for p in places if label.casefold() == found.labels["none"][p * seeds][0]]
        places = (shown or places)[:PICTURES]
        prompts, pictures = [trial.erased[p][0] for p in places], found.pictures["none"][places] / 255
        for name, steps in chosen.items():
            inputs, settings = _inputs(name, label, prompts, pictures, steps)
            function = getattr(attacks, name.replace("-", "_"))
            try:
                yield function(
                    opened, edits, *inputs, label=label, classify=trial.classify, **settings, **how
                )
            except Exception as error:  # out of memory, a model that one of them cannot attack, ...
                reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
                yield Failed(function.__name__, label, reason)


def _inputs(
    name: str, label: str, prompts: Sequence[str], pictures: Tensor, steps: int | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What an attack works on, and how long if that was given."""
    budget = {} if steps is None else {"steps": steps}
    if name == "unlearn-diff-atk":
        if steps is not None:
            timesteps = -(-steps // _TIMESTEP)
            budget = {"timesteps": timesteps, "steps": -(-steps // timesteps)}
        return (pictures, prompts), budget
    if name == "p4d":
        return (prompts,), budget
    if name == "ring-a-bell":
        pairs = [_with_and_without(prompt, label) for prompt in prompts]
        without = [lacking or having for having, lacking in pairs]
        return (pairs, without), {} if steps is None else {"generations": steps}
    checkpoints = {"checkpoints": (0, steps // 2) if steps else (0,)}
    if name == "relearning":
        return (pictures, min(prompts, key=len)), budget | checkpoints
    return (pictures,), budget | checkpoints


def _with_and_without(prompt: str, label: str) -> tuple[str, str]:
    """A prompt that names what is looked for, and the same without that."""
    without = re.sub(rf"(?<!\w){re.escape(label)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    if without == prompt:
        return f"{prompt}, {label}", prompt
    return prompt, " ".join(without.split())
