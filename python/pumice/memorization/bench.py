"""Which mitigation keeps a model from replaying, at what price, and whether it only hides what it knows."""

from __future__ import annotations

import csv
import hashlib
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice import models
from pumice.io import Parts, check_writable
from pumice.memorization.arguments import check_finite, checked_prompts, checked_seeds
from pumice.memorization.gallery import Gallery, file_name, read_pictures, seconds_of, to_png
from pumice.memorization.statistics import clopper_pearson
from pumice.models import RowBudget

Mitigator = Callable[[Any], AbstractContextManager[Any]]
"""From a diffusers pipeline to a context manager that gives what draws in its place; see `bench`."""

_COLUMNS = (
    "name",
    "replication",
    "replication_low",
    "replication_high",
    "similarity_mean",
    "similarity_p95",
    "agreement",
    "quality",
    "red_team",
    "red_team_low",
    "red_team_high",
    "seconds",
)


@dataclass(frozen=True, eq=False)
class Bench:
    """What P prompts drew from S seeds under each mitigation, "none" first.

    Attributes:
        prompts: as they were given.
        rows: one a mitigation, of plain numbers; None is what was not measured.

            - name
            - replication, replication_low, replication_high: share of the prompts of which any picture
              replays any reference, and its 95 % Clopper-Pearson interval
            - similarity_mean, similarity_p95: of each picture to the nearest of its prompt's references
            - agreement: of the pictures with their original prompts, mean
            - quality: of the fresh prompts' pictures
            - red_team, red_team_low, red_team_high: as replication, drawn from DoRI's embeddings
            - seconds: to draw one picture of the prompts, mean
        similarities: (P, S) float32 by mitigation, to the nearest reference.
        red_team_similarities: the same of DoRI's pictures; empty without a red team.
        reference_pictures: a file a prompt, of its first reference; empty if no folder was given.
        pictures: files by mitigation, one a prompt: its picture that is nearest to a reference.
        red_team_pictures: the same of DoRI's pictures.
        settings: of the run.
    """

    prompts: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    similarities: dict[str, Tensor]
    red_team_similarities: dict[str, Tensor]
    reference_pictures: tuple[Path, ...]
    pictures: dict[str, tuple[Path, ...]]
    red_team_pictures: dict[str, tuple[Path, ...]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""

        def plain(files: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
            return {name: [str(file) for file in found] for name, found in files.items()}

        return {
            "prompts": list(self.prompts),
            "rows": [dict(row) for row in self.rows],
            "similarities": {name: found.tolist() for name, found in self.similarities.items()},
            "red_team_similarities": {
                name: found.tolist() for name, found in self.red_team_similarities.items()
            },
            "reference_pictures": [str(file) for file in self.reference_pictures],
            "pictures": plain(self.pictures),
            "red_team_pictures": plain(self.red_team_pictures),
            "settings": dict(self.settings),
        }

    def to_csv(self) -> str:
        """`rows` under a line of their names; empty is what was not measured."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def table(self) -> str:
        """`rows` to be read, in columns of plain text."""
        header = ("mitigation", "replication", "similarity", "p95", "agreement", "quality", "red team", "s")
        lines = [header]
        for row in self.rows:
            plain = [
                "-" if row[key] is None else f"{row[key]:.3f}"
                for key in ("similarity_mean", "similarity_p95", "agreement", "quality")
            ]
            seconds = f"{row['seconds']:.3g}"
            lines.append((row["name"], _rate(row, "replication"), *plain, _rate(row, "red_team"), seconds))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def bench(
    pipe: Any,
    prompts: str | Sequence[str],
    pictures: Sequence[Tensor] | Tensor,
    *,
    mitigations: Mapping[str, Mitigator],
    similarity: Callable[[Tensor, Tensor], Tensor],
    replayed: float = 0.5,
    agreement: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
    fresh_prompts: Sequence[str] | None = None,
    fresh_quality: Callable[[Tensor, Sequence[str]], float | Tensor] | None = None,
    seeds: int | Sequence[int] = 10,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    red_team_steps: int = 50,
    batch_size: int = 8,
    out: Path | None = None,
    restart: bool = False,
    progress: bool = False,
) -> Bench:
    """Set mitigations against each other on prompts that are known to replay their training pictures.

    ::

        s[p, s]     = max over the references r of prompt p:  similarity(picture of prompt p, seed s;  r)
        replication = share of prompts with  max over s of s[p, s] > replayed

    A mitigation is called with the diffusers pipeline and gives a context manager. Inside its block either
    the pipeline itself is changed (the manager gives None), or it gives what draws in its place, called as a
    diffusers pipeline is: with `prompt=` or `prompt_embeds=`, `generator=`, and so on, returning something
    with `.images`. So an edit of the weights is `edit.on`; a pipeline that guards itself and shares the
    model's parts is `lambda pipe: nullcontext(partial(guarded, guard=guard))`; and one that changes prompts
    is ::

        @contextmanager
        def shuffled(pipe):
            def draw(prompt=None, **inputs):  # the red team comes without a prompt, with embeddings
                return pipe(prompt and [shuffle(text) for text in prompt], **inputs)

            yield draw

    What a mitigation does with embeddings in place of a prompt is its own affair: drawing from them as they
    are is right where it has nothing to say of them.

    The red team (`dori`) starts from the prompt and works against the weights that the mitigation leaves,
    towards the prompt's first reference; then the mitigation draws with its embeddings. Those weights are
    those of a pipeline that the manager gives (or a `functools.partial` of one), else the model's own. A
    mitigation that only hides a picture from its caption is low in `replication` and high in `red_team`.

    All that is drawn is kept in `<out>/parts`: a second call with the same model, prompts and settings takes
    it from there. Mitigations are known by name: another one needs another name, or `restart`; one more can
    be added at any time. What is measured are the 8-bit pictures of the files, each time anew.

    Args:
        pipe: a diffusers pipeline, a path, a hub id, or a DiffusionModel.
        prompts: P, memorized ones.
        pictures: the references of each prompt: P tensors, (3, H, W) or (R, 3, H, W), in [0, 1], of any size.
        mitigations: by name; "none" is added.
        similarity: pictures (A, 3, H, W) and references (B, 3, H', W') in [0, 1] to (A, B), such as
            `evaluate.sscd(path)`.
        replayed: a picture more similar than that replays its reference. Default 0.5, usual with SSCD.
        agreement: pictures (N, 3, H, W) and their N original prompts to (N,), such as
            `evaluate.clip_agreement(model, processor)`.
        fresh_prompts: prompts that are not memorized, to see what the mitigation does to the others; one
            picture each, from the first seed.
        fresh_quality: all their pictures and the prompts to one number, or to one a picture.
        seeds: how many pictures a prompt (0, 1, 2, ...), or which. Default 10, MemBench's (arXiv:2407.17095).
        num_inference_steps: of the pipeline's own scheduler. Default 50, MemBench's.
        guidance_scale: default 7.5, MemBench's.
        red_team_steps: of DoRI. Default 50, its paper's for Stable Diffusion; the testbed needs 10. 0 is no
            red team.
        batch_size: pictures in one call; halved on out-of-memory.
        out: a folder for pictures; without one nothing is kept.
        restart: throw away what `out` has.
        progress: show a bar.

    Returns:
        A `Bench`.

    Raises:
        TypeError: if prompts are not strings, pictures no floating tensors, or mitigations not callable.
        ValueError: if there are no prompts, not as many pictures as prompts, pictures of another shape or
            range; for numbers out of range; if only one of fresh_prompts and fresh_quality is given; if what
            a mitigation draws is no picture or a similarity is not finite; if `out` holds another run, or
            cannot be written to.
        UnsupportedModelError: if the model's family is not supported.
    """
    prompts, seeds = checked_prompts(prompts), checked_seeds(seeds)
    references = _checked_pictures(pictures, prompts)
    _check_mitigations(mitigations)
    if (fresh_prompts is None) != (fresh_quality is None):
        given = "fresh_prompts" if fresh_quality is None else "fresh_quality"
        raise ValueError(f"fresh_prompts, fresh_quality: got {given} alone, expected both or neither")
    fresh = () if fresh_prompts is None else checked_prompts(fresh_prompts, "fresh_prompts")
    check_finite("replayed", replayed)
    check_finite("guidance_scale", guidance_scale)
    if operator.index(red_team_steps) < 0:
        raise ValueError(f"red_team_steps: got {red_team_steps}, expected a number that is not negative")
    budget = RowBudget(batch_size)
    model = models.load(pipe)
    model.schedule.timesteps(num_inference_steps)  # refuses bad ones
    settings = {
        "model": repr(model),
        "seeds": list(seeds),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "red_team_steps": red_team_steps,
    }
    job = settings | {
        "weights": models.fingerprint(model),
        "drawing": models.drawing_state(model),
        "prompts": prompts,
        "pictures": [hashlib.sha256(reference.numpy().tobytes()).hexdigest() for reference in references],
        "fresh": fresh,
    }
    settings |= {"replayed": replayed, "fresh_prompts": len(fresh)}

    with TemporaryDirectory() if out is None else nullcontext(out) as folder:
        check_writable(Path(folder), "out")
        parts = Parts(Path(folder) / "parts", job, restart=restart)
        files = [file_name("reference", "", index, 0) for index in range(len(prompts))]
        for file, reference in zip(files, references, strict=True):
            if file not in parts:
                parts.put(file, to_png(reference[0], 0))
        rows, similarities, red_similarities = [], {}, {}
        nearest: dict[str, tuple[Path, ...]] = {}
        red_nearest: dict[str, tuple[Path, ...]] = {}
        pictures_each = len(prompts) * len(seeds) * (2 if red_team_steps else 1) + len(fresh)
        bar = tqdm(total=pictures_each * (len(mitigations) + 1), unit="picture", disable=not progress)
        with model.frozen(), bar:
            for name, mitigation in {"none": nullcontext, **mitigations}.items():
                bar.set_description(name)
                with _entered(name, mitigation, model.pipe) as draws:
                    gallery = Gallery(name, model, draws, parts, settings, budget=budget, bar=bar)
                    drawn = gallery.draw("prompt", prompts, seeds)
                    red = gallery.attack(prompts, references, seeds) if red_team_steps else None
                    others = gallery.draw("fresh", fresh, seeds[:1])
                found = _similarities(similarity, drawn, references)
                similarities[name], nearest[name] = found, _nearest(found, drawn)
                row = dict.fromkeys(_COLUMNS) | {
                    "name": name,
                    **_replication("replication", found, replayed),
                    "similarity_mean": float(found.double().mean()),
                    "similarity_p95": float(found.double().flatten().quantile(0.95)),
                    "seconds": fmean(seconds_of(file) for group in drawn for file in group),
                }
                if agreement is not None:
                    row["agreement"] = _agreement(agreement, prompts, drawn)
                if fresh_quality is not None:
                    quality = fresh_quality(
                        read_pictures([file for group in others for file in group]), fresh
                    )
                    row["quality"] = float(torch.as_tensor(quality).double().mean())
                if red is not None:
                    found = _similarities(similarity, red, references)
                    red_similarities[name], red_nearest[name] = found, _nearest(found, red)
                    row |= _replication("red_team", found, replayed)
                rows.append(row)
    kept = out is not None
    return Bench(
        prompts=prompts,
        rows=tuple(rows),
        similarities=similarities,
        red_team_similarities=red_similarities,
        reference_pictures=tuple(parts.path(file) for file in files) if kept else (),
        pictures=nearest if kept else {},
        red_team_pictures=red_nearest if kept else {},
        settings=settings,
    )


def _checked_pictures(pictures: Sequence[Tensor] | Tensor, prompts: tuple[str, ...]) -> list[Tensor]:
    """The references of each prompt, (R, 3, H, W) float32 on the CPU."""
    if len(pictures) != len(prompts):
        raise ValueError(f"pictures: got {len(pictures)}, expected {len(prompts)}, as prompts")
    found = []
    for picture in pictures:
        if not isinstance(picture, Tensor) or not picture.is_floating_point():
            kind = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
            raise TypeError(f"pictures: got {kind}, expected floating tensors in [0, 1]")
        batch = picture[None] if picture.ndim == 3 else picture
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
            raise ValueError(
                f"pictures: got shape {tuple(picture.shape)}, expected (3, H, W) or (R, 3, H, W)"
            )
        if not bool(((batch > -0.001) & (batch < 1.001)).all()):
            raise ValueError("pictures: got values out of range or NaN, expected [0, 1]")
        found.append(batch.detach().float().cpu().contiguous())
    return found


def _check_mitigations(mitigations: Mapping[str, Mitigator]) -> None:
    for name, mitigation in mitigations.items():
        if not isinstance(name, str) or not callable(mitigation):
            raise TypeError(
                f"mitigations: got a {type(mitigation).__name__} under {name!r}, expected callables by name"
            )
        if name in ("", "none") or len(quote(name, safe="")) > 200:
            raise ValueError(
                f"mitigations: got the name {name!r}, expected a short one, and not 'none', which is added"
            )


def _entered(name: str, mitigation: Mitigator, pipe: Any) -> AbstractContextManager[Any]:
    manager = mitigation(pipe)
    if not hasattr(manager, "__enter__"):
        raise TypeError(
            f"mitigations: {name!r} gave a {type(manager).__name__}, expected a context manager; "
            "contextlib.nullcontext makes one of it"
        )
    return manager


def _similarities(
    similarity: Callable[[Tensor, Tensor], Tensor],
    drawn: Sequence[Sequence[Path]],
    references: Sequence[Tensor],
) -> Tensor:
    """(P, S): of each picture to the nearest of its prompt's references."""
    found = []
    for files, reference in zip(drawn, references, strict=True):
        values = similarity(read_pictures(files), reference).float().cpu()
        # a NaN would pass for a picture that replays nothing
        if values.shape != (len(files), len(reference)) or not bool(values.isfinite().all()):
            raise ValueError(
                f"similarity: returned shape {tuple(values.shape)} or values that are not finite, "
                f"expected finite ({len(files)}, {len(reference)})"
            )
        found.append(values.amax(1))
    return torch.stack(found)


def _agreement(
    agreement: Callable[[Tensor, Sequence[str]], Tensor],
    prompts: Sequence[str],
    drawn: Sequence[Sequence[Path]],
) -> float:
    scores = [
        agreement(read_pictures(files), [prompt] * len(files))
        for prompt, files in zip(prompts, drawn, strict=True)
    ]
    return float(torch.cat(scores).double().mean())


def _nearest(similarities: Tensor, drawn: Sequence[Sequence[Path]]) -> tuple[Path, ...]:
    return tuple(files[best] for files, best in zip(drawn, similarities.argmax(1).tolist(), strict=True))


def _replication(name: str, similarities: Tensor, replayed: float) -> dict[str, float]:
    hits, count = int((similarities > replayed).any(1).sum()), len(similarities)
    low, high = clopper_pearson(hits, count)
    return {name: hits / count, f"{name}_low": low, f"{name}_high": high}


def _rate(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "-"
    return f"{row[key]:.0%} [{row[f'{key}_low']:.0%}, {row[f'{key}_high']:.0%}]"
