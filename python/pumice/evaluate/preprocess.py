"""From pictures in [0, 1] to what a judging network was trained on, whole batches at once, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

_BICUBIC = 3  # PIL's number; all other filters are taken for its bilinear one
_SQUEEZED = 384  # px; from it on, processors with a crop_pct squeeze pictures instead of cropping them


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the middle, normalise; to 8 bit the same as PIL's filters and torchvision's transforms.

    Attributes:
        size: (height, width), or one number for the shorter side, the other in proportion; px.
        crop: side of the square cut out of the middle, px; None for all of it.
        mean, std: a channel, of pictures in [0, 1].
        interpolation: of the resizing, antialiased.
    """

    size: int | tuple[int, int]
    crop: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised, of pictures (B, 3, H, W) in [0, 1]."""
        size = self.size
        if isinstance(size, int):
            height, width = images.shape[2:]
            short = min(height, width)
            size = (size * height // short, size * width // short)
        # bicubic overshoots
        images = F.interpolate(images.float(), size, mode=self.interpolation, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (round((side - self.crop) / 2) for side in size)
            images = images[:, :, top : top + self.crop, left : left + self.crop]
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def clip_preprocessing(model: Any, image_processor: Any) -> Preprocessing:
    """What a CLIP's image processor does; without one, pictures are squeezed to its size in [-1, 1]."""
    if image_processor is None:
        side, half = model.config.vision_config.image_size, (0.5, 0.5, 0.5)
        return Preprocessing((side, side), None, half, half, "bicubic")
    config = image_processor.to_dict()
    size = config["size"]
    return Preprocessing(
        size.get("shortest_edge") or (size["height"], size["width"]),
        config["crop_size"]["height"] if config["do_center_crop"] else None,
        tuple(config["image_mean"]),
        tuple(config["image_std"]),
        "bicubic" if config["resample"] == _BICUBIC else "bilinear",
    )


def preprocessing(processor: Any) -> Preprocessing:
    """What an image processor does to pictures that are in [0, 1] already.

    Raises:
        ValueError: for a processor that does not resize.
    """
    config = processor.to_dict()
    size = config.get("size") or {}
    side, crop = size.get("shortest_edge"), None
    if not config.get("do_resize") or not (side or {"height", "width"} <= size.keys()):
        raise ValueError(f"processor: {type(processor).__name__} resizes to {size}, expected pixels")
    resized: int | tuple[int, int] = side or (size["height"], size["width"])
    if side and config.get("crop_pct"):
        resized, crop = ((side, side), None) if side >= _SQUEEZED else (int(side / config["crop_pct"]), side)
    elif config.get("do_center_crop"):
        crop = config["crop_size"]["height"]
    normalized = config.get("do_normalize")
    return Preprocessing(
        resized,
        crop,
        tuple(config["image_mean"]) if normalized else (0.0, 0.0, 0.0),
        tuple(config["image_std"]) if normalized else (1.0, 1.0, 1.0),
        "bicubic" if config.get("resample") == _BICUBIC else "bilinear",
    )


def check_images(name: str, images: Tensor) -> None:
    """Pictures are (B, 3, H, W) floating, and on the CPU it is seen that they are in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: got {kind}, expected a floating tensor in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"{name}: got shape {tuple(images.shape)}, expected (B, 3, H, W)")
    if images.device.type == "cpu" and not bool(((images > -0.001) & (images < 1.001)).all()):
        found = "NaN" if bool(images.isnan().any()) else f"{images.min():.3g} to {images.max():.3g}"
        raise ValueError(f"{name}: got {found}, expected values in [0, 1]")
