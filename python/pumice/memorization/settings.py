"""How prompts are scored: what two scores must share to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pumice.models import DiffusionModel

from .anisotropy import Anisotropy
from .arguments import check_finite, checked_seeds
from .attention_entropy import AttentionEntropy
from .bright_ending import BrightEnding
from .magnitude import Magnitude
from .metric import Metric
from .sharpness import Sharpness

METRICS: dict[str, type[Metric]] = {
    metric.name: metric for metric in (Magnitude, Anisotropy, Sharpness, AttentionEntropy, BrightEnding)
}

# The paper's number of seeds, steps and scale; its fastest setting of its metric.
_DEFAULTS: dict[str, Any] = {
    "metric": Magnitude(),
    "seeds": (0, 1, 2, 3),
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
}


@dataclass(frozen=True)
class Settings:
    """Metric, noises, sampler and picture size of a score.

    Attributes:
        metric: with its choices.
        seeds: of the initial noises.
        num_inference_steps, guidance_scale: of the DDIM sampler; the scale from its second step on.
        latent_shape: (C, h, w).
    """

    metric: Metric
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    latent_shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "metric": self.metric.to_dict(),
            "seeds": list(self.seeds),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "latent_shape": list(self.latent_shape),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Read what `to_dict` gave."""
        metric = dict(data["metric"])
        return cls(
            metric=METRICS[metric.pop("name")](**metric),
            seeds=tuple(data["seeds"]),
            num_inference_steps=data["num_inference_steps"],
            guidance_scale=data["guidance_scale"],
            latent_shape=tuple(data["latent_shape"]),
        )


def resolve(
    model: DiffusionModel,
    made: Settings | None,
    *,
    metric: str | Metric | None = None,
    seeds: int | Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Settings:
    """The settings given; those that are None as a calibration was `made` with, or the defaults.

    Raises:
        ValueError: naming the one that is out of range or not the calibration's.
    """
    if guidance_scale is not None:
        check_finite("guidance_scale", guidance_scale)
    given: dict[str, Any] = {
        "metric": None if metric is None else checked_metric(metric),
        "seeds": None if seeds is None else checked_seeds(seeds),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "latent_shape": model.latent_shape(height, width) if made is None or height or width else None,
    }
    if made is None:
        chosen: dict[str, Any] = {
            name: _DEFAULTS.get(name) if value is None else value for name, value in given.items()
        }
        return Settings(**chosen)
    for name, value in given.items():
        if value is not None and value != getattr(made, name):
            argument = "height, width" if name == "latent_shape" else name
            raise ValueError(f"{argument}: got {value}, the calibration was made with {getattr(made, name)}")
    return made


def checked_metric(metric: str | Metric) -> Metric:
    """A metric by its name, with the choices of its paper, or as it is."""
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    return METRICS[metric]()
