"""Where a training stands, in one file that is whole or that of before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import pumice
from pumice.io import check_writable
from pumice.io.files import write_tensors
from pumice.models.arguments import warn
from pumice.training.student import Learner

NAME = "checkpoint.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_LONGEST = 60  # characters of a value in an error


class TrainingWarning(UserWarning):
    """A training goes on, but something beside it could not be done."""


class Checkpoint:
    """`<folder>/checkpoint.safetensors`: weights, moments and losses after some steps.

    Args:
        folder: is made.
        settings: everything that the training depends on, plain data; beside it is kept pumice's version.

    Raises:
        TypeError: for settings that are no plain data.
        ValueError: if the folder cannot be written, or its checkpoint cannot be read or is of another
            training.
    """

    def __init__(self, folder: str | PathLike[str], settings: Mapping[str, Any]) -> None:
        self._path = Path(folder) / NAME
        said = json.dumps({"pumice": pumice.__version__, **settings})  # what cannot be written fails now
        self._settings = json.loads(said)
        check_writable(self._path.parent, "checkpoint")
        if self._path.exists():
            with _reading(self._path) as (_, found):
                theirs = dict(found["settings"])
            self._check(theirs)

    def read(
        self,
        student: Learner,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        kept: Mapping[str, Tensor] = {},
    ) -> int:
        """Go back to where the training stood, `kept` in place; how many steps are done."""
        if not self._path.exists():
            return 0
        with _reading(self._path) as (file, found):
            done = int(found["done"])
            there = set(file.keys())
            student.restore([file.get_tensor(f"weight.{name}") for name in student.weights])
            for name, master in zip(student.weights, student.masters, strict=True):
                if f"step.{name}" in there:
                    optimizer.state[master] = {  # copied, as what is read is the mapped file
                        key: file.get_tensor(f"{key}.{name}").to(master.device, copy=True) for key in _MOMENTS
                    }
            losses[:done] = file.get_tensor("losses")
            for name, tensor in kept.items():
                tensor.detach().copy_(file.get_tensor(f"kept.{name}"))
        return done

    def write(
        self,
        student: Learner,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        done: int,
        kept: Mapping[str, Tensor] = {},
    ) -> None:
        """Put the state after `done` steps into the file; a full disk is warned about, and costs nothing."""
        tensors = {"losses": losses[:done].clone()}
        tensors |= {f"kept.{name}": tensor.detach().contiguous() for name, tensor in kept.items()}
        for name, master in zip(student.weights, student.masters, strict=True):
            tensors[f"weight.{name}"] = master.detach().contiguous()
            if optimizer.state[master]:  # none where nothing had a gradient: layers that no prompt reaches
                for key in _MOMENTS:
                    tensors[f"{key}.{name}"] = optimizer.state[master][key].contiguous()
        try:
            said = json.dumps({"settings": self._settings, "done": done})
            write_tensors(self._path, tensors, {"training": said})
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            before = "the one before stays" if self._path.exists() else "there is none yet"
            warn(
                f"checkpoint: step {done} could not be written ({reason}); {before}, and training goes on",
                TrainingWarning,
            )

    def _check(self, theirs: Mapping[str, Any]) -> None:
        other = [
            f"{name} was {_short(theirs.get(name))}, is {_short(self._settings.get(name))}"
            for name in {**theirs, **self._settings}
            if theirs.get(name) != self._settings.get(name)
        ]
        if other:
            raise ValueError(
                f"checkpoint: {str(self._path)!r} is of another training: {'; '.join(other)}; choose another "
                "folder, or delete it"
            )


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 3]}..."


@contextmanager
def _reading(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file, and what it says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["training"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {str(path)!r} cannot be read as one of a training; choose another folder, or "
            "delete it"
        ) from error
