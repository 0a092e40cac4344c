"""Which weights of a denoiser train, by the names that the erasure papers have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from pumice.models import DiffusionModel

_NOT_NOXATTN = ("conv_norm_out", "conv_out", "time_embedding")

SETS: Mapping[str, Callable[[str], bool]] = {
    "xattn": lambda name: ".attn2." in name,
    "xattn-kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "noxattn": lambda name: ".attn2." not in name and not name.startswith(_NOT_NOXATTN),
    "selfattn": lambda name: ".attn1." in name,
    "attn": lambda name: ".attn1." in name or ".attn2." in name,
    "full": lambda name: True,
}
"""By name, whether a weight is in the set.

- "xattn": cross-attention, query, key, value and output.
- "xattn-kv": its keys and values alone.
- "noxattn": all but cross-attention, the output layers (their norm included) and the embedding of time; the
  one of size and crop that Stable Diffusion XL has beside it trains, as the released code leaves out those
  names alone.
- "selfattn": self-attention.
- "attn": both.
- "full": everything.
"""


def parameters(model: DiffusionModel, which: str, *, rank: int | None = None) -> list[str]:
    """The names of the weights of a set; with `rank` those that can have a LoRA, of linear layers.

    Raises:
        ValueError: for a set that is none, or is empty in this model.
    """
    if which not in SETS:
        raise ValueError(f"parameters: got {which!r}, expected one of {', '.join(SETS)}")
    modules = dict(model.eager_unet.named_modules())

    def wanted(name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return SETS[which](name) and (
            rank is None or (leaf == "weight" and isinstance(modules[path], nn.Linear))
        )

    found = [name for name, _ in model.eager_unet.named_parameters() if wanted(name)]
    if not found:
        raise ValueError(f"parameters: got {which!r}, of which the model has none")
    return found
