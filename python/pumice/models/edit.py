"""A change of a model's weights that is a thing of its own: put on, taken off to the bit, composed, saved."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import pumice
from pumice.io import check_writable, save_lora, save_single_file

from . import edit_file
from .arguments import warn
from .attention import check_plain
from .changes import Added, Change, Mapped, Shifted, Zeroed, extent, joined, nearest, scaled
from .fingerprint import fingerprint
from .hooking import hooked, zeroes
from .loading import load
from .model import DiffusionModel


class EditWarning(UserWarning):
    """An edit was written, but not all of it."""


# What is applied to each denoiser, in order.
_applied: WeakKeyDictionary[nn.Module, list[weakref.ref[Edit]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model's weights, as methods that repair or erase return it.

    ::

        edit.apply(pipe)            with edit.on(pipe):        edit.save("edit.safetensors")
        edit.remove(pipe)               pipe("a cat")          edit = Edit.load("edit.safetensors")
                                    with edit.hook(pipe):      edit.save_lora("lora.safetensors")
                                        pipe("a cat")          edit.save_single_file("model.safetensors")

    Weights are changed in place. What was there before is kept by the object that applied the edit, so that
    same object removes it, to the bit, until then or until the pipeline is gone; another object loaded from
    the same file cannot. Several edits are removed in any order as long as they change different entries,
    else the last applied first.

    Attributes:
        changes: by the name of the weight in the denoiser's state dict, or of one of a text encoder behind
            "text_encoder." or "text_encoder_2.".
        base: `fingerprint` of the model that the edit was made for.
        method: the function that made it.
        targets: the prompts or concepts that it removes.
        settings: of the method, plain data.
        details: what the method measured, plain data.
        version: of pumice when the edit was made.
        parts: the edits that it was composed of, in order; none if it was made in one piece.
    """

    changes: Mapping[str, Change]
    base: str
    method: str
    targets: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    version: str = pumice.__version__
    parts: tuple[Edit, ...] = ()
    _originals: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )
    _pipe: Callable[[], Any] = field(default=lambda: None, repr=False)

    @classmethod
    def made(
        cls, model: DiffusionModel, changes: Mapping[str, Change], *, base: str | None = None, **about: Any
    ) -> Edit:
        """An edit for this very model, which `save_lora` and `save_single_file` remember while it lives.

        base: the model's `fingerprint`, if that is known; it takes seconds for large models.
        """
        return cls(changes, base or fingerprint(model), _pipe=weakref.ref(model.pipe), **about)

    @classmethod
    def compose(cls, edits: Iterable[Edit]) -> Edit:
        """One edit that does what all do, one after the other.

        ::

            M = M_1 M_2 ... M_n        W <- W M        of maps, which stay one map
            W <- W + D_1 + D_2         of what training added, in one sum

        Each part depends on its concepts alone, so `without` leaves exactly what the others make without it.

        Raises:
            ValueError: for fewer than two edits, or edits for different models.
        """
        edits = list(edits)
        odd = next((edit for edit in edits if not isinstance(edit, Edit)), None)
        if odd is not None:
            raise TypeError(f"edits: got a {type(odd).__name__}, expected edits")
        if len(edits) < 2:
            raise ValueError(f"edits: got {len(edits)}, expected at least two")
        if len({edit.base for edit in edits}) > 1:
            raise ValueError("edits: they were made for models with different weights, expected one model")
        edits = [part for edit in edits for part in edit.parts or (edit,)]
        changes: dict[str, Change] = {}
        for edit in edits:
            both: dict[tuple[int, int], Change] = {}  # layers share changes, and what they are together
            for name, change in edit.changes.items():
                before = changes.get(name)
                if before is not None:
                    key = id(before), id(change)
                    if key not in both:
                        both[key] = joined(before, change)
                    change = both[key]
                changes[name] = change
        targets = tuple(target for edit in edits for target in edit.targets)
        composed = cls(changes, edits[0].base, "compose", targets, parts=tuple(edits), _pipe=edits[0]._pipe)
        return replace(composed, details=composed._extent())

    def _extent(self) -> dict[str, Any]:
        """The rank, where all have one, and while the pipeline is there how far weights would change."""
        low_rank = [change.rank for change in self.changes.values() if isinstance(change, Mapped | Added)]
        found: dict[str, Any] = {"rank": max(low_rank)} if len(low_rank) == len(self.changes) else {}
        pipe = self._pipe()
        return found if pipe is None else found | extent(self.changes, self._weights(loaded(pipe)[0]))

    def without(self, concept: str) -> Edit:
        """The edit in which this concept was never erased: what the other parts of a composed edit make.

        Raises:
            ValueError: if no part erases the concept, or one erases it together with others.
        """
        holding = [part for part in self.parts if concept in part.targets]
        if not holding:
            known = ", ".join(repr(target) for part in self.parts for target in part.targets) or "none"
            raise ValueError(f"concept: got {concept!r}, expected that of a part of a composed edit: {known}")
        if any(part.targets != (concept,) for part in holding):
            raise ValueError(
                f"concept: {concept!r} was erased together with others in one solution; erase it in an edit "
                "of its own and compose them"
            )
        left = [part for part in self.parts if part not in holding]
        if not left:
            raise ValueError(f"concept: {concept!r} is all that the edit erases")
        return left[0] if len(left) == 1 else Edit.compose(left)

    def __repr__(self) -> str:
        return f"Edit({self.method}, {len(self.targets)} targets, {len(self.changes)} weights)"

    @torch.no_grad()
    def apply(self, pipe: Any) -> None:
        """Change the weights of a loaded pipeline (or DiffusionModel), all of them or, after an error, none.

        Raises:
            TypeError: for a path or id, whose model nobody would hold.
            ValueError: if the edit is applied already, or was made for a model with other weights.
            UnsupportedModelError: for layers that are fused, offloaded, quantised or under a LoRA adapter.
        """
        model, unet = loaded(pipe)
        if unet in self._originals:
            raise ValueError("pipe: this edit is applied to it already")
        self.check_fits(model)
        weights = self._weights(model)
        originals = {name: change.originals(weights[name]) for name, change in self.changes.items()}
        try:
            for change, names in self._grouped():
                change.apply([weights[name] for name in names])
            self._originals[unet] = originals
            _applied.setdefault(unet, []).append(weakref.ref(self))
        except BaseException:
            self._undo(weights, originals)
            self._originals.pop(unet, None)
            raise
        finally:
            torch.clear_autocast_cache()  # which knows nothing of a weight that is written to

    @torch.no_grad()
    def remove(self, pipe: Any) -> None:
        """Put back, bit by bit, what `apply` of this object changed.

        Raises:
            TypeError: for a path or id.
            ValueError: if this object is not applied to the pipeline, or another has since changed the same
                weights.
            UnsupportedModelError: as for `apply`.
        """
        model, unet = loaded(pipe)
        if unet not in self._originals:
            raise ValueError("pipe: this edit is not applied to it, or was applied by another Edit object")
        self._check_plain(model)
        self._check_last(unet)
        self._undo(self._weights(model), self._originals[unet])
        del self._originals[unet]
        _applied[unet] = [edit for edit in _applied[unet] if edit() is not self]
        torch.clear_autocast_cache()

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Applied inside the block, removed at its end, also after an error."""
        self.apply(pipe)
        try:
            yield
        finally:
            self.remove(pipe)

    def hook(self, pipe: Any) -> AbstractContextManager[None]:
        """Inside the block the pipeline draws as if the edit were applied; its weights stay as they are.

        What enters each changed layer is mapped instead, see `hook_edits`, which also gives every sample of a
        batch an edit of its own.
        """
        return hook_edits(pipe, [self])

    def scaled(self, factor: float) -> Edit:
        """The edit with all that it adds to weights times a number: W <- W + factor D.

        Raises:
            ValueError: if it maps or zeroes, or the number is not finite.
        """
        if not math.isfinite(factor):
            raise ValueError(f"factor: got {factor}, expected a finite number")
        details = {**self.details, "scaled": factor * self.details.get("scaled", 1.0)}
        if "relative_change" in details:
            shares = {name: abs(factor) * share for name, share in details["relative_change"].items()}
            details |= {"relative_change": shares, "overall_change": abs(factor) * details["overall_change"]}
        if self.parts:
            parts = [part.scaled(factor) for part in self.parts]
            return replace(Edit.compose(parts), details=details)
        changes: dict[str, Change] = {}
        for change, names in self._grouped():
            found = scaled(change, factor)
            if found is None:
                raise ValueError(f"edit: {self.method} does more to {names[0]} than to add to it")
            changes |= dict.fromkeys(names, found)
        return replace(self, changes=changes, details=details)

    def report(self) -> dict[str, Any]:
        """What the method measured (`details`), the share of each weight's entries that become zero, and of
        a composed edit what its parts are."""
        zeroed = {
            name: change.count / change.size
            for name, change in self.changes.items()
            if isinstance(change, Zeroed)
        }
        parts = [
            {"method": part.method, "targets": list(part.targets), "settings": part.settings, **part.report()}
            for part in self.parts
        ]
        found = {"zeroed": zeroed, "parts": parts}
        return {**self.details, **{name: value for name, value in found.items() if value}}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON: all but the changes themselves, of which `report` is given."""
        plain = ("base", "method", "targets", "settings", "details", "version")
        return {name: getattr(self, name) for name in plain} | {
            "targets": list(self.targets),
            "report": self.report(),
        }

    def rebased(self, pipe: Any) -> Edit:
        """The same change for a model that was fine-tuned from the one that it was made for.

        ::

            W* = W0 + dW_edit + dW_finetune

        Nothing tells whether a model is such a descendant: only that shapes fit.

        Raises:
            TypeError: for a path or id.
            ValueError: if a weight is missing or of another shape.
        """
        model, _ = loaded(pipe)
        for name, weight in self._weights(model).items():
            self.changes[name].check(name, weight)
        parts = tuple(part.rebased(pipe) for part in self.parts)
        return replace(self, base=fingerprint(model), parts=parts, _pipe=weakref.ref(model.pipe))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: the changes' tensors once each, and all else as JSON in its header.

        Raises:
            ValueError: if the path cannot be written to.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"path: {str(path)!r} is a folder, expected a file")
        check_writable(path.parent, "path")
        edit_file.write(path, self._tree())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Edit:
        """Read what `save` wrote.

        Raises:
            ValueError: if there is no such file, or it is not an edit.
        """
        try:
            return cls._of(edit_file.read(path))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ValueError(f"path: {str(path)!r} cannot be read as an edit: {reason}") from error

    @torch.no_grad()
    def save_lora(
        self,
        path: str | PathLike[str],
        pipe: Any = None,
        *,
        format: Literal["diffusers", "kohya"] = "diffusers",
        rank: int | None = None,
    ) -> None:
        """Write the edit as a LoRA file, which other programs load without pumice.

        ::

            W (I + U D) = W + (W U) D

        The rank is that of the edit, at most the number of edited token rows, so nothing is lost.

        Args:
            path: a .safetensors file that is not there yet.
            pipe: the model that the edit was made for; by default the pipeline that it was made from.
            format: "diffusers" for `load_lora_weights`, "kohya" for A1111, ComfyUI and kohya's scripts.
            rank: at most this one, by the singular value decomposition of each change: no longer exact.

        Raises:
            ValueError: if the file is there, the model is another or gone, the edit zeroes weights, or it
                changes whole weights and there is no rank.

        Warns:
            EditWarning: if norms and biases are left out.
        """
        if rank is not None and operator.index(rank) < 1:
            raise ValueError(f"rank: got {rank}, expected at least 1")
        model = self._model(pipe, "save_lora")
        unet = model.eager_unet
        if unet not in self._originals:
            self.check_fits(model)
        weights = self._originals.get(unet) or self._weights(model)
        layers, left_out = {}, list[str]()
        for change, names in self._grouped():
            if zeroes(change):
                raise ValueError(f"edit: {self.method} changes weights as no LoRA does; use save_single_file")
            if isinstance(change, Mapped | Added) and rank is not None and change.rank > rank:
                change = change.at_most(rank)
            for name in names:
                if weights[name].ndim < 2:
                    left_out.append(name)
                elif isinstance(change, Mapped | Added):
                    layers[name.removesuffix(".weight")] = change.lora(weights[name])
                elif rank is None:
                    raise ValueError(
                        f"rank: got None, expected one: {self.method} changes whole weights, of which a LoRA "
                        "is the nearest of its rank"
                    )
                else:
                    layers[name.removesuffix(".weight")] = nearest(change, weights[name], rank)
        if not layers:
            raise ValueError(
                f"edit: {self.method} changes norms and biases alone, of which a LoRA has none; use "
                "save_single_file"
            )
        if left_out:
            warn(
                f"path: {len(left_out)} norms and biases, such as {left_out[0]}, are left out, as a LoRA has "
                "none; save_single_file has all",
                EditWarning,
            )
        about = {"pumice.base": self.base, "pumice.method": self.method, "pumice.version": self.version}
        save_lora(path, layers, unet, text_encoders=model.text_encoders, format=format, metadata=about)

    def save_single_file(self, path: str | PathLike[str], pipe: Any = None) -> None:
        """Write the edited model as one .safetensors file in the layout of A1111 and ComfyUI.

        Args:
            path: a .safetensors file that is not there yet.
            pipe: the model that the edit was made for; by default the pipeline that it was made from.

        Raises:
            ValueError: if the file is there, or the model is another or gone.
        """
        model = self._model(pipe, "save_single_file")
        applied = model.eager_unet in self._originals
        with nullcontext() if applied else self.on(model):
            save_single_file(model.pipe, path)

    def check_fits(self, model: DiffusionModel, found: str | None = None) -> None:
        """Raise unless the model is the one that the edit was made for, and its weights can be edited.

        found: its `fingerprint`, if that is known; it takes seconds for large models.
        """
        self._check_plain(model)
        found = fingerprint(model) if found is None else found
        if found != self.base:
            raise ValueError(
                f"pipe: got weights of the fingerprint {found[:12]}, expected {self.base[:12]}: the model "
                "that the edit was made for, in its dtype, without other edits and without LoRA adapters"
            )
        for name, weight in self._weights(model).items():
            self.changes[name].check(name, weight)

    def _check_plain(self, model: DiffusionModel) -> None:
        """That the weights are there to be changed, and that the forward pass reads them."""
        model.check_editable(
            layer
            for layer in model.cross_attention.values()
            if any(name.startswith(f"{layer.name}.") for name in self.changes)
        )
        networks = _networks(model)
        for name in self.changes:
            network, path = _place(name)
            modules = networks.get(network, {})
            path = path.rpartition(".")[0]
            if path in modules:  # else the fingerprint is another, too
                check_plain(path, modules[path])

    def _check_last(self, unet: nn.Module) -> None:
        """That nothing that was applied later is in what would be put back."""
        order = [edit() for edit in _applied.get(unet, [])]
        later_ones = [edit for edit in order[order.index(self) + 1 :] if edit is not None]
        for later in later_ones:
            for name, change in later.changes.items():
                # masks put back their own entries alone
                if name in self.changes and not isinstance(change, Zeroed):
                    raise ValueError(
                        f"pipe: the edit by {later.method} was applied after this one, to the same weights; "
                        "remove it first"
                    )

    def _model(self, pipe: Any, function: str) -> DiffusionModel:
        if pipe is None:
            pipe = self._pipe()
        if pipe is None:
            raise ValueError(
                f"pipe: the pipeline that the edit was made from is gone, give it: {function}(path, pipe)"
            )
        return loaded(pipe)[0]

    def _weights(self, model: DiffusionModel) -> dict[str, Tensor]:
        parameters = weights(model)
        missing = next((name for name in self.changes if name not in parameters), None)
        if missing is not None:
            raise ValueError(f"pipe: it has no weight {missing}, which the edit changes")
        return {name: parameters[name] for name in self.changes}

    def _grouped(self) -> list[tuple[Change, list[str]]]:
        """Each change with the names of all weights that it is for."""
        groups: dict[int, tuple[Change, list[str]]] = {}
        for name, change in self.changes.items():
            groups.setdefault(id(change), (change, []))[1].append(name)
        return list(groups.values())

    def _undo(self, weights: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
        for name, change in self.changes.items():
            change.undo(weights[name], originals[name])

    def _tree(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        about = {name: value for name, value in self.to_dict().items() if name != "report"}
        if self.parts:
            return about | {"parts": [part._tree() for part in self.parts]}
        groups = [
            {"kind": type(change).__name__, "weights": names, "values": vars(change)}
            for change, names in self._grouped()
        ]
        return about | {"changes": groups}

    @classmethod
    def _of(cls, tree: dict[str, Any]) -> Edit:
        """The inverse of `_tree`."""
        about = tree | {"targets": tuple(tree["targets"])}
        if "parts" in about:
            parts = [cls._of(part) for part in about.pop("parts")]
            return replace(cls.compose(parts), **about)
        changes: dict[str, Change] = {}
        for group in about.pop("changes"):
            change = _KINDS[group["kind"]](**group["values"])
            changes |= dict.fromkeys(group["weights"], change)
        return cls(changes, **about)


TEXT = ("text_encoder", "text_encoder_2")

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Zeroed, Mapped, Added, Shifted)}


@contextmanager
def hook_edits(pipe: Any, edits: Sequence[Edit | None], *, base: str | None = None) -> Iterator[None]:
    """Inside the block, sample i of every batch is drawn as if `edits[i % len(edits)]` were applied.

    ::

        (W M) e = W (M e)              what enters an edited layer is mapped, W stays
        (W + D) x + b = W x + b + D x  what training added to a layer is added to what leaves it

    Guidance puts two batches into one, all samples without their prompts and then all with: as long as
    `edits` has one entry for each sample of a pipeline's call, or divides their number, both rows of a sample
    meet the same edit. Nothing can tell a call with fewer samples than edits, whose rows would meet different
    ones. None leaves a sample as it is. Changes of whole weights lie on the device, for each edit as much as
    the weights that it changes. base: the model's `fingerprint`, if that is known.

    Raises:
        TypeError: for a path or id, and what is no edit.
        ValueError: for no edits, an edit that was made for a model with other weights, or one that zeroes
            weights or changes a text encoder; inside the block, for a batch that is no multiple of the edits.
        UnsupportedModelError: as for `Edit.apply`.
    """
    model, unet = loaded(pipe)
    edits = list(edits)
    if not edits:
        raise ValueError("edits: got none, expected one for each sample, or None where there is none")
    base = base or fingerprint(model)
    for edit in dict.fromkeys(edits):
        if edit is not None:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: got a {type(edit).__name__}, expected edits and None")
            edit.check_fits(model, base)
            if any(name.startswith(TEXT) for name in edit.changes):
                raise ValueError(
                    "edits: one changes a text encoder, which encodes prompts for all samples; apply it"
                )
    with hooked(unet, [edit.changes if edit else {} for edit in edits]):
        yield


def weights(model: DiffusionModel) -> dict[str, Tensor]:
    """All that an edit may change: the denoiser's weights by their names, and behind "text_encoder." and
    "text_encoder_2." those of the text encoders."""
    found = dict(model.eager_unet.named_parameters())
    for number, encoder in enumerate(model.text_encoders):
        found |= {f"{TEXT[number]}.{name}": weight for name, weight in encoder.named_parameters()}
    return found


def _networks(model: DiffusionModel) -> dict[str, dict[str, nn.Module]]:
    """All modules by network and name."""
    networks = {"": model.eager_unet, **dict(zip(TEXT, model.text_encoders, strict=False))}
    return {name: dict(network.named_modules()) for name, network in networks.items()}


def _place(name: str) -> tuple[str, str]:
    """Which network a weight is of, and its name there."""
    first, _, rest = name.partition(".")
    return (first, rest) if first in TEXT else ("", name)


def loaded(pipe: Any) -> tuple[DiffusionModel, nn.Module]:
    """The model of what is loaded already, and its denoiser as it is inside torch.compile."""
    if isinstance(pipe, str | PathLike):
        raise TypeError(f"pipe: got a {type(pipe).__name__}, expected a loaded pipeline or a DiffusionModel")
    model = load(pipe)
    return model, model.eager_unet
