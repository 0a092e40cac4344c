"""At which score a prompt of one checkpoint is called memorized, and how well that holds."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pumice import models
from pumice.io import write_whole
from pumice.models import DiffusionModel

from .sequential import Look
from .settings import Settings

SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """What is known of one detector on one checkpoint: made by `calibrate`, used by `detect`.

    Attributes:
        created_by: pumice's version.
        checkpoint: {"name", "sha256"}, the latter of denoiser and text encoders (`models.fingerprint`).
        prediction_type, dtype, scheduler: of the model.
        attention_backend, batch_size: where others are used, scores may differ by rounding.
        settings: of the score.
        memorized, fresh: {"name", "count", "sha256"} of the lists.
        quantiles: of the fresh scores, by number of seeds, then by rate.
        threshold: a prompt whose score is above it is called memorized.
        looks: the same for sequential screening.
        held_out: on the halves of the lists that threshold and looks were not made from: "fpr" and "tpr" with
            their Clopper-Pearson 95 % bounds, in both conventions of `tpr_at_fpr`, and those of the looks
            with the mean number of seeds a fresh prompt took.
        auc: of the whole lists, with its bootstrap 95 % interval over prompts.
        floor: what rounding alone makes: how far scores differ if each row is a call of its own.
        self_test: {"prompts", "scores", "tolerance"}: `self_test` scores them again.
        ms_per_row: measured, of one prompt and seed.
    """

    created_by: str
    checkpoint: dict[str, str]
    prediction_type: str
    dtype: str
    scheduler: dict[str, Any]
    attention_backend: str
    batch_size: int
    settings: Settings
    memorized: dict[str, Any]
    fresh: dict[str, Any]
    quantiles: dict[str, dict[str, float]]
    threshold: float
    looks: tuple[Look, ...]
    held_out: dict[str, Any]
    auc: dict[str, float]
    floor: float
    self_test: dict[str, Any]
    ms_per_row: float

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "schema": SCHEMA,
            "score": "per sample, float32, in epsilon",
            **asdict(self),
            "settings": self.settings.to_dict(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file cannot be read or is not a calibration of this layout.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            del data["score"]
            settings, looks = data.pop("settings"), data.pop("looks")
            return cls(
                settings=Settings.from_dict(settings), looks=tuple(Look(**look) for look in looks), **data
            )
        except OSError as error:
            raise ValueError(f"calibration: cannot read {str(path)!r}: {error.strerror}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"calibration: {str(path)!r} is not a calibration: {reason}") from error

    def check(self, pipe: Any, batch_size: int | None = None) -> None:
        """Make sure that it was made for this model; warn where scores may differ by rounding.

        Raises:
            ValueError: telling what differs: prediction type, dtype, noise schedule or weights.
        """
        model = models.load(pipe)
        for what, made, found in (
            ("prediction type", self.prediction_type, model.prediction_type),
            ("dtype", self.dtype, dtype_name(model)),
            ("noise schedule", self.scheduler, model.schedule.config),
            ("weights' sha256", self.checkpoint["sha256"], models.fingerprint(model)),
        ):
            if made != found:
                raise ValueError(
                    f"calibration: made for another model: its {what} is {made}, this one's {found}"
                )
        for what, was, now in (
            ("attention", self.attention_backend, attention_backend(model)),
            ("batch size", self.batch_size, batch_size or self.batch_size),
        ):
            if was != now:
                warnings.warn(
                    f"calibration: made with {what} {was}, now {now}: scores may differ by rounding",
                    stacklevel=3,
                )


def dtype_name(model: DiffusionModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def attention_backend(model: DiffusionModel) -> str:
    """The names of the attention processors in use."""
    return ", ".join(sorted({type(processor).__name__ for processor in model.unet.attn_processors.values()}))
