"""Which prompts replay training pictures, by any of the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models

from .arguments import checked_prompts
from .calibration import Calibration
from .engine import Screen
from .metric import Metric
from .sequential import Look, mean_score
from .settings import resolve

_PROMPTS_A_BLOCK = 64  # encoded together, and in memory together


@dataclass(frozen=True, eq=False)
class Detection:
    """Scores of P prompts from S seeds; the higher, the more likely memorized.

    Attributes:
        prompts: as they were given.
        metric: its name.
        scores: (P,) float32, the mean of each prompt's seeds.
        seed_scores: (P, S) float32; NaN for seeds that a sequential screening did not need.
        values: (P, S, K) float32, what the metric measured; NaN as above.
        columns: what the K values are.
        seeds: of the S initial noises.
        truncated: the end of each prompt that did not fit the text encoder, "" where all did.
        memorized: the verdict on each prompt, None without a calibration.
        threshold: scores above it are called memorized; None without a calibration. Of a sequential screening
            that of the first look.
    """

    prompts: tuple[str, ...]
    metric: str
    scores: Tensor
    seed_scores: Tensor
    values: Tensor
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    truncated: tuple[str, ...]
    memorized: tuple[bool, ...] | None
    threshold: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; None for what was not measured."""
        return {
            "prompts": list(self.prompts),
            "metric": self.metric,
            "scores": self.scores.tolist(),
            "seed_scores": _without_nan(self.seed_scores.tolist()),
            "values": _without_nan(self.values.tolist()),
            "columns": list(self.columns),
            "seeds": list(self.seeds),
            "truncated": list(self.truncated),
            "memorized": None if self.memorized is None else list(self.memorized),
            "threshold": self.threshold,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Detection:
        """Read what `to_dict` gave."""
        tensors = {name: torch.tensor(_with_nan(data[name])) for name in ("scores", "seed_scores", "values")}
        verdicts = data["memorized"]
        return cls(
            **data
            | tensors
            | {name: tuple(data[name]) for name in ("prompts", "columns", "seeds", "truncated")}
            | {"memorized": None if verdicts is None else tuple(verdicts)}
        )

    @staticmethod
    def cat(parts: Sequence[Detection]) -> Detection:
        """The prompts of all parts, scored alike, in order."""
        first = parts[0]
        verdicts = [verdict for part in parts for verdict in part.memorized or ()]
        return replace(
            first,
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            scores=torch.cat([part.scores for part in parts]),
            seed_scores=torch.cat([part.seed_scores for part in parts]),
            values=torch.cat([part.values for part in parts]),
            truncated=tuple(text for part in parts for text in part.truncated),
            memorized=None if first.memorized is None else tuple(verdicts),
        )


@torch.no_grad()
def detect(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    metric: str | Metric | None = None,
    seeds: int | Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    calibration: Calibration | None = None,
    sequential: bool = False,
    batch_size: int = 32,
    cache: Path | None = None,
    progress: bool = False,
) -> Detection:
    """Score prompts by how much a model's predictions give away that it knows their pictures by heart.

    ::

        score[p] = mean over seeds s of metric(p, x_T of s)

    Every metric is measured per sample, in float32, and in epsilon whatever the model predicts. The
    unconditional prediction of pure noise does not depend on the prompt: it is computed once a seed. Prompts
    that tokenize alike are scored once.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: one or more.
        metric: "magnitude" (Wen et al.), "anisotropy" (Asthana and Belagiannis), "sharpness" (Jeon et al.),
            "attention_entropy" (Ren et al.) or "bright_ending" (Chen et al.), or one of their classes with
            other choices: `Magnitude(steps=None)`. Default: the calibration's, or "magnitude".
        seeds: how many (0, 1, 2, ...), or which; the same ones for every prompt. Default: the calibration's,
            or 4, Wen's.
        num_inference_steps: of the DDIM sampler. Default: the calibration's, or 50, Wen's.
        guidance_scale: of the sampler, from the second step on. Default: the calibration's, or 7.5, Wen's.
        height, width: of the pictures, in px; default the calibration's, or the model's own.
        calibration: what decides; without it there are scores and no verdicts.
        sequential: decide prompts as early as the calibration's looks allow; the others take more seeds.
        batch_size: rows in one call of the denoiser; halved on out-of-memory.
        cache: a folder that keeps the unconditional predictions for the next time.
        progress: show a bar.

    Returns:
        A `Detection`.

    Raises:
        TypeError: if a prompt is not a string, or seeds or steps are not integers.
        ValueError: if there are no prompts or no seeds, for numbers out of range, for a calibration of
            another model or other settings, for a model whose first step is pure noise (zero terminal SNR),
            where epsilon says nothing of the prompt, or whose predictions are not finite.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts = checked_prompts(prompts)
    if sequential and calibration is None:
        raise ValueError("sequential: needs a calibration, which has the thresholds of every look")
    model = models.load(pipe)
    settings = resolve(
        model,
        None if calibration is None else calibration.settings,
        metric=metric,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    if calibration is not None:
        calibration.check(model, batch_size)
    tokens = model.tokenize(prompts)
    first: dict[tuple[int, ...], int] = {}  # the first of the prompts that tokenize alike
    for index, prompt in enumerate(tokens):
        first.setdefault(prompt.ids, index)
    row = {ids: row for row, ids in enumerate(first)}
    which = torch.tensor([row[prompt.ids] for prompt in tokens])
    different = [prompts[index] for index in first.values()]

    if calibration is not None and sequential:
        looks = calibration.looks
    else:
        threshold = math.inf if calibration is None else calibration.threshold
        looks = (Look(len(settings.seeds), threshold, math.inf),)
    with (
        model.frozen(),
        tqdm(
            total=len(different) * len(settings.seeds), unit="row", disable=not progress, desc="detect"
        ) as bar,
    ):
        screen = Screen(
            model,
            settings.seeds,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            height=settings.latent_shape[1] * model.vae_scale_factor,
            width=settings.latent_shape[2] * model.vae_scale_factor,
            batch_size=batch_size,
            cache=cache,
        )
        columns = settings.metric.columns(screen)
        values, flagged = _look(screen, settings.metric, different, len(columns), looks, bar.update)
    values = values[which]
    seed_scores = settings.metric.score(values)
    return Detection(
        prompts=prompts,
        metric=settings.metric.name,
        scores=mean_score(seed_scores),
        seed_scores=seed_scores,
        values=values,
        columns=columns,
        seeds=settings.seeds,
        truncated=tuple(prompt.truncated for prompt in tokens),
        memorized=None if calibration is None else tuple(flagged[which].tolist()),
        threshold=None if calibration is None else looks[0].flag_above,
    )


def _look(
    screen: Screen,
    metric: Metric,
    prompts: list[str],
    columns: int,
    looks: Sequence[Look],
    advance: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Look by look: (P, S, K) values, NaN where none was needed, and (P,) verdicts; one host read a look."""
    model, seeds = screen.model, len(screen.noise)
    values = torch.full((len(prompts), seeds, columns), torch.nan)
    flagged = torch.zeros(len(prompts), dtype=torch.bool)
    waiting, seen = torch.arange(len(prompts)), 0
    for look in looks:
        found = [
            screen.measure(
                metric.measure,
                model.encode_prompt([prompts[i] for i in block.tolist()]),
                range(seen, look.seeds),
                advance,
                job=len(waiting) * (look.seeds - seen),
            )
            for block in waiting.split(_PROMPTS_A_BLOCK)
        ]
        values[waiting, seen : look.seeds] = torch.cat(found).cpu()
        seen = look.seeds
        so_far = values[waiting, :seen]
        if not bool(so_far.isfinite().all()):
            count = int((~so_far.isfinite()).flatten(1).any(1).sum())
            raise ValueError(
                f"pipe: its predictions for {count} of {len(prompts)} prompts are not finite in {model.dtype}"
            )
        flagged[waiting], undecided = look(metric.score(so_far))
        advance(int((~undecided).sum()) * (seeds - seen))
        waiting = waiting[undecided]
        if not len(waiting):
            break
    return values, flagged


def _with_nan(values: Any) -> Any:
    """Nested lists with NaN for None."""
    if isinstance(values, list):
        return [_with_nan(value) for value in values]
    return math.nan if values is None else values


def _without_nan(values: Any) -> Any:
    """Nested lists with None for NaN, which JSON does not have."""
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values
