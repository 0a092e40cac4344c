"""KPOP: a concept is hidden, and a learned prompt of keys and values gives it back (Bui et al., 2024)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, Unpack, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pumice.erase.arguments import check_scale
from pumice.erase.trainer import Trainer, TrajectoryOptions, apart, noises
from pumice.io.files import new_file, write_tensors
from pumice.models import DiffusionModel, Edit, PromptEmbeds, RowBudget, fingerprint
from pumice.models.arguments import checked_count
from pumice.models.edit import loaded
from pumice.training.processes import processes

Mode = Literal["mid", "mid+out", "all"]
_FORMAT = "pumice.key.1"
_PLACES: dict[Mode, tuple[str, ...]] = {
    "mid": ("mid_block.",),
    "mid+out": ("mid_block.", "up_blocks."),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}


@torch.inference_mode(False)
def kpop(
    pipe: Any,
    concepts: str | Sequence[str],
    key: str | PathLike[str],
    *,
    mode: Mode = "mid",
    size: int = 10,
    negative_guidance: float = 1.0,
    hiding_weight: float = 1.0,
    recovery_weight: float = 0.1,
    start_guidance: float = 3.0,
    num_inference_steps: int = 50,
    parameters: str = "xattn",
    steps: int = 1000,
    learning_rate: float = 1e-5,
    key_learning_rate: float = 1e-2,
    **options: Unpack[TrajectoryOptions],
) -> Edit:
    """Hide concepts, and learn a key that gives them back.

    ::

        p follows:        |epsilon'(z_t, t, c; p) - epsilon(z_t, t, c)|^2 + the same of c = ""
        then epsilon':    hiding_weight |epsilon'(z_t, t, c) - goal|^2
                          + recovery_weight |epsilon'(z_t, t, c; p) - epsilon(z_t, t, c)|^2
        goal = epsilon(z_t, t, "") - eta (epsilon(z_t, t, c) - epsilon(z_t, t, ""))

    means over elements, one step of Adam each in turn (Bui et al., arXiv:2403.12326). epsilon is the model as
    it was; p are rows that some layers of cross-attention attend to beside the text, as further keys and
    values, for each concept its own; they begin as those of its tokens. z_t lies on a guided trajectory of c.

    The edit hides the concepts; without the key file nothing gives them back but other training::

        edit = kpop(pipe, "a ball", "ball.key.safetensors")
        with edit.on(pipe), RecoveryKey.load("ball.key.safetensors").on(pipe):
            pipe("a ball")

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: as the model's captions word them.
        key: a .safetensors file that is not there yet, or that the same call has made. A `checkpoint` holds
            the key, too.
        mode: layers that the key is for: "mid", "mid+out" (the way up, too) or "all". Default "mid".
        size: rows of the key, of keys and of values, in each layer. Default 10.
        negative_guidance: eta. Default 1, of ESD.
        hiding_weight, recovery_weight: default 1 and 0.1.
        start_guidance: of trajectories. Default 3, of ESD.
        num_inference_steps: of a whole trajectory. Default 50, of ESD.
        parameters: a set of weights, one of `pumice.erase.parameters.SETS`. Default cross-attention.
        steps: default 1000.
        learning_rate: Adam's, of weights. Default 1e-5.
        key_learning_rate: Adam's, of the key. Default 1e-2, an assumption.
        options: `pumice.erase.trainer.TrajectoryOptions`.

    Returns:
        An `Edit`: weights that are added, or with `rank` a LoRA. The key is not in it.

    Differences from the paper: its exact losses could not be had, and these, in turns, are an assumption; the
    defaults are those that EAP (arXiv:2410.15618) compared with. With the key the empty prompt is answered as
    before, too, as guidance has both prompts in one batch.

    Raises:
        TypeError, ValueError: naming the argument; for a concept that the model does not know, a file that is
            there already, a key that cannot be written, and if a loss or gradient is not finite, whereupon
            the last checkpoint stands.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """
    if mode not in _PLACES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(get_args(Mode))}")
    eta = check_scale("negative_guidance", negative_guidance)
    hiding_weight = check_scale("hiding_weight", hiding_weight)
    recovery_weight = check_scale("recovery_weight", recovery_weight)
    start_guidance = check_scale("start_guidance", start_guidance)
    key_learning_rate = check_scale("key_learning_rate", key_learning_rate, positive=True)
    size = checked_count("size", size)
    path = Path(key) if Path(key).exists() else new_file(key, "key")
    trainer = Trainer(
        pipe,
        concepts,
        parameters,
        method="kpop",
        settings={
            "mode": mode,
            "size": size,
            "negative_guidance": eta,
            "hiding_weight": hiding_weight,
            "recovery_weight": recovery_weight,
            "start_guidance": start_guidance,
            "num_inference_steps": num_inference_steps,
            "key_learning_rate": key_learning_rate,
        },
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    if path.exists() and not _made_by(trainer, path):
        raise ValueError(f"key: {str(path)!r} is there already, of another training; expected a new name")
    model, student, count = trainer.model, trainer.student, trainer.count
    prompts = _first(trainer, mode, size)
    optimizer = torch.optim.Adam(prompts.values(), key_learning_rate)
    kept = dict(prompts)
    for name, rows in prompts.items():  # made at once, so that a checkpoint can fill it
        optimizer.state[rows] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(rows, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(rows, requires_grad=False),
        }
        kept |= {f"{name}.{what}": value for what, value in optimizer.state[rows].items()}
    budget, scale = RowBudget(options.get("rows", 64)), trainer.part.scale

    def drawn(step: int) -> PromptEmbeds:
        return trainer.encode(trainer.of_step(step))

    trajectories = trainer.trajectories(
        drawn, guidance_scale=start_guidance, num_inference_steps=num_inference_steps
    )

    def own(step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """The key of each row's concept."""
        concepts = trainer.of_step(step)
        of = [trainer.concepts.index(concepts[row]) for row in rows]
        return {name: value[of] for name, value in prompts.items()}

    def recovery(step: int, rows: Sequence[int]) -> Tensor:
        """What the key learns from; gradients flow to it."""
        z, t = trajectories.at(step).of(rows)
        text = drawn(step)[rows]
        goals = noises(model, z, t, text, trainer.encode([""]))
        with _attended(student, own(step, rows)):
            parts = [
                apart(student.predict_noise(z, t, read), goal, count)
                for read, goal in zip((text, trainer.encode([""])), goals, strict=True)
            ]
        return torch.stack(parts).sum()

    def gradients(step: int, most: int) -> list[Tensor]:
        total = [torch.zeros_like(rows) for rows in prompts.values()]
        for rows in torch.arange(count).split(most):
            value = recovery(step, rows.tolist()) * scale
            total = [
                a + b for a, b in zip(total, torch.autograd.grad(value, [*prompts.values()]), strict=True)
            ]
        return [gradient / scale for gradient in total]

    @torch.enable_grad()
    def follow(step: int) -> None:
        """A step of the key, in every process the same."""
        found = budget.run(partial(gradients, step))
        for rows, gradient in zip(prompts.values(), found, strict=True):
            rows.grad = gradient.detach()
        optimizer.step()
        optimizer.zero_grad()

    def loss(step: int, rows: Sequence[int]) -> Tensor:
        z, t = trajectories.at(step).of(rows)
        text = drawn(step)[rows]
        away, towards = noises(model, z, t, trainer.encode([""]), text)
        goal = away - eta * (towards - away)
        hidden = hiding_weight * apart(student.predict_noise(z, t, text), goal, count)
        if not recovery_weight:
            return hidden
        with _attended(student, {name: value.detach() for name, value in own(step, rows).items()}):
            found = student.predict_noise(z, t, text)
        return hidden + recovery_weight * apart(found, towards, count)

    edit = trainer.train(loss, prepare=follow, kept=kept)
    values = {name: value.detach().cpu() for name, value in prompts.items()}
    state = processes(model.device)
    if state.is_main_process:
        try:
            RecoveryKey(edit.base, trainer.concepts, values, edit.settings)._write(path)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            left = "lost without a checkpoint" if options.get("checkpoint") is None else "in the checkpoint"
            raise ValueError(
                f"key: {str(path)!r} could not be written ({reason}); what was learned is {left}"
            ) from error
    state.wait_for_everyone()
    return edit


@dataclass(frozen=True, eq=False)
class RecoveryKey:
    """What gives concepts back that `kpop` has hidden.

    Attributes:
        base: `fingerprint` of the model that the edit was made for.
        concepts: that it is for.
        prompts: rows (concepts, size, o) float32 on the CPU, by the name of the projection that they follow.
        settings: of the training, as the edit has them.
    """

    base: str
    concepts: tuple[str, ...]
    prompts: Mapping[str, Tensor] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a key has rows")
        for name, rows in self.prompts.items():
            if rows.ndim != 3 or len(rows) != len(self.concepts) or rows.dtype != torch.float32:
                raise ValueError(f"the rows of {name} are not float32 rows of each of the concepts")
            if not bool(rows.isfinite().all()):
                raise ValueError(f"the rows of {name} are not finite")

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file.

        Raises:
            ValueError: if it is there already, or cannot be written.
        """
        self._write(new_file(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: if there is no such file, or it is not a key.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header["format"] != _FORMAT:
                    raise ValueError(f"its format is {header['format']!r}, expected {_FORMAT!r}")
                about = json.loads(header["key"])
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(str(about["base"]), tuple(about["concepts"]), rows, about["settings"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ValueError(f"path: {str(path)!r} cannot be read as a key: {reason}") from error

    def _write(self, path: Path) -> None:
        about = {"base": self.base, "concepts": self.concepts, "settings": dict(self.settings)}
        tensors = {name: rows.contiguous() for name, rows in self.prompts.items()}
        write_tensors(path, tensors, {"format": _FORMAT, "key": json.dumps(about)})

    @contextmanager
    def on(self, pipe: Any, concept: str | None = None) -> Iterator[None]:
        """Inside the block a pipeline that the edit is applied to draws the concept again.

        concept: which, if the key is for several.

        Raises:
            TypeError: for a path or id.
            ValueError: for a concept that the key is not for, a pipeline that the edit is not applied to, or
                one of other layers.
            UnsupportedModelError: for fused projections.
        """
        model, unet = loaded(pipe)
        if concept not in self.concepts and not (concept is None and len(self.concepts) == 1):
            known = ", ".join(map(repr, self.concepts))
            raise ValueError(f"concept: got {concept!r}, expected one of {known}")
        number = self.concepts.index(concept) if concept is not None else 0
        if fingerprint(model) == self.base:
            raise ValueError("pipe: the edit is not applied to it, so that it hides nothing")
        modules = dict(unet.named_modules())
        for name, rows in self.prompts.items():
            if getattr(modules.get(name), "out_features", None) != rows.shape[-1]:
                raise ValueError(
                    f"pipe: it has no layer {name} of {rows.shape[-1]} outputs, as the key's model"
                )
        model.check_editable()
        with _attended(model, {name: rows[number, None] for name, rows in self.prompts.items()}):
            yield


def _made_by(trainer: Trainer, path: Path) -> bool:
    """Whether a file is the key of this very training."""
    try:
        there = RecoveryKey.load(path)
    except ValueError:
        return False
    same = there.base == fingerprint(trainer.model) and there.concepts == trainer.concepts
    return same and there.settings == json.loads(json.dumps(trainer._settings))


def _first(trainer: Trainer, mode: Mode, size: int) -> dict[str, Tensor]:
    """Rows to begin with: what the layers, as they were, make of the first tokens of each concept."""
    model, found = trainer.model, {}
    text = trainer.encode(trainer.concepts).embeds
    text = text[:, torch.arange(size) % text.shape[1]]
    for layer in model.cross_attention.values():
        if layer.name.startswith(_PLACES[mode]):
            for which, linear in (("to_k", layer.to_k), ("to_v", layer.to_v)):
                with torch.no_grad():
                    rows = linear(text.to(linear.weight)).float()
                found[f"{layer.name}.{which}"] = rows.requires_grad_()
    if not found:
        raise ValueError(f"mode: got {mode!r}, where the model has no cross-attention")
    return found


@contextmanager
def _attended(model: DiffusionModel, prompts: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, layers attend to these rows, too: (B, size, o) by projection, or one for all."""
    handles = [
        model.eager_unet.get_submodule(name).register_forward_hook(partial(_append, rows))
        for name, rows in prompts.items()
    ]
    try:
        # a compiled denoiser would not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _append(rows: Tensor, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return torch.cat((y, rows.to(y).expand(len(y), -1, -1)), dim=1)
