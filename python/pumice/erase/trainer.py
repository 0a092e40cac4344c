"""What erasers that train share: a model, its copy that trains, steps, checkpoints, pictures, the Edit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from pumice import models
from pumice.erase.arguments import checked_texts
from pumice.erase.known import check_known
from pumice.erase.parameters import parameters
from pumice.erase.trajectory import Trajectories, Variant, origin
from pumice.io import check_writable, save_lossless
from pumice.models import DiffusionModel, Edit, PromptEmbeds
from pumice.models.arguments import check_scale, checked_count, checked_prompt, first_seed, warn
from pumice.models.changes import extent
from pumice.models.drawing import draw
from pumice.models.draws import Draws
from pumice.models.edit import weights
from pumice.training.checkpoint import Checkpoint, TrainingWarning
from pumice.training.processes import processes
from pumice.training.steps import Loss, train
from pumice.training.student import Part, check_moves

_SAMPLE_STEPS = 25


class Options(TypedDict, total=False):
    """What every eraser that trains takes beside its own arguments.

    rank: train a LoRA of this rank beside linear weights, in place of weights. Default None, as the papers.
    batch_size: rows of a step. Default 1, as the papers.
    rows: of a pass; halved on out-of-memory. Default 64.
    seed: of all random numbers. Default 0.
    allow_unknown: train although the model answers a concept no more than nonsense. Default False.
    checkpoint: a folder to write the state to, and to go on from: an interrupted call, repeated, gives the
        same result. Default None.
    checkpoint_every: steps. Default 100.
    samples: a folder for pictures of the concepts and `sample_prompts`, while they train. Default None.
    samples_every: steps. Default 100.
    sample_prompts: what else is drawn there. Default none.
    progress: show a bar with the loss. Default False.
    """

    rank: int | None
    batch_size: int
    rows: int
    seed: int
    allow_unknown: bool
    checkpoint: str | PathLike[str] | None
    checkpoint_every: int
    samples: str | PathLike[str] | None
    samples_every: int
    sample_prompts: Sequence[str]
    progress: bool


class TrajectoryOptions(Options, total=False):
    """What erasers that train on guided trajectories take, too.

    pending: steps whose latents are drawn at once, by the weights of the first of them: faster, and stale by
        so many small steps. Default 1, exact.
    reuse: times that drawn latents are used, at other timesteps of their part of the schedule. Default 1.
    sample_dtype: of the passes that draw latents, such as torch.bfloat16; weights that train stay float32.
        Default None, the pipeline's.
    trajectory: "paper", or "code" for the sampler of the released code. Default "paper".
    """

    pending: int
    reuse: int
    sample_dtype: torch.dtype | None
    trajectory: Variant


class Trainer:
    """One training of an eraser.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        concepts: what is erased.
        which: the set of weights that train, one of `parameters.SETS`, or their names as an `Edit` has them.
        method: the function that asks.
        settings: its own arguments, plain data. One that draws trajectories has "num_inference_steps" among
            them.
        steps, learning_rate: of the training.
        options: `TrajectoryOptions`, or `Options` for a method that draws no trajectories.

    Attributes:
        model: as it is, frozen inside `train`.
        student: the copy that trains; all but the trained weights are the model's own.
        part: its weights.
        concepts: as given.
        count: rows of a step.
        draws: the rows' random numbers.
        steps: as given.

    Raises:
        TypeError, ValueError: naming the argument; if the model does not know a concept, or cannot read it
            to its end, if weights in the pipeline's dtype would not move, if the checkpoint is of another
            training.
        UnsupportedModelError: for quantised, offloaded or LoRA-wrapped weights.
    """

    def __init__(
        self,
        pipe: Any,
        concepts: str | Sequence[str],
        which: str | Sequence[str],
        *,
        method: str,
        settings: Mapping[str, Any],
        steps: int,
        learning_rate: float,
        **options: Unpack[TrajectoryOptions],
    ) -> None:
        self._mark = time.perf_counter()
        walks = "num_inference_steps" in settings
        _check_names(method, options, TrajectoryOptions if walks else Options)
        self.concepts = checked_texts("concepts", concepts)
        self.steps = checked_count("steps", steps)
        self.count = checked_count("batch_size", options.get("batch_size", 1))
        check_scale("learning_rate", learning_rate, positive=True)
        self._learning_rate = float(learning_rate)
        rank = options.get("rank")
        rank = None if rank is None else checked_count("rank", rank)
        self._rows = checked_count("rows", options.get("rows", 64))
        self._every = checked_count("checkpoint_every", options.get("checkpoint_every", 100))
        self._samples_every = checked_count("samples_every", options.get("samples_every", 100))
        more = checked_texts("sample_prompts", options.get("sample_prompts", ()), least=0)
        self._shown = [*self.concepts, *more]
        self._seed = first_seed(options.get("seed", 0))
        self._latents = _checked_latents(options)
        self._progress = options.get("progress", False)
        samples = options.get("samples")
        self._samples = None if samples is None else Path(samples)
        if self._samples is not None:
            check_writable(self._samples, "samples")
        self.model = models.load(pipe)
        self._method = method
        rows = [f"{self._seed}/erase/{row}" for row in range(self.count)]
        self.draws, self._choices = Draws(rows, self.model.device), Draws(rows, torch.device("cpu"))
        names = parameters(self.model, which, rank=rank) if isinstance(which, str) else list(which)
        self.part = Part(self.model, names, rank=rank, seed=self._seed)
        self.student: DiffusionModel = self.part.model
        if rank is None:
            check_moves([*self.part.weights.values()], self._learning_rate, self.steps)
        self._base = models.fingerprint(self.model)
        self._settings = {
            **settings,
            **({"parameters": which} if isinstance(which, str) else {}),
            "steps": self.steps,
            "learning_rate": self._learning_rate,
            "rank": rank,
            "batch_size": self.count,
            "seed": self._seed,
        }
        if walks:
            number = checked_count("num_inference_steps", settings["num_inference_steps"])
            dtype = self._latents["sample_dtype"]
            name = None if dtype is None else str(dtype).removeprefix("torch.")
            self._settings |= {"num_inference_steps": number, **self._latents, "sample_dtype": name}
        about = {"method": method, "model": self._base, "concepts": list(self.concepts), **self._settings}
        folder = options.get("checkpoint")
        self._checkpoint = None if folder is None else Checkpoint(folder, about)
        self._embeds: dict[str, PromptEmbeds] = {}
        self._turns: dict[int, list[str]] = {}
        self._trajectories: list[Trajectories] = []
        for concept in self.concepts:
            if dropped := self.encode([concept]).truncated[0]:
                raise ValueError(f"concepts: got {concept!r}, expected a prompt that ends before {dropped!r}")
        if not options.get("allow_unknown", False):
            check_known(self.model, self.concepts, rows=self._rows)

    def encode(self, texts: Sequence[str]) -> PromptEmbeds:
        """Texts as the model reads them, each encoded once; "" is what its guidance leads away from."""
        for text in texts:
            if text not in self._embeds:
                with torch.no_grad():
                    away = self.model.unconditional() if text == "" else None
                self._embeds[text] = away or checked_prompt(self.model, text)
        return PromptEmbeds.cat([self._embeds[text] for text in texts])

    def of_step(self, step: int) -> list[str]:
        """The concept of each row, drawn at random for the step that the latents are of."""
        step = origin(step, self._latents["pending"], self._latents["reuse"])
        if step not in self._turns:
            turn = self._choices.integers(range(self.count), "concept", step, len(self.concepts)).tolist()
            self._turns[step] = [self.concepts[index] for index in turn]
        return [*self._turns[step]]

    def trajectories(
        self,
        prompts: Callable[[int], PromptEmbeds],
        *,
        guidance_scale: float,
        model: DiffusionModel | None = None,
        branches: int = 1,
        num_inference_steps: int,
    ) -> Trajectories:
        """Latents on guided trajectories of these prompts under `model`, by default the one that trains."""
        found = Trajectories(
            self.student if model is None else model,
            prompts,
            self._choices,
            self.count,
            self.steps,
            branches=branches,
            num_inference_steps=checked_count("num_inference_steps", num_inference_steps),
            guidance_scale=guidance_scale,
            variant=self._latents["trajectory"],
            pending=self._latents["pending"],
            reuse=self._latents["reuse"],
            dtype=self._latents["sample_dtype"],
            rows=self._rows,
        )
        self._trajectories.append(found)
        return found

    def train(
        self,
        loss: Loss,
        *,
        prepare: Callable[[int], None] | None = None,
        after: Callable[[int], None] | None = None,
        kept: Mapping[str, Tensor] = {},
        values: Callable[[], Sequence[Tensor]] | None = None,
        shown: DiffusionModel | None = None,
        details: Callable[[], Mapping[str, Any]] = dict,
        **optimizer: Any,
    ) -> Edit:
        """Take the steps, and make an edit of what was learned.

        Args:
            loss, prepare, after, kept, optimizer: of `pumice.training.steps.train`.
            values: what the edit has in the place of the weights that trained, such as their mean.
            shown: the model that has them, which draws the sample pictures. Default the one that trains.
            details: what the method has to tell at the end.
        """

        def before(step: int) -> None:
            if prepare is not None:
                prepare(step)
            for trajectories in self._trajectories:  # by all processes, which share the work
                trajectories.at(step)

        seconds = torch.zeros((), dtype=torch.float64)

        def tick() -> None:
            now = time.perf_counter()
            seconds.add_(now - self._mark)
            self._mark = now

        def each(step: int) -> None:
            if after is not None:
                after(step)
            tick()
            if (step + 1) % self._samples_every == 0:
                self._draw(self.student if shown is None else shown, step + 1)

        blocks = {
            f"trajectories {number}.{name}": tensor
            for number, trajectories in enumerate(self._trajectories)
            for name, tensor in trajectories.state.items()
        }
        with self.model.frozen():
            self._draw(self.model, 0)
            losses = train(
                self.part,
                loss,
                self.steps,
                learning_rate=optimizer.pop("learning_rate", self._learning_rate),
                count=self.count,
                batch=self._rows,
                prepare=before,
                after=each,
                kept={**kept, **blocks, "seconds": seconds},
                checkpoint=self._checkpoint,
                checkpoint_every=self._every,
                progress=self._progress,
                **{"weight_decay": 0.0, **optimizer},
            )
        tick()
        changes = self.part.changes(None if values is None else values())
        if not changes:
            raise ValueError("steps: nothing was learned, every weight is as it was")
        return Edit.made(
            self.model,
            changes,
            base=self._base,
            method=self._method,
            targets=self.concepts,
            settings=self._settings,
            details={
                "losses": losses.tolist(),
                "seconds": float(seconds),
                **extent(changes, weights(self.model)),
                "sample_passes": sum(trajectories.passes for trajectories in self._trajectories),
                **details(),
            },
        )

    @torch.no_grad()
    def _draw(self, model: DiffusionModel, step: int) -> None:
        """Write what a model makes of the concepts and `sample_prompts`, side by side."""
        if self._samples is None or not processes(self.model.device).is_main_process:
            return
        start = time.perf_counter()
        pictures = [
            draw(model.pipe, [self._seed], 1, prompt=[text], num_inference_steps=_SAMPLE_STEPS)[0, 0]
            for text in self._shown
        ]
        row = torch.cat(pictures, dim=2).permute(1, 2, 0).contiguous().numpy()
        try:
            save_lossless(Image.fromarray(row), self._samples / f"step-{step:06d}.png")
        except OSError as error:
            warn(
                f"samples: those of step {step} could not be written ({error.strerror}); training goes on",
                TrainingWarning,
            )
        self._mark += time.perf_counter() - start  # they are no part of the training


@torch.no_grad()
def noises(model: DiffusionModel, z: Tensor, t: Tensor, *texts: PromptEmbeds) -> tuple[Tensor, ...]:
    """epsilon of z (B, C, h, w) at t (B,) under each text, of B prompts or of one; all in one pass."""
    rows = [text if len(text) == len(z) else text.repeat(len(z)) for text in texts]
    times = len(rows)
    found = model.predict_noise(z.repeat(times, 1, 1, 1), t.repeat(times), PromptEmbeds.cat(rows))
    return found.chunk(times)


def apart(found: Tensor, goal: Tensor, count: int) -> Tensor:
    """sum over rows  mean |found - goal|^2 / count, the rows' part of the loss of a step of `count`."""
    return (found - goal).square().flatten(1).mean(1).sum() / count


def _check_names(method: str, options: Mapping[str, Any], known: type[Options]) -> None:
    """Raise for what is no option, and for those of trajectories where none are drawn."""
    names = ", ".join(known.__annotations__)
    if foreign := ", ".join(sorted(options.keys() - known.__annotations__)):
        raise TypeError(f"{method}: got {foreign}, expected its own arguments or {names}")


def _checked_latents(options: TrajectoryOptions) -> dict[str, Any]:
    """Those that say how trajectories are drawn."""
    trajectory, dtype = options.get("trajectory", "paper"), options.get("sample_dtype")
    if trajectory not in get_args(Variant):
        raise ValueError(f"trajectory: got {trajectory!r}, expected 'paper' or 'code'")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"sample_dtype: got {dtype!r}, expected a floating torch.dtype")
    return {
        "pending": checked_count("pending", options.get("pending", 1)),
        "reuse": checked_count("reuse", options.get("reuse", 1)),
        "sample_dtype": dtype,
        "trajectory": trajectory,
    }
