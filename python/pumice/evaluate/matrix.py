"""The matrix: protections x purifiers x recipes of training, and how much of a subject each recovers."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import safe_open
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

import pumice
from pumice import models
from pumice.evaluate.preprocess import check_images
from pumice.evaluate.scores import checked_scores, mean
from pumice.evaluate.visibility import visibility
from pumice.io import check_writable
from pumice.io.parts import Parts
from pumice.models.arguments import checked_count
from pumice.models.fingerprint import drawing_state

Protect = Callable[[Tensor, Any, str], Tensor]
"""From pictures (N, 3, H, W) in [0, 1], the pipeline and the subject's prompt to protected pictures."""

Purify = Callable[[Tensor], Tensor]
"""From pictures (N, 3, H, W) in [0, 1] to pictures of the same shape."""

Recipe = Callable[[Any, Tensor, str, Sequence[str], int], Tensor]
"""From the pipeline, pictures, the subject's prompt, P prompts to draw and a seed to drawings
(P, D, 3, H, W), floating in [0, 1]."""

_FREEDOM = 2  # degrees of it that an interval takes
_JUDGES = ("identity", "quality", "score", "agreement")

Cell = tuple[str, str, str]
"""The names of a protection, a purifier and a recipe."""


class Subject(Protocol):
    """What is to be learned, such as a `testbed.SubjectTrial`; pictures (N, 3, H, W) in [0, 1] to (N,)."""

    @property
    def pictures(self) -> Tensor: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def identity(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def quality(self) -> Callable[[Tensor], Tensor]: ...


@dataclass(frozen=True, eq=False)
class Study:
    """What a matrix is made of, all by name; None stands for doing nothing.

    Attributes:
        pipe: that learns: a diffusers pipeline, a path, a hub id, or a DiffusionModel; it is not changed.
        subjects: who is learned.
        protections: `Protect`, such as `functools.partial(protect.mist, eps=11 / 255)`.
        purifiers: `Purify`.
        recipes: `Recipe`; the first is what the others are compared with.
        seeds: of the recipes.
        agreement: pictures (N, 3, H, W) and N prompts to (N,), such as `evaluate.clip_agreement`.
    """

    pipe: Any
    subjects: Mapping[str, Subject]
    protections: Mapping[str, Protect | None]
    purifiers: Mapping[str, Purify | None]
    recipes: Mapping[str, Recipe]
    seeds: Sequence[int] = (0, 1, 2)
    agreement: Callable[[Tensor, Sequence[str]], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """What was learned in each cell of a matrix.

    Attributes:
        rows: one a cell, of plain numbers; None is what was not measured.

            - protection, purifier, recipe: their names
            - identity, quality, score, agreement, each with _low and _high: mean over all drawings of all
              subjects and seeds, and its 95 % interval for these subjects, over trainings (Student's, of the
              trainings' means); score is (identity + quality) / 2
            - recovered, recovered_low, recovered_high: of the score that protection costs under the first
              recipe, which share is back, if it costs anything, and its 95 % interval
            - psnr_protected, psnr_purified: of the pictures against the clean ones
            - seconds_protect, seconds_purify: of one subject; seconds_learn: of one training and its drawings
        scores: by cell and judge, (subjects, seeds, drawings) float64.
        pictures: by subject, protection and purifier, what was learned, (N, 3, H, W) uint8.
        drawn: by cell, (subjects, seeds, P, D, 3, H, W) uint8.
        settings: of the run.
    """

    rows: tuple[dict[str, Any], ...]
    scores: dict[Cell, dict[str, Tensor]]
    pictures: dict[tuple[str, str, str], Tensor]
    drawn: dict[Cell, Tensor]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON, without the pictures."""
        return {
            "rows": [
                {**row, "scores": {judge: found.tolist() for judge, found in scores.items()}}
                for row, scores in zip(self.rows, self.scores.values(), strict=True)
            ],
            "settings": dict(self.settings),
        }

    def to_csv(self) -> str:
        """`rows`, one a line; empty is what was not measured."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()

    def table(self) -> list[tuple[str, ...]]:
        """`rows` to be read, under a line of titles; "-" is what was not measured."""
        columns = {
            "identity": ".3f",
            "quality": ".3f",
            "score": ".3f",
            "agreement": ".3f",
            "psnr_protected": ".1f",
            "psnr_purified": ".1f",
            "seconds_protect": ".1f",
            "seconds_purify": ".1f",
            "seconds_learn": ".1f",
        }
        names = ("protection", "purifier", "recipe")
        lines = [(*names, *(key.replace("_", " ") for key in columns), "recovered, %")]
        for row in self.rows:
            cells = ["-" if row[key] is None else f"{row[key]:{how}}" for key, how in columns.items()]
            lines.append((*(row[name] for name in names), *cells, _recovered_text(row)))
        return lines


@torch.inference_mode(False)  # a caller's inference mode would leave nothing to differentiate
def matrix(
    study: Study | Callable[[], Study],
    out: str | PathLike[str],
    *,
    workers: int = 1,
    restart: bool = False,
    progress: bool = False,
) -> Matrix:
    """Protect subjects, purify the pictures, learn them, and judge what is drawn: every way with every other.

    ::

        score     = (identity + quality) / 2
        recovered = (score - score of protected) / (score of clean - score of protected)

    as the average score of arXiv:2406.18944; "protected" and "clean" are learned by the first recipe, without
    purification, "clean" without protection, too. Pictures are rounded to 8 bits after protection and after
    purification, as files are.

    Everything that took time is a file in `out`/parts, under a name that stands for all it depends on: the
    weights, the pictures, the method with its arguments, the seed, and the version of pumice. A run that was
    stopped anywhere goes on, and one with a further method makes only what is new. A method is told by the
    name of its function and the arguments of a `functools.partial`: one that does something else under the
    same name needs `restart`.

    Args:
        study: what to set against each other; or a function that makes it.
        out: a folder, which is made.
        workers: processes that share the work, each with one part of the CPU's threads. More than one take a
            function that makes the study, which each calls for itself, so that it has to be one that can be
            pickled, such as a partial of a module's function.
        restart: throw away what is there.
        progress: show a bar.

    Returns:
        A `Matrix`. Intervals over drawings take them for independent; those of one training are not quite.

    Raises:
        TypeError: if something in the study is not what its name says, or several workers got no function.
        ValueError: if a part of the study is empty, a folder cannot be written or is of another program, and
            if a method or judge returns pictures or scores that do not fit.
    """
    workers = checked_count("workers", workers)
    if workers > 1 and isinstance(study, Study):
        raise TypeError("study: got a Study, expected a function that makes one, for several workers")
    made = study if isinstance(study, Study) else study()
    _check(made)
    folder = Path(out)
    check_writable(folder, "out")
    work = _Work(made, folder / "parts", restart=restart)
    work.begin()
    stages = work.stages()
    bar = tqdm(total=sum(map(len, stages)), unit="part", desc="matrix", disable=not progress)
    with _pool(study, folder / "parts", workers) as pool, bar:
        for stage in stages:
            for _ in map(work.do, stage) if pool is None else _shared(pool, stage):
                bar.update()
    return _judged(work)


class _Part:
    """Pictures that took time: (..., 3, H, W) uint8, and how many seconds."""

    def __init__(self, pictures: Tensor, seconds: float) -> None:
        self.pictures, self.seconds = pictures, seconds

    def encoded(self) -> bytes:
        return safetensors.torch.save({"pictures": self.pictures}, {"seconds": repr(self.seconds)})

    @classmethod
    def read(cls, path: Path) -> _Part:
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("pictures"), float(file.metadata()["seconds"]))


Task = tuple[str, ...]
"""The names of a subject, a protection, a purifier, a recipe and a seed, or the first few of them."""


class _Work:
    """Makes parts that are not there, and reads those that are."""

    def __init__(self, study: Study, folder: Path, *, restart: bool = False) -> None:
        self.study, self._model = study, models.load(study.pipe)
        self._parts = Parts(folder, {"what": "pumice.evaluate.matrix"}, restart=restart)
        state = {"weights": models.fingerprint(self._model), **drawing_state(self._model)}
        self._about = [pumice.__version__, json.dumps(state, sort_keys=True, default=str)]

    def begin(self) -> None:
        """Make the folder, which workers then find."""
        self._parts.put("settings.json", json.dumps(_settings(self.study), indent=1))

    def stages(self) -> list[list[Task]]:
        """Tasks that need nothing of each other, after those that they need."""
        study = self.study
        protected: list[Task] = list(product(study.subjects, study.protections))
        purified = [(*task, name) for task in protected for name in study.purifiers]
        seeds = map(str, study.seeds)  # first one seed of all cells
        learned = [(*task, name, seed) for seed in seeds for task in purified for name in study.recipes]
        return [protected, purified, learned]

    def do(self, task: Task) -> _Part:
        """What a task stands for, read or made."""
        return {2: self._protected, 3: self._purified, 5: self._learned}[len(task)](*task)  # type: ignore[operator]

    def _protected(self, subject: str, protection: str) -> _Part:
        clean, prompt = self.study.subjects[subject].pictures, self.study.subjects[subject].prompt
        method = self.study.protections[protection]
        if method is None:
            return _Part(_bytes(clean), 0.0)
        key = ["protect", _described(method), _digest(clean), prompt]
        return self._kept(key, clean.shape, protection, lambda: method(clean, self._model, prompt))

    def _purified(self, subject: str, protection: str, purifier: str) -> _Part:
        before, method = self._protected(subject, protection).pictures, self.study.purifiers[purifier]
        if method is None:
            return _Part(before, 0.0)
        key = ["purify", _described(method), _digest(before)]
        return self._kept(key, before.shape, purifier, lambda: method(before / 255))

    def _learned(self, subject: str, protection: str, purifier: str, recipe: str, seed: str) -> _Part:
        of, method = self.study.subjects[subject], self.study.recipes[recipe]
        pictures = self._purified(subject, protection, purifier).pictures
        key = ["learn", _described(method), _digest(pictures), of.prompt, *of.prompts, seed]
        shape = (len(of.prompts), -1, *pictures.shape[1:])
        return self._kept(
            key, shape, recipe, lambda: method(self._model, pictures / 255, of.prompt, of.prompts, int(seed))
        )

    def _kept(self, key: list[str], shape: Sequence[int], name: str, make: Callable[[], Tensor]) -> _Part:
        digest = hashlib.sha256(json.dumps([*self._about, *key]).encode()).hexdigest()[:32]
        path = f"{key[0]}-{digest}.safetensors"
        if path not in self._parts:
            start = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - start
            check_images(name, made.flatten(0, -4))
            if made.ndim != len(shape) or any(
                n not in (-1, m) for n, m in zip(shape, made.shape, strict=True)
            ):
                raise ValueError(f"{name}: returned shape {tuple(made.shape)}, expected {tuple(shape)}")
            self._parts.put(path, _Part(_bytes(made), seconds).encoded())
        return _Part.read(self._parts.path(path))


# --- Several processes

_worker: _Work  # of this process, if it is one of several


@contextmanager
def _pool(study: Any, folder: Path, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """None is this process."""
    if workers == 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork would have no threads
        initializer=_start,
        initargs=(study, folder, threads),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _shared(pool: ProcessPoolExecutor, stage: Sequence[Task]) -> Iterator[None]:
    """The tasks of a stage, in whatever order they are done."""
    try:
        for done in as_completed([pool.submit(_run, task) for task in stage]):
            yield done.result()
    except BrokenProcessPool as error:
        raise ValueError("workers: one was killed (memory?); call again to go on, or with fewer") from error


def _start(study: Callable[[], Study], folder: Path, threads: int) -> None:
    global _worker
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()  # when it is killed, nobody else ends this one
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    torch.set_num_threads(threads)
    _worker = _Work(study(), folder)


def _run(task: Task) -> None:
    _worker.do(task)


# --- Judging


def _judged(work: _Work) -> Matrix:
    study, rows = work.study, []
    pictures = {
        (subject, protection, purifier): work.do((subject, protection, purifier)).pictures
        for subject, protection, purifier in product(study.subjects, study.protections, study.purifiers)
    }
    drawn: dict[Cell, Tensor] = {}
    scores: dict[Cell, dict[str, Tensor]] = {}
    seconds: dict[Cell, float] = {}
    for cell in product(study.protections, study.purifiers, study.recipes):
        parts = [[work.do((name, *cell, str(seed))) for seed in study.seeds] for name in study.subjects]
        drawn[cell] = torch.stack([torch.stack([part.pictures for part in of]) for of in parts])
        seconds[cell] = _average([part.seconds for of in parts for part in of])
        scores[cell] = _scores(study, drawn[cell])
    visible = {key: _psnr(study, pictures, *key) for key in product(study.protections, study.purifiers)}
    plain = next(iter(study.recipes))
    unpurified = next((name for name, method in study.purifiers.items() if method is None), None)
    unprotected = next((name for name, method in study.protections.items() if method is None), None)
    for protection, purifier, recipe in scores:
        found = scores[protection, purifier, recipe]
        row: dict[str, Any] = {"protection": protection, "purifier": purifier, "recipe": recipe}
        for judge in _JUDGES:
            if judge in found:
                row |= _of_trainings(judge, found[judge])
            else:
                row |= dict.fromkeys((judge, f"{judge}_low", f"{judge}_high"))
        if None in (unpurified, unprotected) or protection == unprotected:
            row |= dict.fromkeys(("recovered", "recovered_low", "recovered_high"))
        else:
            protected = scores[protection, unpurified, plain]["score"]  # type: ignore[index]
            clean = scores[unprotected, unpurified, plain]["score"]  # type: ignore[index]
            row |= recovered(found["score"], protected, clean)
        row["psnr_protected"] = None if unpurified is None else visible[protection, unpurified]
        row["psnr_purified"] = visible[protection, purifier]
        row["seconds_protect"] = _average([work.do((name, protection)).seconds for name in study.subjects])
        row["seconds_purify"] = _average(
            [work.do((name, protection, purifier)).seconds for name in study.subjects]
        )
        row["seconds_learn"] = seconds[protection, purifier, recipe]
        rows.append(row)
    return Matrix(tuple(rows), scores, pictures, drawn, _settings(study))


def recovered(scores: Tensor, protected: Tensor, clean: Tensor) -> dict[str, float | None]:
    """Which share of what protection costs is back, and its 95 % interval.

    ::

        R = (mean(scores) - mean(protected)) / (mean(clean) - mean(protected))

    All are (subjects, seeds, drawings). The interval is for these subjects, over trainings: Student's, of the
    residuals (scores - protected) - R (clean - protected) of a subject's trainings, linear in them; it takes
    two degrees of freedom. None if protection costs nothing, as far as drawings tell: if the normal 95 %
    interval of clean - protected, drawing by drawing, has 0 in it.
    """
    known: dict[str, float | None] = dict.fromkeys(("recovered", "recovered_low", "recovered_high"))
    if (mean("cost", (clean - protected).flatten())["cost_low"] or 0) <= 0:
        return known
    score, low, high = (found.mean(2) for found in (scores, protected, clean))
    cost = (high - low).mean()
    share = (score - low).mean() / cost
    known["recovered"] = float(share)
    half = _half_interval(score - low - share * (high - low))
    if half is not None:
        half /= float(cost)
        known["recovered_low"], known["recovered_high"] = float(share) - half, float(share) + half
    return known


def _of_trainings(judge: str, scores: Tensor) -> dict[str, float | None]:
    """The mean of (subjects, seeds, drawings), and its 95 % interval for these subjects, over trainings."""
    trainings = scores.mean(2)
    found, half = float(trainings.mean()), _half_interval(trainings)
    ends = (None, None) if half is None else (found - half, found + half)
    return {judge: found, f"{judge}_low": ends[0], f"{judge}_high": ends[1]}


def _half_interval(values: Tensor) -> float | None:
    """Half of Student's 95 % interval of the mean of (subjects, seeds), around each subject's own mean."""
    subjects, seeds = values.shape
    freedom = subjects * (seeds - 1)
    if freedom < _FREEDOM:
        return None
    variance = (values - values.mean(1, keepdim=True)).square().sum() / freedom
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(float(variance) / values.numel())


def _scores(study: Study, drawn: Tensor) -> dict[str, Tensor]:
    """By judge (subjects, seeds, P D) float64, of drawings (subjects, seeds, P, D, 3, H, W)."""
    found: dict[str, Tensor] = {}
    subjects, seeds, _, drawings = drawn.shape[:4]
    flat = drawn.flatten(1, 3) / 255
    for judge in ("identity", "quality"):
        each = [
            checked_scores(judge, getattr(subject, judge)(images), len(images))
            for subject, images in zip(study.subjects.values(), flat, strict=True)
        ]
        found[judge] = torch.stack(each).view(subjects, seeds, -1)
    found["score"] = (found["identity"] + found["quality"]) / 2
    if study.agreement is not None:
        each = []
        for subject, images in zip(study.subjects.values(), flat, strict=True):
            prompts = [prompt for _ in range(seeds) for prompt in subject.prompts for _ in range(drawings)]
            each.append(checked_scores("agreement", study.agreement(images, prompts), len(images)))
        found["agreement"] = torch.stack(each).view(subjects, seeds, -1)
    return found


def _psnr(
    study: Study, pictures: Mapping[tuple[str, str, str], Tensor], protection: str, purifier: str
) -> float | None:
    """Of the mean squared error over all subjects; None if nothing has changed."""
    now = torch.cat([pictures[name, protection, purifier] for name in study.subjects]) / 255
    clean = torch.cat([_bytes(subject.pictures) for subject in study.subjects.values()]) / 255
    return visibility(now, clean).mean()["psnr"]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _recovered_text(row: Mapping[str, Any]) -> str:
    if row["recovered"] is None:
        return "-"
    text = f"{100 * row['recovered']:z.0f}"
    if row["recovered_low"] is None:
        return text
    return f"{text} [{100 * row['recovered_low']:z.0f}, {100 * row['recovered_high']:z.0f}]"


# --- What a part depends on


def _bytes(pictures: Tensor) -> Tensor:
    return (pictures.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def _digest(pictures: Tensor) -> str:
    shape = str((tuple(pictures.shape), pictures.dtype)).encode()
    return hashlib.sha256(shape + pictures.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _described(value: Any) -> str:
    """The name of a function and the arguments of a partial, the same in every process.

    Raises:
        ValueError: for what has no name that tells it from others.
    """
    if isinstance(value, partial):
        named = [f"{key}={_described(each)}" for key, each in sorted(value.keywords.items())]
        return f"{_described(value.func)}({', '.join([*map(_described, value.args), *named])})"
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    name = getattr(value, "__qualname__", "")
    if name and "<" not in name and not inspect.ismethod(value):
        return f"{value.__module__}.{name}"
    if name or hex(id(value)) in repr(value):
        raise ValueError(
            f"study: got {value!r}, whose parts could not be told from another's; expected functions of "
            "modules, or functools.partial of them and plain values"
        )
    return repr(value)


def _settings(study: Study) -> dict[str, Any]:
    def all_of(methods: Mapping[str, Any]) -> dict[str, str | None]:
        return {name: None if method is None else _described(method) for name, method in methods.items()}

    return {
        "subjects": list(study.subjects),
        "protections": all_of(study.protections),
        "purifiers": all_of(study.purifiers),
        "recipes": all_of(study.recipes),
        "seeds": list(study.seeds),
    }


def _check(study: Study) -> None:
    if not isinstance(study, Study):
        raise TypeError(f"study: got a {type(study).__name__}, expected a Study")
    for name in ("subjects", "protections", "purifiers", "recipes"):
        given = getattr(study, name)
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise TypeError(f"{name}: got a {type(given).__name__}, expected them by name")
        if not given:
            raise ValueError(f"{name}: got none, expected at least one")
        for key, method in given.items():
            optional = name in ("protections", "purifiers") and method is None
            if name != "subjects" and not optional and not callable(method):
                raise TypeError(f"{name}: got a {type(method).__name__} for {key!r}, expected a function")
    if not study.seeds or not all(type(seed) is int for seed in study.seeds):
        raise ValueError(f"seeds: got {study.seeds!r}, expected whole numbers, at least one")
    if len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds: got {study.seeds!r}, expected each once")
    shapes = set()
    for key, subject in study.subjects.items():
        check_images(f"subjects[{key!r}].pictures", subject.pictures)
        shapes.add((tuple(subject.pictures.shape[1:]), len(subject.prompts)))
    if len(shapes) > 1 or not next(iter(shapes))[1]:
        raise ValueError(
            f"subjects: got (picture, prompts) of {sorted(shapes)}, expected the same of all, and a prompt"
        )
    _settings(study)  # describes all methods
