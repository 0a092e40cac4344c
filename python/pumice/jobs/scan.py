"""Score a list of prompts of any size; an interrupted scan goes on where it stopped."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pumice import memorization, models
from pumice.io import Parts, check_writable
from pumice.memorization import Detection
from pumice.models import DiffusionModel

SHARD = 64  # prompts
PICTURES_A_CALL = 8
PICTURE_STEPS = 25  # of the pipeline's own sampler


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan found.

    Attributes:
        detection: of all prompts, in the order of the list.
        threshold: scores above it are called memorized; None if nothing says where it lies.
        threshold_source: in words.
        order: prompt numbers from the highest score to the lowest.
        pictures: files of pictures by prompt number, for the first of `order`.
    """

    detection: Detection
    threshold: float | None
    threshold_source: str
    order: tuple[int, ...]
    pictures: dict[int, Path]

    @property
    def memorized(self) -> tuple[bool | None, ...]:
        """The verdict of each prompt, None without a threshold."""
        scores = self.detection.scores.tolist()
        return tuple(None if self.threshold is None else score > self.threshold for score in scores)


def scan(
    pipe: Any,
    prompts: Sequence[str],
    out: Path,
    *,
    threshold: float | None = None,
    fresh: Sequence[str] | None = None,
    fpr: float = 0.01,
    pictures: int = 0,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Scan:
    """`memorization.detect` over a list, shard by shard, with a threshold and pictures of the highest scores.

    Everything that is done is kept in `<out>/parts`: a second call with the same model, prompts and settings
    takes it from there.

    Args:
        pipe: as for `memorization.detect`.
        prompts: the list.
        out: a folder.
        threshold: the score above which a prompt is called memorized.
        fresh: instead of it, prompts known not to be memorized: the threshold is where a share `fpr` of them
        is above.
        pictures: how many of the highest scores get a picture, drawn from the noise of the first seed.
        restart: throw away what `out` has.
        settings: of `memorization.detect`.

    Raises:
        ValueError: if `out` holds another scan, or cannot be written to; and as `memorization.detect`.
    """
    if threshold is not None and fresh is not None:
        raise ValueError("threshold, fresh: got both, expected one")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold: got {threshold}, expected a finite number")
    if pictures < 0:
        raise ValueError(f"pictures: got {pictures}, expected a number that is not negative")
    model = models.load(pipe)
    check_writable(out, "out")
    job = {
        "model": [models.fingerprint(model), repr(model), dict(model.pipe.scheduler.config)],
        "prompts": prompts,
        "fresh": fresh,
        "settings": settings,
    }
    parts = Parts(out / "parts", job, restart=restart)

    source = "given" if threshold is not None else "none: neither a threshold nor fresh prompts were given"
    if fresh is not None:
        scores = _score(model, fresh, parts, "fresh", settings, progress).scores
        threshold = memorization.threshold_at(fpr, scores)
        source = f"at most {fpr:.1%} of {len(fresh)} fresh prompts score higher"
    detection = _score(model, prompts, parts, "prompts", settings, progress)
    order = tuple(torch.argsort(detection.scores, descending=True, stable=True).tolist())
    drawn = _draw(model, detection, order[:pictures], parts, settings, progress)
    return Scan(detection, threshold, source, order, drawn)


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
            shards.append(json.loads(parts.path(file).read_text()))
            bar.update(len(shard))
    whole = {
        key: [value for shard in shards for value in shard[key]]
        for key in ("scores", "magnitudes", "truncated")
    }
    return Detection(
        prompts=tuple(prompts),
        scores=torch.tensor(whole["scores"]),
        magnitudes=torch.tensor(whole["magnitudes"]),
        seeds=tuple(shards[0]["seeds"]),
        timesteps=tuple(shards[0]["timesteps"]),
        truncated=tuple(whole["truncated"]),
    )


def _draw(
    model: DiffusionModel,
    detection: Detection,
    chosen: Sequence[int],
    parts: Parts,
    settings: dict[str, Any],
    progress: bool,
) -> dict[int, Path]:
    """Pictures of the chosen prompts, from the noise of the first seed, by the pipeline itself."""
    files = {index: f"picture-{index:05d}.png" for index in chosen}
    left = [index for index in chosen if files[index] not in parts]
    with tqdm(
        total=len(chosen),
        initial=len(chosen) - len(left),
        unit="picture",
        desc="drawing",
        disable=not progress,
    ) as bar:
        for first in range(0, len(left), PICTURES_A_CALL):
            batch = left[first : first + PICTURES_A_CALL]
            images = model.pipe(
                prompt=[detection.prompts[index] for index in batch],
                generator=[torch.Generator().manual_seed(detection.seeds[0]) for _ in batch],
                num_inference_steps=PICTURE_STEPS,
                guidance_scale=settings.get("guidance_scale", 7.5),
                height=settings.get("height"),
                width=settings.get("width"),
            ).images
            for index, image in zip(batch, images, strict=True):
                file = io.BytesIO()
                image.save(file, "PNG")
                parts.put(files[index], file.getvalue())
            bar.update(len(batch))
    return {index: parts.path(file) for index, file in files.items()}
