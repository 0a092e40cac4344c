"""Pictures in files: as they are meant to be seen, with what is said of them, and back without loss."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import write_whole
from .metadata import EXIF_HEADER, dpi, orientation, other_colours, upright_exif, upright_xmp

# What stands upright after it, by EXIF's orientation.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_GREY = ("1", "L", "LA")
_LARGEST_WEBP = 16383  # pixels a side
_LARGEST_PROFILE = 64 * 2**20  # bytes
_LIMIT = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as it is meant to be seen, and what its file says of it.

    Attributes:
        pixels: (3, H, W) uint8 RGB, upright. In the colours of `icc`; transparent ones are what the file has.
        alpha: (1, H, W) uint8, if there is transparency.
        icc: the profile of the colours; none means sRGB.
        exif: with its header, orientation 1 and no thumbnail, the file's own bytes otherwise.
        xmp: with orientation 1 and no thumbnails, the file's own bytes otherwise.
        dpi: pixels an inch, across and down.
        notes: what is not as it was in the file, a sentence each.
    """

    pixels: Tensor
    alpha: Tensor | None
    icc: bytes | None
    exif: bytes | None
    xmp: bytes | None
    dpi: tuple[float, float] | None
    notes: tuple[str, ...]

    @classmethod
    def open(cls, source: str | PathLike[str] | Image.Image, name: str = "images") -> Picture:
        """Read a file, or take a PIL image, which stays as it is.

        Grey, palettes and YCbCr become RGB; CMYK and profiled grey become sRGB by their profile, which then
        goes. Of 16-bit RGB Pillow reads 8. Of several pictures for one look (MPO, gain maps) the first is
        taken. Text of PNG files, IPTC and comments are not kept, nor are thumbnails, which show the picture
        as it was.

        Args:
            source: of any format that Pillow reads.
            name: of the argument that errors speak of.

        Raises:
            TypeError: for anything else.
            ValueError: for a file that cannot be read, is cut short or larger than Pillow takes for sane, for
                several frames, and for pixels that RGB of 8 bits cannot stand for: 16-bit or floating grey,
                Lab.
        """
        if isinstance(source, Image.Image):
            with _reading(name, getattr(source, "filename", "") or f"the PIL image of mode {source.mode}"):
                return cls._of(source)
        if not isinstance(source, str | PathLike):
            raise TypeError(f"{name}: got a {type(source).__name__}, expected a PIL image or a path")
        with _reading(name, source), _opened(source) as image:
            return cls._of(image)

    @classmethod
    def _of(cls, image: Image.Image) -> Picture:
        frames, notes = getattr(image, "n_frames", 1), []
        if frames > 1 and image.format != "MPO":
            raise ValueError(f"it has {frames} frames, expected one")
        if frames > 1:
            notes.append(f"the first of {frames} pictures in the file")
        if image.mode not in _MODES:
            raise ValueError(f"its mode is {image.mode}, expected grey, RGB or CMYK of 8 bits")
        if ";16" in str(getattr(image, "tile", "")):
            notes.append("16 bits a channel read as 8")
        colours = other_colours(image)
        if colours:
            notes.append(f"its {' and '.join(colours)} left out, its colours are taken for sRGB")
        image.load()
        if image.mode not in ("RGB", "RGBA"):
            notes.append(f"{image.mode} read as RGB")
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        plain = image.convert("RGBA") if image.mode == "P" else image  # to RGB at once, Pillow warns
        rgb, icc = _rgb(plain, image.info.get("icc_profile") or None, notes)
        turn = orientation(image)
        density = dpi(image)
        return cls(
            pixels=_tensor(rgb, turn),
            alpha=None if alpha is None else _tensor(alpha, turn),
            icc=icc,
            exif=upright_exif(image, notes),
            xmp=upright_xmp(image, notes),
            dpi=density[::-1] if density and turn in (5, 6, 7, 8) else density,
            notes=tuple(notes),
        )

    def with_pixels(self, pixels: Tensor) -> Image.Image:
        """A PIL image of other pixels, RGB or RGBA, with this one's alpha, and metadata in `info`.

        Pillow itself writes only some of `info`; `save_lossless` writes all.

        Raises:
            ValueError: unless pixels are uint8, shaped as this picture's.
        """
        if pixels.dtype != torch.uint8 or pixels.shape != self.pixels.shape:
            raise ValueError(
                f"pixels: got {pixels.dtype} of shape {tuple(pixels.shape)}, "
                f"expected torch.uint8 of shape {tuple(self.pixels.shape)}"
            )
        channels = [pixels.cpu()] if self.alpha is None else [pixels.cpu(), self.alpha]
        image = Image.fromarray(torch.cat(channels).permute(1, 2, 0).contiguous().numpy())
        said = {"icc_profile": self.icc, "exif": self.exif, "xmp": self.xmp, "dpi": self.dpi}
        image.info = {key: value for key, value in said.items() if value is not None}
        return image


def open_pictures(images: Any, name: str = "images") -> list[Picture]:
    """A PIL image, a path, or a list of them.

    Raises:
        TypeError, ValueError: as `Picture.open`, and for an empty list.
    """
    if isinstance(images, str | PathLike | Image.Image):
        return [Picture.open(images, name)]
    if not isinstance(images, list | tuple):
        raise TypeError(
            f"{name}: got a {type(images).__name__}, expected a tensor (B, 3, H, W), PIL images or paths"
        )
    if not images:
        raise ValueError(f"{name}: got an empty list, expected at least one picture")
    return [Picture.open(each, f"{name}[{number}]") for number, each in enumerate(images)]


def save_lossless(image: Image.Image, path: str | PathLike[str]) -> None:
    """Write a picture and its metadata, every byte of both as it is; the file is whole or not there.

    What was encoded is decoded again and compared before it is written. Colours of transparent pixels are
    kept. WebP has no place for `dpi`. Pillow itself opens PNG files with a profile of more than 1 MB only
    with a larger `PngImagePlugin.MAX_TEXT_CHUNK`.

    Args:
        image: RGB or RGBA; `icc_profile`, `exif`, `xmp` and `dpi` are taken from its `info`.
        path: ends in .png, or in .webp for lossless WebP. A file that is there is replaced.

    Raises:
        ValueError: for another mode or suffix, a side that WebP has no room for (16383), and anything that
            the format loses.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".webp"):
        raise ValueError(f"path: got {str(path)!r}, expected a name that ends in .png or .webp")
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"image: got mode {image.mode}, expected RGB or RGBA")
    if suffix == ".webp" and max(image.size) > _LARGEST_WEBP:
        raise ValueError(
            f"path: WebP has no room for {image.width} x {image.height} pixels, expected a name in .png"
        )
    content = _png(image) if suffix == ".png" else _webp(image)
    lost = _lost(image, content)
    if lost:
        raise ValueError(f"path: {str(path)!r} would lose {' and '.join(lost)}")
    write_whole(path, content)


def within_budget(perturbed: Tensor, original: Tensor, eps: float | None) -> Tensor:
    """Perturbed pictures in 8 bits that still obey the budget.

    ::

        x8 = clamp(round(255 x), x0 - r, x0 + r), 0 to 255        r = floor(255 eps)

    Args:
        perturbed: x, floating, in [0, 1].
        original: x0, uint8, shaped as x.
        eps: the largest change of a value, in the unit of x; None for no such bound.

    Returns:
        uint8, on the device of x0.

    Raises:
        ValueError: for a NaN.
    """
    if bool(perturbed.isnan().any()):
        raise ValueError("perturbed: got NaN, expected values in [0, 1]")
    levels = (perturbed.to(original.device) * 255).round().clamp(0, 255).short()
    if eps is not None:
        radius = math.floor(255 * eps + 1e-4)  # 8/255 is 8 levels, whatever its last bit
        levels = levels.clamp(original.short() - radius, original.short() + radius)
    return levels.to(torch.uint8)


def read_image(path: str | PathLike[str], size: tuple[int, int] | None = None) -> Tensor:
    """A picture as it is meant to be seen, (3, H, W) float32 RGB in [0, 1].

    Args:
        path: of any format that Pillow reads, the first frame of several; its EXIF orientation is applied.
        size: (H, W) to resize to, by Lanczos.

    Raises:
        ValueError: if the file cannot be read as a picture.
    """
    with _reading("pictures", path), _opened(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    if size is not None:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return _tensor(picture).float() / 255


@contextmanager
def _opened(source: str | PathLike[str] | io.BytesIO) -> Iterator[Image.Image]:
    """A file with a colour profile of any sane size; in PNG files Pillow stops at 1 MB."""
    with _LIMIT:
        usual, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, _LARGEST_PROFILE
        try:
            image = Image.open(source)
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = usual
    with image:
        yield image


@contextmanager
def _reading(name: str, source: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes Pillow's decoders stumble in any way
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ValueError(f"{name}: {str(source)!r} cannot be read: {reason}") from error


def _rgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """The picture in RGB, and the profile of its colours; what was done about a profile goes to `notes`."""
    grey = image.mode in _GREY
    if icc is None and image.mode == "CMYK":
        notes.append("CMYK without a profile, its colours are a guess")
    if icc is None or not (grey or image.mode == "CMYK"):
        return image.convert("RGB"), icc
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if grey and profile.profile.xcolor_space == "RGB ":
            return image.convert("RGB"), icc
        srgb = ImageCms.createProfile("sRGB")
        plain = image.convert("L") if grey else image
        found = cast(Image.Image, ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError, ImportError):  # ImportError: a Pillow without LittleCMS
        notes.append(f"its profile cannot be used for {image.mode} and is left out, its colours are a guess")
        return image.convert("RGB"), None
    notes.append("colours converted to sRGB by the picture's profile")
    return found, None


def _tensor(image: Image.Image, turn: int = 1) -> Tensor:
    """(channels, H, W) uint8, turned upright."""
    if turn in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[turn])
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).contiguous()


def _png(image: Image.Image) -> bytes:
    more = PngInfo()
    if "xmp" in image.info:
        more.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + image.info["xmp"])
    options = {key: image.info[key] for key in ("icc_profile", "exif") if key in image.info}
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=more, dpi=dpi(image), **options)
    return buffer.getvalue()


def _webp(image: Image.Image) -> bytes:
    options = {key: image.info[key] for key in ("icc_profile", "exif", "xmp") if key in image.info}
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, exact=True, **options)
    return buffer.getvalue()


def _lost(image: Image.Image, content: bytes) -> list[str]:
    """What cannot be read back."""
    with _opened(io.BytesIO(content)) as found:
        found.load()
    lost = [] if found.convert(image.mode).tobytes() == image.tobytes() else ["pixels"]
    for key in ("icc_profile", "exif", "xmp"):
        before, after = (each.info.get(key) or b"" for each in (image, found))
        if before.removeprefix(EXIF_HEADER) != after.removeprefix(EXIF_HEADER):
            lost.append(key)
    return lost
