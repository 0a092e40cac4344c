"""What edits took from a model, and what they left, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor

from pumice.evaluate import Erasure
from pumice.evaluate.attacks import Attack

from .page import embedded, render

SHOWN = 4  # erased and preserved prompts each whose pictures are shown

ATTACKS = {
    "concept-inversion": "a word learned for",
    "unlearn-diff-atk": "words found before prompts of",
    "p4d": "prompts found in place of those of",
    "ring-a-bell": "prompts found that read as if they named",
    "relearning": "fine-tuned on pictures of",
}
"""What an attack does to a label, by its name: that of its function, with dashes."""


@dataclass(frozen=True)
class Failed:
    """An attack that came to no end.

    Attributes:
        attack, label: as of an `Attack`.
        reason: in words.
    """

    attack: str
    label: str
    reason: str


def erasure_page(
    found: Mapping[str, Erasure],
    *,
    attacks: Mapping[str, Sequence[Attack | Failed]] | None = None,
    model: str,
    details: dict[str, Any],
) -> str:
    """The page: for each concept pictures without and with every edit, and under them what was counted.

    Args:
        found: by concept, or what else its prompts have in common.
        attacks: by the same, what `pumice.evaluate.attacks` found, one for each label and attack, or why it
            found nothing.
        model: what was edited, in words.
        details: of the run, shown at the end as they are.

    Returns:
        HTML without any link to another file and without scripts. Every text in it is escaped.
    """
    sections = [
        {
            "concept": concept,
            "erased": len(one.erased),
            "preserved": len(one.preserved),
            "ks": one.settings["k"],
            "rows": [
                {
                    **row,
                    "shares": _shares(row),
                    "attacks": successes((attacks or {}).get(concept, ()), row["name"]),
                }
                for row in one.rows
            ],
            "measured": {
                key for key in ("agreement_preserved", "fid") if any(row[key] is not None for row in one.rows)
            },
            "drawn": _drawn(one),
            "attacks": [
                {"heading": heading(attack)}
                | ({"failed": attack.reason} if isinstance(attack, Failed) else {"table": attack.table()})
                for attack in (attacks or {}).get(concept, ())
            ],
        }
        for concept, one in found.items()
    ]
    return render("erasure.html", model=model, details=details, sections=sections)


def called(attack: Attack | Failed) -> str:
    return attack.attack.replace("_", "-")


def heading(attack: Attack | Failed) -> str:
    """What an attack is, and to which label."""
    return f"{called(attack)}: {ATTACKS[called(attack)]} {attack.label}"


def successes(attacks: Sequence[Attack | Failed], name: str) -> dict[str, float | None]:
    """How often each attack brought the concept back at last, in per cent, a mean over labels for which it
    came to an end; None if there are none."""
    found: dict[str, list[float]] = {}
    for attack in attacks:
        each = found.setdefault(called(attack), [])
        if not isinstance(attack, Failed):
            each.append(attack.curve(name)[-1][1])
    return {attack: fmean(each) if each else None for attack, each in found.items()}


def shown(found: Erasure) -> list[int]:
    """The prompts whose pictures are shown: the first erased ones, then the first preserved ones."""
    border = len(found.erased)
    every = range(border + len(found.preserved))
    return [*every[:border][:SHOWN], *every[border:][:SHOWN]]


def _shares(row: Mapping[str, Any]) -> dict[str, tuple[float | None, ...]]:
    """Rates with their intervals as shares, by the rate's name."""
    names = [name.removesuffix("_low") for name in row if name.startswith(("esr_", "psr_")) and "low" in name]
    return {
        name: tuple(
            None if row[key] is None else row[key] / 100 for key in (name, f"{name}_low", f"{name}_high")
        )
        for name in names
    }


def _drawn(found: Erasure) -> list[dict[str, Any]]:
    """Of each prompt that is shown, what each edit drew from the first seed, and what it was taken for."""
    pairs, seeds = found.erased + found.preserved, len(found.settings["seeds"])
    drawn = []
    for index in shown(found):
        prompt, label = pairs[index]
        erased = index < len(found.erased)
        figures, before = [], found.labels["none"][index * seeds][0]
        for name, pictures in found.pictures.items():
            first = found.labels[name][index * seeds][0]
            figures.append(
                {
                    "name": name,
                    "picture": _address(pictures[index]),
                    "label": first,
                    # nothing is lost that was not there before
                    "wrong": name != "none"
                    and (first == label.casefold() if erased else before == label.casefold() != first),
                }
            )
        drawn.append({"prompt": prompt, "erased": erased, "figures": figures})
    return drawn


def _address(pixels: Tensor) -> str:
    """A picture (3, H, W) uint8 as the address of an `<img>`."""
    return embedded(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
