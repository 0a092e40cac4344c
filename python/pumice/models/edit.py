"""A change of a model's weights that is a thing of its own: put on, taken off to the bit, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import pumice
from pumice.io import check_writable, write_whole

from .attention import check_plain
from .fingerprint import fingerprint
from .loading import load
from .model import DiffusionModel

_FORMAT = "pumice.edit.1"
_BITS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, eq=False)
class Zeroed:
    """What is done to one weight: some of its entries become zero.

    Attributes:
        bits: (ceil(entries / 8),) uint8 on the CPU, 1 where zero, row by row, the first entry in
            the highest bit of the first byte.
        shape: of the weight.
    """

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, mask: Tensor) -> Zeroed:
        """From a boolean mask of the weight's shape, on any device."""
        flat = mask.flatten().byte()
        flat = nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
        bits = (flat * flat.new_tensor(_BITS)).sum(1, dtype=torch.uint8)
        return cls(bits.cpu(), tuple(mask.shape))

    def mask(self) -> Tensor:
        """The boolean mask on the CPU."""
        bits = (self.bits[:, None] & torch.tensor(_BITS, dtype=torch.uint8)) != 0
        return bits.flatten()[: self.size].reshape(self.shape)

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def count(self) -> int:
        """Entries that become zero."""
        return int(self.mask().sum())

    def originals(self, weight: Tensor) -> Tensor:
        """What `undo` needs: the entries that become zero, on the weight's device."""
        return weight.detach()[self.mask().to(weight.device)]

    def apply(self, weight: Tensor) -> None:
        weight.masked_fill_(self.mask().to(weight.device), 0)

    def undo(self, weight: Tensor, originals: Tensor) -> None:
        weight.masked_scatter_(self.mask().to(weight.device), originals.to(weight))


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a denoiser's weights, as methods that repair or erase return it.

    ::

        edit.apply(pipe)            with edit.on(pipe):        edit.save("edit.safetensors")
        edit.remove(pipe)               pipe("a cat")          edit = Edit.load("edit.safetensors")

    Weights are changed in place. What was there before is kept by the object that applied the edit, so that
    same object removes it, to the bit, until then or until the pipeline is gone; another object loaded from
    the same file cannot. Several edits are removed in any order as long as they change different entries,
    else the last applied first.

    Attributes:
        changes: by the name of the weight in the denoiser's state dict.
        base: `fingerprint` of the model that the edit was made for.
        method: the function that made it.
        targets: the prompts or concepts that it removes.
        settings: of the method, plain data.
        details: what else the method tells, plain data.
        version: of pumice when the edit was made.
    """

    changes: Mapping[str, Zeroed]
    base: str
    method: str
    targets: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    version: str = pumice.__version__
    _originals: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def __repr__(self) -> str:
        zeroed = sum(change.count for change in self.changes.values())
        return f"Edit({self.method}, {len(self.targets)} targets, {zeroed} weights zeroed)"

    @torch.no_grad()
    def apply(self, pipe: Any) -> None:
        """Change the weights of a loaded pipeline (or DiffusionModel), all of them or, after an error, none.

        Raises:
            TypeError: for a path or id, whose model nobody would hold.
            ValueError: if the edit is applied already, or was made for a model with other weights.
            UnsupportedModelError: for layers that are offloaded, quantised or under a LoRA adapter.
        """
        model, unet = _loaded(pipe)
        if unet in self._originals:
            raise ValueError("pipe: this edit is applied to it already")
        self._check_plain(model, unet)
        found = fingerprint(model)
        if found != self.base:
            raise ValueError(
                f"pipe: got weights of the fingerprint {found[:12]}, expected {self.base[:12]}: the model "
                "that the edit was made for, in its dtype and without other edits"
            )
        weights = self._weights(unet)
        originals = {name: change.originals(weights[name]) for name, change in self.changes.items()}
        try:
            for name, change in self.changes.items():
                change.apply(weights[name])
            self._originals[unet] = originals
        except BaseException:
            self._undo(weights, originals)
            raise

    @torch.no_grad()
    def remove(self, pipe: Any) -> None:
        """Put back, bit by bit, what `apply` of this object changed.

        Raises:
            TypeError: for a path or id.
            ValueError: if this object is not applied to the pipeline.
            UnsupportedModelError: as for `apply`.
        """
        model, unet = _loaded(pipe)
        if unet not in self._originals:
            raise ValueError("pipe: this edit is not applied to it, or was applied by another Edit object")
        self._check_plain(model, unet)
        self._undo(self._weights(unet), self._originals[unet])
        del self._originals[unet]

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Applied inside the block, removed at its end, also after an error."""
        self.apply(pipe)
        try:
            yield
        finally:
            self.remove(pipe)

    def report(self) -> dict[str, float]:
        """The share of each changed weight's entries that become zero, by its name."""
        return {name: change.count / change.size for name, change in self.changes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON: all but the masks, of which `report` is given."""
        plain = ("base", "method", "targets", "settings", "details", "version")
        return {name: getattr(self, name) for name in plain} | {
            "targets": list(self.targets),
            "report": self.report(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: packed masks, and all else as JSON in its header.

        Raises:
            ValueError: if the path cannot be written to.
        """
        path = Path(path)
        check_writable(path.parent, "path")
        about = {name: value for name, value in self.to_dict().items() if name != "report"}
        about["shapes"] = {name: change.shape for name, change in self.changes.items()}
        header = {"format": _FORMAT, "edit": json.dumps(about)}
        tensors = {f"{name}.zeroed": change.bits for name, change in self.changes.items()}
        write_whole(path, safetensors.torch.save(tensors, header))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Edit:
        """Read what `save` wrote.

        Raises:
            ValueError: if there is no such file, or it is not an edit.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r}, expected {_FORMAT!r}")
                about = json.loads(header["edit"])
                shapes = about.pop("shapes")
                changes = {
                    name: Zeroed(file.get_tensor(f"{name}.zeroed"), tuple(shape))
                    for name, shape in shapes.items()
                }
            for name, change in changes.items():
                if change.bits.dtype != torch.uint8 or change.bits.shape != (-(-change.size // 8),):
                    raise ValueError(f"the mask of {name} does not have the bits of its shape {change.shape}")
            return cls(changes, **about | {"targets": tuple(about["targets"])})
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ValueError(f"path: {str(path)!r} cannot be read as an edit: {reason}") from error

    def _check_plain(self, model: DiffusionModel, unet: nn.Module) -> None:
        """That the weights are there to be changed, and that the forward pass reads them."""
        model.check_editable(
            layer
            for layer in model.cross_attention.values()
            if any(name.startswith(f"{layer.name}.") for name in self.changes)
        )
        modules = dict(unet.named_modules())
        for name in self.changes:
            path = name.rpartition(".")[0]
            if path in modules:  # else the fingerprint is another, too
                check_plain(path, modules[path])

    def _weights(self, unet: nn.Module) -> dict[str, Tensor]:
        parameters = dict(unet.named_parameters())
        return {name: parameters[name] for name in self.changes}

    def _undo(self, weights: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
        for name, change in self.changes.items():
            change.undo(weights[name], originals[name])


def _loaded(pipe: Any) -> tuple[DiffusionModel, nn.Module]:
    """The model, and its denoiser as it is inside torch.compile."""
    if isinstance(pipe, str | PathLike):
        raise TypeError(f"pipe: got a {type(pipe).__name__}, expected a loaded pipeline or a DiffusionModel")
    model = load(pipe)
    return model, getattr(model.unet, "_orig_mod", model.unet)
