"""From maps of text embeddings to an `Edit` that says how far it went, and warns when that is too far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pumice.erase.arguments import speaks_of, warn
from pumice.erase.closed_form import LinearMap
from pumice.erase.rows import Texts
from pumice.models import DiffusionModel, Edit, Mapped, UnsupportedModelError
from pumice.models.attention import check_plain
from pumice.models.changes import Change, relative_change

Projections = Literal["kv", "k", "v"]

HELD_OUT = (
    "a photo of a dog on the beach",
    "a woman reading a book in a cafe",
    "an oil painting of a mountain lake at sunset",
    "a red car parked in front of a house",
    "a bowl of fruit on a wooden table",
    "the skyline of a city at night",
    "a portrait of an old man with a beard",
    "a small boat on the sea under grey clouds",
)
"""Prompts that no method looks at, by which an edit's drift is measured."""

POOLED = "add_embedding.linear_1"

_MOST_CHANGE = 0.3  # of the weights' norm; pictures of everything suffer beyond it
_MOST_CONDITION = 1e12  # beyond it float64 leaves fewer than four digits


def projections(model: DiffusionModel, which: Projections = "kv") -> dict[str, Tensor]:
    """Key and value weights of all cross-attention layers by name.

    Raises:
        UnsupportedModelError: for fused, quantised, offloaded or LoRA-wrapped ones.
        ValueError: if one is not finite.
    """
    model.check_editable()
    weights = {
        f"{layer.name}.to_{letter}.weight": getattr(layer, f"to_{letter}").weight.detach()
        for layer in model.cross_attention.values()
        for letter in which
    }
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"pipe: its weight {name} is not finite")
    return weights


def pooled_linear(model: DiffusionModel) -> nn.Linear:
    """The layer by which a pooled text embedding enters the denoiser.

    Raises:
        UnsupportedModelError: for models without one, and if it cannot be edited.
    """
    modules = dict(model.eager_unet.named_modules())
    linear = modules.get(POOLED)
    if linear is None:
        raise UnsupportedModelError("pooled: got True, but the model takes no pooled text embedding")
    check_plain(POOLED, linear)
    if not bool(linear.weight.isfinite().all()):
        raise ValueError(f"pipe: its weight {POOLED}.weight is not finite")
    return linear


def pooled_map(linear: nn.Linear, found: LinearMap) -> LinearMap:
    """A map of pooled embeddings (p) as one of all that enters the layer: time ids, behind them, stay."""
    rest = linear.in_features - len(found.up)
    pad = nn.functional.pad
    return LinearMap(pad(found.up, (0, 0, 0, rest)), pad(found.down, (0, rest)), found.condition)


def edit_of(
    model: DiffusionModel,
    maps: Mapping[str, LinearMap],
    *,
    method: str,
    concepts: Sequence[str],
    settings: Mapping[str, Any],
    texts: Texts,
    residual: float,
    details: Mapping[str, Any] = {},
    base: str | None = None,
) -> Edit:
    """The edit that maps the input of each named weight, with its report and its warnings.

    Args:
        residual: how far the rows are from where they should be, relative to how far they had to go.
        details: what else the method measured.
        base: the model's fingerprint, if that is known.
    """
    compact = {id(found): found.compact() for found in maps.values()}
    maps = {name: compact[id(found)] for name, found in maps.items()}
    changes: dict[int, Mapped] = {}  # layers share maps, and maps share factors
    factors: dict[int, Tensor] = {}
    for found in maps.values():
        for factor in (found.up, found.down):
            if id(factor) not in factors:
                if not bool(factor.isfinite().all()):
                    raise ValueError("pipe: the edit is not finite; are its text embeddings?")
                factors[id(factor)] = factor.float().cpu().contiguous()
        if id(found) not in changes:
            changes[id(found)] = Mapped(factors[id(found.up)], factors[id(found.down)])
    named: dict[str, Change] = {name: changes[id(found)] for name, found in maps.items()}
    measured = {
        **relative_change(_factors(model, maps)),
        "condition_number": max(found.condition for found in maps.values()),
        "residual": residual,
        "drift": _drift(
            texts, concepts, [found for name, found in maps.items() if not name.startswith(POOLED)]
        ),
        "rank": max(change.rank for change in changes.values()),
        "encoder_calls": texts.calls,
        **details,
    }
    edit = Edit.made(
        model,
        named,
        base=base,
        method=method,
        targets=tuple(concepts),
        settings=settings,
        details=measured,
    )
    warn_if_far(measured)
    return edit


def residual(found: LinearMap, c: Tensor, g: Tensor) -> float:
    """|M c - g| / |c - g| over all rows: 0 where every row is mapped onto its target, 1 for no edit."""
    way = float((c - g).norm())
    return float((found(c) - g).norm()) / way if way else 0.0


def _factors(
    model: DiffusionModel, maps: Mapping[str, LinearMap]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Weights with the factors of their changes, W (M - I) = (W up) down."""
    ups = {id(found): found.up.float() for found in maps.values()}
    for name, found in maps.items():
        weight = model.eager_unet.get_parameter(name).detach()
        # offloaded weights are elsewhere than the texts' embeddings
        up = weight.float() @ ups[id(found)].to(weight.device)
        yield name, weight, up.to(found.down), found.down


def _drift(texts: Texts, concepts: Sequence[str], maps: Sequence[LinearMap]) -> float:
    """Mean of |(M - I) e| / |e| over the tokens e of `HELD_OUT`, from BOS to EOS, and over the layers.

    Texts that speak of a concept are left out, as far as others remain.
    """
    others = [text for text in HELD_OUT if not any(speaks_of(text, concept) for concept in concepts)]
    others = others or list(HELD_OUT)
    texts.encode(others)
    rows = torch.cat([texts[text].embeds[: texts[text].tokens.eos + 1] for text in others])
    distinct = {id(found): found for found in maps}
    shares = {
        key: float(((found(rows) - rows).norm(dim=1) / rows.norm(dim=1)).mean())
        for key, found in distinct.items()
    }
    return sum(shares[id(found)] for found in maps) / len(maps)


def warn_if_far(details: Mapping[str, Any]) -> None:
    """Warn of a change, or a condition number, at which an edit rarely does what was meant."""
    change, condition = details["overall_change"], details["condition_number"]
    if change > _MOST_CHANGE:
        warn(
            f"the edit changes the weights by {change:.0%} of their norm, more than {_MOST_CHANGE:.0%}: "
            "pictures of everything may suffer; give more texts to preserve, or a weaker edit"
        )
    if condition > _MOST_CONDITION:
        warn(f"the equation is badly conditioned ({condition:.1g}): few digits of the edit mean anything")
