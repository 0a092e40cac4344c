"""Calibrate a detector on prompts that are known to be memorized and prompts that are known not to be."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

import pumice
from pumice import models

from .arguments import checked_prompts
from .calibration import Calibration, attention_backend, dtype_name
from .detect import Detection, detect
from .metric import Metric
from .sequential import FLOORS, Look, calibrate_looks, mean_score
from .settings import resolve
from .statistics import auc, auc_interval, clopper_pearson, tpr_at_fpr
from .threshold import threshold_at

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.995, 0.998)
_REMEMBERED = 4  # prompts of either kind for the self-test
_ROUNDING = 0.005  # of the threshold: what another machine's kernels may make of a score


def calibrate(
    pipe: Any,
    memorized: Sequence[str],
    fresh: Sequence[str],
    *,
    pictures: Sequence[Hashable] | None = None,
    fpr: float = 0.01,
    name: str = "",
    memorized_name: str = "memorized prompts",
    fresh_name: str = "fresh prompts",
    metric: str | Metric | None = None,
    seeds: int | Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Calibration:
    """Set a detector's threshold on one half of the prompts, and measure what it is worth on the other half.

    ::

        threshold: at most a share fpr of the first half's fresh prompts score higher

    Halves are drawn by a hash of the prompts, so they do not depend on the order of the lists; prompts of one
    training picture stay together. The AUC, which has nothing to tune, is of the whole lists.

    Args:
        pipe: as for `detect`.
        memorized: prompts that are known to replay training pictures.
        fresh: prompts that are known not to; they decide what a false positive is, so take those that users
            write, hard ones among them (long, rare words, captions of ordinary training pictures).
        pictures: of each memorized prompt, which training picture it replays; by default each has its own.
        fpr: the wanted false positive rate. Default 1 %, the literature's.
        name, memorized_name, fresh_name: what checkpoint and lists are called in the calibration.
        metric, seeds, num_inference_steps, guidance_scale, height, width, batch_size, progress: as for
            `detect`; the calibration holds for these.

    Raises:
        ValueError: for fewer than 4 prompts in a list, an fpr out of range, pictures that do not match the
            memorized prompts, a prompt that is in both lists; and as `detect`.
    """
    memorized, fresh = checked_prompts(memorized, "memorized"), checked_prompts(fresh, "fresh")
    pictures = list(memorized) if pictures is None else list(pictures)
    for argument, prompts in (("memorized", memorized), ("fresh", fresh)):
        if len(set(prompts)) < 4:
            raise ValueError(f"{argument}: got {len(set(prompts))} different prompts, expected at least 4")
    if len(set(pictures)) < 2:
        raise ValueError(f"pictures: got {len(set(pictures))} different ones, expected at least 2")
    if len(pictures) != len(memorized):
        raise ValueError(
            f"pictures: got {len(pictures)}, expected one for each of {len(memorized)} memorized prompts"
        )
    if both := set(memorized) & set(fresh):
        raise ValueError(f"fresh: {sorted(both)[0]!r} is also among the memorized prompts")
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: got {fpr}, expected a rate in (0, 1)")
    model = models.load(pipe)
    settings = resolve(
        model,
        None,
        metric=metric,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )

    def score(prompts: Sequence[str], rows: int = batch_size) -> Detection:
        return detect(
            model,
            prompts,
            metric=settings.metric,
            seeds=settings.seeds,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            height=height,
            width=width,
            batch_size=rows,
            progress=progress,
        )

    start = time.perf_counter()
    negatives = score(fresh).seed_scores
    seconds = time.perf_counter() - start
    positives = score(memorized).seed_scores
    remembered = [*memorized[:_REMEMBERED], *fresh[:_REMEMBERED]]
    by_seed = torch.cat([positives[:_REMEMBERED], negatives[:_REMEMBERED]])
    floor = float((score(remembered, rows=1).seed_scores - by_seed).abs().max())
    tune_positive, tune_negative = _first_half(pictures), _first_half(fresh)
    threshold = threshold_at(fpr, mean_score(negatives[tune_negative]))
    looks = calibrate_looks(positives[tune_positive], negatives[tune_negative], fpr=fpr, floor=floor)
    low, high = auc_interval(mean_score(positives), mean_score(negatives))
    return Calibration(
        created_by=f"pumice {pumice.__version__}",
        checkpoint={"name": name, "sha256": models.fingerprint(model)},
        prediction_type=model.prediction_type,
        dtype=dtype_name(model),
        scheduler=model.schedule.config,
        attention_backend=attention_backend(model),
        batch_size=batch_size,
        settings=settings,
        memorized=_list(memorized_name, memorized),
        fresh=_list(fresh_name, fresh),
        quantiles={str(look.seeds): _quantiles(mean_score(negatives[:, : look.seeds])) for look in looks},
        threshold=threshold,
        looks=looks,
        held_out=_held_out(
            positives[~tune_positive], negatives[~tune_negative], threshold=threshold, looks=looks, fpr=fpr
        ),
        auc={"value": auc(mean_score(positives), mean_score(negatives)), "low": low, "high": high},
        floor=floor,
        self_test={
            "prompts": remembered,
            "scores": mean_score(by_seed).tolist(),
            "tolerance": max(FLOORS * floor, _ROUNDING * abs(threshold)),
        },
        ms_per_row=1000 * seconds / negatives.numel(),
    )


def self_test(pipe: Any, calibration: Calibration) -> float:
    """Score again the prompts that a calibration remembers; the largest deviation.

    Raises:
        ValueError: if it is above the calibration's tolerance: this machine, or these versions, do not
            reproduce its scores; and as `Calibration.check`.
    """
    test = calibration.self_test
    found = detect(pipe, test["prompts"], calibration=calibration, batch_size=calibration.batch_size)
    deviation = float((found.scores - torch.tensor(test["scores"])).abs().max())
    if not deviation <= test["tolerance"]:
        raise ValueError(
            f"calibration: its own prompts score up to {deviation:.3g} off here, "
            f"more than {test['tolerance']:.3g}; calibrate again"
        )
    return deviation


def _first_half(items: Sequence[Hashable]) -> Tensor:
    """A mask of every second item, ordered by a hash; equal items are on one side."""
    order = sorted(set(items), key=lambda item: hashlib.sha256(repr(item).encode()).digest())
    first = set(order[::2])
    return torch.tensor([item in first for item in items])


def _held_out(
    positives: Tensor, negatives: Tensor, *, threshold: float, looks: Sequence[Look], fpr: float
) -> dict[str, Any]:
    found: dict[str, Any] = {"memorized": len(positives), "fresh": len(negatives)}
    for name, scores in (("tpr", mean_score(positives)), ("fpr", mean_score(negatives))):
        found[name] = _rate(int((scores > threshold).sum()), len(scores))
    for convention in ("below", "nearest"):
        found[f"tpr_at_{fpr:g}_fpr_{convention}"] = tpr_at_fpr(
            mean_score(positives),
            mean_score(negatives),
            fpr,
            convention=convention,
        )
    for name, scores in (("tpr", positives), ("fpr", negatives)):
        flagged = torch.zeros(len(scores), dtype=torch.bool)
        waiting, seeds = torch.ones(len(scores), dtype=torch.bool), torch.zeros(len(scores))
        for look in looks:
            seeds[waiting] = look.seeds
            above, undecided = look(scores)
            flagged |= above & waiting
            waiting &= undecided
        found[f"sequential_{name}"] = _rate(int(flagged.sum()), len(scores))
        found[f"sequential_{name}"]["mean_seeds"] = float(seeds.mean())
    return found


def _rate(hits: int, count: int) -> dict[str, float]:
    low, high = clopper_pearson(hits, count)
    return {"value": hits / count, "low": low, "high": high}


def _quantiles(scores: Tensor) -> dict[str, float]:
    return {str(q): float(scores.double().quantile(q)) for q in QUANTILES}


def _list(name: str, prompts: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return {"name": name, "count": len(prompts), "sha256": digest}
