"""What edits took from a model, and what they left, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from pumice.evaluate import Erasure, Inversion

from .page import embedded, render

SHOWN = 4  # erased and preserved prompts each whose pictures are shown


def erasure_page(
    found: Mapping[str, Erasure],
    *,
    attacks: Mapping[str, Sequence[Inversion]] | None = None,
    model: str,
    details: dict[str, Any],
) -> str:
    """The page: for each concept pictures without and with every edit, and under them what was counted.

    Args:
        found: by concept, or what else its prompts have in common.
        attacks: by the same, what `evaluate.concept_inversion` found, one for each label.
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
            "rows": [{**row, "shares": _shares(row)} for row in one.rows],
            "measured": {
                key for key in ("agreement_preserved", "fid") if any(row[key] is not None for row in one.rows)
            },
            "drawn": _drawn(one),
            "attacks": [
                {"label": attack.label, "curves": {name: attack.curve(name) for name in attack.vectors}}
                for attack in (attacks or {}).get(concept, ())
            ],
        }
        for concept, one in found.items()
    ]
    return render("erasure.html", model=model, details=details, sections=sections)


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
