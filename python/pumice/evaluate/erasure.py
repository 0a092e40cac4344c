"""What edits took from a model, and what they left: erasure and preservation rates, drift, quality."""

from __future__ import annotations

import math
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.erase import ErasureWarning
from pumice.evaluate.drawing import ORIGINAL, checked_edits, checked_labels, edited, groups
from pumice.evaluate.scores import checked_scores, mean
from pumice.memorization.arguments import check_finite, checked_seeds
from pumice.memorization.ms_ssim import ms_ssim
from pumice.memorization.statistics import clopper_pearson
from pumice.models import DiffusionModel, Edit, RowBudget
from pumice.models.drawing import draw

Classify = Callable[[Tensor], Sequence[Sequence[str]]]
"""From pictures (B, 3, H, W) in [0, 1] to the labels of each, likeliest first."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """What P prompts drew from S seeds under each edit, "none", the model as it is, first.

    Attributes:
        erased, preserved: (prompt, label) as they were given; together P.
        rows: one an edit, of plain numbers; None is what was not measured. Rates are in per cent.

            - name
            - esr_<k>, esr_<k>_low, esr_<k>_high: share of the erased prompts' pictures that do not have their
              label among the first k, and its 95 % Clopper-Pearson interval over pictures
            - psr_<k>, psr_<k>_low, psr_<k>_high: share of the preserved prompts' pictures that do have it
            - loss_<k>: points of psr_<k> that the edit costs, psr_<k>("none") - psr_<k>
            - agreement_erased, agreement_preserved: mean, each with _low and _high, the normal 95 % interval
            - distance_erased, distance_preserved: the same of the distance to the picture of "none"
            - fid: between the preserved prompts' pictures and those of "none"
        labels: by name, of each prompt and seed (prompt by prompt) the first labels, in lower case.
        pictures: by name, (P, 3, H, W) uint8 on the CPU, those of the first seed, erased prompts first.
        settings: of the run, with the pictures' size in px.
    """

    erased: tuple[tuple[str, str], ...]
    preserved: tuple[tuple[str, str], ...]
    rows: tuple[dict[str, Any], ...]
    labels: dict[str, tuple[tuple[str, ...], ...]]
    pictures: dict[str, Tensor]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, without the pictures."""
        return {
            "erased": [list(pair) for pair in self.erased],
            "preserved": [list(pair) for pair in self.preserved],
            "rows": [dict(row) for row in self.rows],
            "labels": {name: [list(one) for one in found] for name, found in self.labels.items()},
            "settings": dict(self.settings),
        }

    def table(self) -> list[tuple[str, ...]]:
        """`rows` to be read, under a line of titles; "-" is what was not measured."""
        rates = [f"{kind}_{k}" for k in self.settings["k"] for kind in ("esr", "psr", "loss")]
        others = ["agreement_erased", "agreement_preserved", "distance_erased", "distance_preserved", "fid"]
        others = [key for key in others if any(row[key] is not None for row in self.rows)]
        titles = [key.replace("_", "-").replace("esr", "ESR").replace("psr", "PSR") for key in rates]
        lines = [("edit", *titles, *(key.replace("_", " ") for key in others))]
        for row in self.rows:
            cells = [(row[key], ".1f") for key in rates] + [(row[key], ".3f") for key in others]
            lines.append((row["name"], *("-" if value is None else f"{value:{how}}" for value, how in cells)))
        return lines


@torch.no_grad()
def erasure(
    pipe: Any,
    edits: Mapping[str, Edit],
    erased: Sequence[tuple[str, str]],
    preserved: Sequence[tuple[str, str]],
    *,
    classify: Classify,
    k: int | Iterable[int] = (1, 5),
    seeds: int | Sequence[int] = (0,),
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    agreement: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    fid: Any = None,
    batch_size: int = 32,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> Erasure:
    """Draw a model and its edits from the same noise, and count what is gone and what is still there.

    ::

        ESR-k = 100 P(label not among the first k)     over the pictures of the erased prompts
        PSR-k = 100 P(label among the first k)         over the pictures of the preserved prompts

    (Bui et al., arXiv:2410.15618.) Read each beside that of the model as it is, "none": no classifier finds
    every label in every picture. A label that is gone from its prompt need not be gone from the model: that
    is for `concept_inversion` to find out.

    The model as it is and all edits are drawn in one batch of the denoiser, each sample under its own map of
    the text embeddings (`models.hook_edits`); an edit that is no such map, as one that zeroes weights, is
    drawn in batches of its own. Pictures are those of the pipeline with its own scheduler, rounded to 8 bits.
    The noise of a picture comes from a generator of its seed alone, `torch.Generator().manual_seed(seed)`: it
    is the same for all edits and prompts, and does not depend on `batch_size`.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        edits: by name; "none" is added.
        erased: prompts with the label that their pictures should no longer have.
        preserved: prompts with the label that they should still have.
        classify: pictures (B, 3, H, W) in [0, 1] on the CPU to the labels of each, likeliest first, all or
            the first few. Labels are compared in lower case.
        k: one or several; those larger than the number of labels that `classify` returns are left out.
            Default 1 and 5, the paper's.
        seeds: how many pictures a prompt (0, 1, 2, ...), or which.
        num_inference_steps: of the pipeline's own scheduler. Default 50, the paper's.
        guidance_scale: default 7.5, the paper's.
        agreement: pictures (N, 3, H, W) and their N prompts to (N,), such as `evaluate.clip_agreement`.
        distance: two batches of pictures (N, 3, H, W) in [0, 1] to (N,), such as an LPIPS network. Default
            1 - MS-SSIM (Wang et al., 2003; three scales). Distances at different sizes of picture cannot be
            compared.
        fid: a FrechetInceptionDistance of torchmetrics, or what is used as one, that has seen nothing yet; it
            is copied for each edit. Pictures are given to it as floats in [0, 1] if it has a network of its
            user or `normalize`, else as uint8.
        batch_size: pictures in one call, those of all edits together, and at least one of each that share the
            call; halved on out-of-memory.
        height, width: px, by default those of the pipeline.
        progress: show a bar.

    Returns:
        An `Erasure`. Intervals take pictures for independent; those of one prompt or one seed are not quite.

    Raises:
        TypeError: if edits are no edits or prompts and labels no strings.
        ValueError: if there is neither an erased nor a preserved prompt, for numbers out of range, an edit
            that was made for a model with other weights, if what `classify`, `agreement` or `distance` return
            does not fit, and for a `fid` that is in use, or with fewer than two preserved pictures.
        UnsupportedModelError: if the model's family is not supported.

    Warns:
        ErasureWarning: if a label never came from `classify`, so that no rate says anything of it.
    """
    every = checked_edits(edits)
    gone, kept = _checked_pairs("erased", erased), _checked_pairs("preserved", preserved)
    if not gone and not kept:
        raise ValueError("erased, preserved: got no prompts, expected at least one")
    ks = _checked_k(k)
    seeds = checked_seeds(seeds)
    if operator.index(num_inference_steps) < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps}, expected at least 1")
    check_finite("guidance_scale", guidance_scale)
    most = RowBudget(batch_size).rows
    if getattr(fid, "update_called", False):
        raise ValueError("fid: it has seen pictures already, expected a new one")
    if fid is not None and len(kept) * len(seeds) < 2:
        raise ValueError(f"fid: got {len(kept) * len(seeds)} preserved pictures, expected at least 2")
    model = models.load(pipe)
    model.check_text_to_image()
    size = model.latent_shape(height, width)[1:]
    judge = _Judge(gone, kept, seeds, classify, agreement, distance, fid)
    inputs = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": size[0] * model.vae_scale_factor,
        "width": size[1] * model.vae_scale_factor,
    }
    bar = tqdm(total=len(judge.prompts) * len(every), unit="picture", desc="erasure", disable=not progress)
    with model.frozen(), bar:
        for group in groups(every, most):
            with edited(model, list(group.values())):
                for first, pictures in _drawn(model, judge, len(group), most, inputs):
                    judge.see(first, dict(zip(group, pictures, strict=True)))
                    bar.update(pictures.shape[0] * pictures.shape[1])
    fewest = min(len(one) for found in judge.labels.values() for one in found)
    ks = tuple(value for value in ks if value <= fewest)
    if not ks:
        raise ValueError(f"k: got {k}, expected at most {fewest}, the labels that classify returns")
    judge.warn_of_unseen()
    return Erasure(
        erased=gone,
        preserved=kept,
        rows=tuple(judge.row(name, ks) for name in every),
        labels={name: tuple(one[: max(ks)] for one in judge.labels[name]) for name in every},
        pictures={name: torch.stack(judge.firsts[name]) for name in every},
        settings={
            "model": repr(model),
            "scheduler": type(model.pipe.scheduler).__name__,
            "seeds": list(seeds),
            **inputs,
            "k": list(ks),
            "distance": "1 - MS-SSIM" if distance is None else "given",
        },
    )


class _Judge:
    """Sees pictures batch by batch, those of the model as it is before the others."""

    def __init__(
        self,
        erased: tuple[tuple[str, str], ...],
        preserved: tuple[tuple[str, str], ...],
        seeds: tuple[int, ...],
        classify: Classify,
        agreement: Callable[[Tensor, Sequence[str]], Tensor] | None,
        distance: Callable[[Tensor, Tensor], Tensor] | None,
        fid: Any,
    ) -> None:
        pairs = erased + preserved
        self.prompts = [prompt for prompt, _ in pairs for _ in seeds]
        self.seeds = list(seeds) * len(pairs)
        self.labels: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        self.firsts: dict[str, list[Tensor]] = defaultdict(list)
        self._wanted = [label.casefold() for _, label in pairs for _ in seeds]
        self._border = len(erased) * len(seeds)
        self._classify, self._agreement, self._fid = classify, agreement, fid
        self._distance = _dissimilarity if distance is None else distance
        self._originals: list[Tensor] = []
        self._agreements: dict[str, list[Tensor]] = defaultdict(list)
        self._distances: dict[str, list[Tensor]] = defaultdict(list)
        self._fids: dict[str, Any] = {}

    def see(self, start: int, pictures: Mapping[str, Tensor]) -> None:
        """Pictures (B, 3, H, W) uint8 by name, of the samples from `start` on."""
        if ORIGINAL in pictures:
            self._originals += pictures[ORIGINAL].clone()  # else the others' would be kept, too
        names, count = list(pictures), len(next(iter(pictures.values())))
        rows = slice(start, start + count)
        found = checked_labels(
            self._classify(torch.cat([pictures[name] for name in names]) / 255), count * len(names)
        )
        original = torch.stack(self._originals[rows])
        first_seeds = [row for row in range(count) if self.seeds[start + row] == self.seeds[0]]
        for place, name in enumerate(names):
            self.labels[name] += found[place * count : (place + 1) * count]
            self.firsts[name] += pictures[name][first_seeds]
            images = pictures[name] / 255
            if self._agreement is not None:
                scores = self._agreement(images, self.prompts[rows])
                self._agreements[name].append(checked_scores("agreement", scores, count))
            if name != ORIGINAL:
                scores = self._distance(images, original / 255)
                self._distances[name].append(checked_scores("distance", scores, count))
                if self._fid is not None:
                    self._compare(name, pictures[name], original, max(self._border - start, 0))

    def row(self, name: str, ks: Sequence[int]) -> dict[str, Any]:
        """All that was counted and measured of one edit."""
        found: dict[str, Any] = {"name": name}
        sides = {"erased": slice(self._border), "preserved": slice(self._border, None)}
        for k in ks:
            hits, before = (self._hits(one, k) for one in (name, ORIGINAL))
            found |= _rate(f"esr_{k}", [not hit for hit in hits[sides["erased"]]])
            kept, original = hits[sides["preserved"]], before[sides["preserved"]]
            found |= _rate(f"psr_{k}", kept)
            found[f"loss_{k}"] = 100 * (sum(original) - sum(kept)) / len(kept) if kept else None
        for key, scores in (("agreement", self._agreements[name]), ("distance", self._distances[name])):
            for side, part in sides.items():
                found |= mean(f"{key}_{side}", torch.cat(scores)[part] if scores else torch.empty(0))
        fid = float(self._fids[name].compute()) if name in self._fids else math.nan
        found["fid"] = fid if math.isfinite(fid) else None
        return found

    def warn_of_unseen(self) -> None:
        """A label that a classifier does not have counts as erased from every picture."""
        seen = {label for lists in self.labels.values() for labels in lists for label in labels}
        unseen = sorted(set(self._wanted) - seen)
        if unseen:
            warnings.warn(
                f"erased, preserved: classify never returned {', '.join(map(repr, unseen))}; if it has other "
                "names for them, the rates say nothing",
                ErasureWarning,
                stacklevel=4,
            )

    def _hits(self, name: str, k: int) -> list[bool]:
        """Whether each picture's label is among its first k."""
        return [label in found[:k] for label, found in zip(self._wanted, self.labels[name], strict=True)]

    def _compare(self, name: str, pictures: Tensor, original: Tensor, start: int) -> None:
        if start >= len(pictures):
            return
        if name not in self._fids:
            self._fids[name] = deepcopy(self._fid)
        metric = self._fids[name]
        floats = getattr(metric, "used_custom_model", False) or getattr(metric, "normalize", False)
        for images, real in ((original, True), (pictures, False)):
            images = images[start:].to(getattr(metric, "device", "cpu"))
            metric.update(images / 255 if floats else images, real=real)


def _drawn(
    model: DiffusionModel, judge: _Judge, copies: int, most: int, inputs: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Where a part of the samples begins, and its pictures (copies, B, 3, H, W)."""
    budget, start = RowBudget(max(1, most // copies)), 0
    while start < len(judge.prompts):

        def call(rows: int, start: int = start) -> Tensor:
            prompts = [prompt for prompt in judge.prompts[start : start + rows] for _ in range(copies)]
            return draw(model.pipe, judge.seeds[start : start + rows], copies, prompt=prompts, **inputs)

        pictures = budget.run(call)
        yield start, pictures
        start += pictures.shape[1]


def _rate(key: str, hits: Sequence[bool]) -> dict[str, float | None]:
    """The share in per cent, and its interval."""
    if not hits:
        return dict.fromkeys((key, f"{key}_low", f"{key}_high"))
    low, high = clopper_pearson(sum(hits), len(hits))
    return {key: 100 * sum(hits) / len(hits), f"{key}_low": 100 * low, f"{key}_high": 100 * high}


def _dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    return 1 - ms_ssim(a, b)


def _checked_pairs(name: str, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or [type(text) for text in pair] != [str, str]:
            raise TypeError(f"{name}: got {pair!r}, expected pairs of prompt and label")
        found.append((pair[0], pair[1]))
    return tuple(found)


def _checked_k(k: int | Iterable[int]) -> tuple[int, ...]:
    found = tuple(map(operator.index, k)) if isinstance(k, Iterable) else (operator.index(k),)
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise ValueError(f"k: got {k}, expected positive numbers, each once")
    return found
