"""Screen a list of prompts of any size; an interrupted scan goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from pumice import memorization, models, pipelines
from pumice.io import Parts, check_writable
from pumice.memorization import Calibration, Detection, Magnitude
from pumice.memorization.arguments import checked_prompts
from pumice.memorization.settings import Settings, resolve
from pumice.memorization.statistics import clopper_pearson
from pumice.models import DiffusionModel
from pumice.pipelines import Guard, Mitigation

SHARD = 64  # prompts
DETAILS_A_CALL = 8  # prompts
_NOT_OF_THE_SCORE = ("batch_size", "cache", "sequential")  # arguments of detect


@dataclass(frozen=True)
class Detail:
    """What is known of one prompt beside its score; None is what was not asked for.

    Attributes:
        words: each word with its significance (`memorization.explain`).
        curve: the magnitude at each step of drawing `picture`.
        curve_timesteps: of those steps.
        picture: a file, drawn from the noise of the first seed.
        guarded: a file, the same with the guard on.
    """

    words: tuple[tuple[str, float], ...] | None
    curve: tuple[float, ...] | None
    curve_timesteps: tuple[int, ...] | None
    picture: Path | None
    guarded: Path | None


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan found.

    Attributes:
        detection: of all prompts, in the order of the list.
        threshold: scores above it are called memorized; None if nothing says where it lies.
        threshold_source: in words.
        order: prompt numbers from the highest score to the lowest.
        details: by prompt number, of the first of `order`.
    """

    detection: Detection
    threshold: float | None
    threshold_source: str
    order: tuple[int, ...]
    details: dict[int, Detail]

    @property
    def memorized(self) -> tuple[bool | None, ...]:
        """The verdict of each prompt, None without a threshold."""
        if self.detection.memorized is not None:
            return self.detection.memorized
        scores = self.detection.scores.tolist()
        return tuple(None if self.threshold is None else score > self.threshold for score in scores)


def scan(
    pipe: Any,
    prompts: Sequence[str],
    out: Path,
    *,
    calibration: Calibration | None = None,
    threshold: float | None = None,
    fresh: Sequence[str] | None = None,
    fpr: float = 0.01,
    details: int = 0,
    guard: Mitigation | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Scan:
    """`memorization.detect` over a list, shard by shard, and a close look at the highest scores.

    Everything that is done is kept in `<out>/parts`: a second call with the same model, prompts and settings
    takes it from there.

    Args:
        pipe: as for `memorization.detect`.
        prompts: the list.
        out: a folder.
        calibration: what decides which prompts are called memorized.
        threshold: instead of it, the score above which a prompt is.
        fresh: instead of both, prompts known not to be memorized: the threshold is where a share `fpr` of
            them is above.
        details: how many of the highest scores get a `Detail`: words, a picture and its magnitude curve.
        guard: draws these pictures again with a `pipelines.Guard` of this mitigation, at the threshold; for a
            calibration that of a single seed. For the magnitude at the first step alone, which guards read.
        restart: throw away what `out` has.
        settings: of `memorization.detect`.

    Raises:
        ValueError: if `out` holds another scan, or cannot be written to; and as `memorization.detect`.
    """
    prompts = checked_prompts(prompts)
    fresh = None if fresh is None else checked_prompts(fresh, "fresh")
    given = {"calibration": calibration, "threshold": threshold, "fresh": fresh}
    if sum(value is not None for value in given.values()) > 1:
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"{', '.join(names)}: got {len(names)} of them, expected one")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold: got {threshold}, expected a finite number")
    if details < 0:
        raise ValueError(f"details: got {details}, expected a number that is not negative")
    model = models.load(pipe)
    named = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_SCORE}
    scored = resolve(model, None if calibration is None else calibration.settings, **named)
    if guard is not None and scored.metric != Magnitude():
        raise ValueError(f"guard: got {guard!r}, which reads the magnitude at the first step; leave it out")
    if guard is not None and all(value is None for value in given.values()):
        raise ValueError(f"guard: got {guard!r}, which needs a calibration, a threshold or fresh prompts")
    check_writable(out, "out")
    job = {
        "model": [models.fingerprint(model), repr(model), models.drawing_state(model)],
        "prompts": prompts,
        "fresh": fresh,
        "calibration": None if calibration is None else calibration.to_dict(),
        "guard": guard,
        "settings": settings,
    }
    parts = Parts(out / "parts", job, restart=restart)

    source = "given" if threshold is not None else "none: no calibration, threshold or fresh prompts"
    if calibration is not None:
        memorization.self_test(model, calibration)
        looks = calibration.looks if settings.get("sequential") else ()
        threshold = looks[0].flag_above if looks else calibration.threshold
        rate = calibration.held_out["sequential_fpr" if looks else "fpr"]
        source = (
            (f"at the first of {len(looks)} looks, later ones have their own; " if looks else "")
            + f"calibration {calibration.checkpoint['name']}: {rate['value']:.1%} of "
            f"{calibration.held_out['fresh']} held-out fresh prompts above, "
            f"95 % interval {rate['low']:.1%} to {rate['high']:.1%}"
        )
    # checked here and not at every shard, unless each needs the looks
    settings |= {"calibration": calibration} if settings.get("sequential") else _as_scored(model, scored)
    if fresh is not None:
        scores = _score(model, fresh, parts, "fresh", settings, progress).scores
        threshold = memorization.threshold_at(fpr, scores)
        above = int((scores > threshold).sum())
        low, high = clopper_pearson(above, len(scores))
        source = (
            f"{above} of the {len(fresh)} fresh prompts score higher, "
            f"95 % interval of their share {low:.1%} to {high:.1%}"
        )
    detection = _score(model, prompts, parts, "prompts", settings, progress)
    order = tuple(torch.argsort(detection.scores, descending=True, stable=True).tolist())
    if guard is None or threshold is None:
        chosen = None
    elif calibration is not None:
        chosen = Guard.calibrated(calibration, guard)
    else:
        chosen = Guard(threshold, guard)
    found = _details(model, detection, order[:details], parts, chosen, scored, progress)
    return Scan(detection, threshold, source, order, found)


def _score(
    model: DiffusionModel,
    prompts: Sequence[str],
    parts: Parts,
    name: str,
    settings: dict[str, Any],
    progress: bool,
) -> Detection:
    """One `Detection` from the shards on disk and those still to do."""
    shards = []
    with tqdm(total=len(prompts), unit="prompt", desc=f"scoring {name}", disable=not progress) as bar:
        for number, first in enumerate(range(0, len(prompts), SHARD)):
            shard, file = prompts[first : first + SHARD], f"{name}-{number:05d}.json"
            if file not in parts:
                parts.put(file, json.dumps(memorization.detect(model, shard, **settings).to_dict()))
            shards.append(Detection.from_dict(json.loads(parts.path(file).read_text())))
            bar.update(len(shard))
    return Detection.cat(shards)


def _details(
    model: DiffusionModel,
    detection: Detection,
    chosen: Sequence[int],
    parts: Parts,
    guard: Guard | None,
    scored: Settings,
    progress: bool,
) -> dict[int, Detail]:
    """Of the chosen prompts: their words, and what the pipeline itself draws of them."""
    # another guard, or one of another threshold, draws other pictures
    key = hashlib.sha256(repr(guard).encode()).hexdigest()[:8]
    files = {index: f"prompt-{index:05d}-{key}" for index in chosen}
    left = [index for index in chosen if f"{files[index]}.json" not in parts]
    size = _size(model, scored)
    if left:
        watched = pipelines.around(model)
    with tqdm(
        total=len(chosen),
        initial=len(chosen) - len(left),
        unit="prompt",
        desc="details",
        disable=not progress,
    ) as bar:
        for first in range(0, len(left), DETAILS_A_CALL):
            batch = left[first : first + DETAILS_A_CALL]
            prompts = [detection.prompts[index] for index in batch]
            inputs = {
                "prompt": prompts,
                # as scored, so that the guard sees the timestep that its threshold is of
                "num_inference_steps": scored.num_inference_steps,
                "guidance_scale": scored.guidance_scale,
                **size,
            }
            explained = _words(model, prompts, detection.seeds, size)
            drawn = watched(**inputs, generator=_generators(detection, batch), track_noise_norm=True)
            timesteps = [int(t) for t in model.pipe.scheduler.timesteps]
            if guard is not None:
                for index, image in zip(
                    batch,
                    watched(**inputs, generator=_generators(detection, batch), guard=guard).images,
                    strict=True,
                ):
                    parts.put(f"{files[index]}.guarded.png", _png(image))
            for index, words, image, curve in zip(
                batch, explained, drawn.images, drawn.noise_norms.tolist(), strict=True
            ):
                parts.put(f"{files[index]}.png", _png(image))
                about = {"words": words, "curve": curve, "timesteps": timesteps[: len(curve)]}
                parts.put(f"{files[index]}.json", json.dumps(about))  # last: the prompt is done
            bar.update(len(batch))
    return {index: _detail(file, parts, guarded=guard is not None) for index, file in files.items()}


def _detail(file: str, parts: Parts, *, guarded: bool) -> Detail:
    about = json.loads(parts.path(f"{file}.json").read_text())
    words = about["words"]
    return Detail(
        words=None if words is None else tuple((text, score) for text, score in words),
        curve=tuple(about["curve"]),
        curve_timesteps=tuple(about["timesteps"]),
        picture=parts.path(f"{file}.png"),
        guarded=parts.path(f"{file}.guarded.png") if guarded else None,
    )


def _words(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], size: dict[str, Any]
) -> list[tuple[tuple[str, float], ...] | None]:
    """Words with their significance; None for a prompt that has none."""
    has_words = [bool(tokens.words) for tokens in model.tokenize(prompts)]
    explained = iter(
        memorization.explain(
            model,
            [prompt for prompt, some in zip(prompts, has_words, strict=True) if some],
            seeds=seeds,
            wrt="input",
            **size,
        )
        if any(has_words)
        else ()
    )
    return [
        tuple((word.text, word.score) for word in next(explained).words) if some else None
        for some in has_words
    ]


def _generators(detection: Detection, batch: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(detection.seeds[0]) for _ in batch]


def _as_scored(model: DiffusionModel, scored: Settings) -> dict[str, Any]:
    """Arguments of `detect`."""
    return {
        "metric": scored.metric,
        "seeds": scored.seeds,
        "num_inference_steps": scored.num_inference_steps,
        "guidance_scale": scored.guidance_scale,
        **_size(model, scored),
    }


def _size(model: DiffusionModel, scored: Settings) -> dict[str, Any]:
    """The pictures' sides in px."""
    _, height, width = scored.latent_shape
    return {"height": height * model.vae_scale_factor, "width": width * model.vae_scale_factor}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
