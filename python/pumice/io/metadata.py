"""What a picture's file says beside its pixels, made to fit pixels that stand upright."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngImageFile

EXIF_HEADER = b"Exif\0\0"

# What a TIFF file's tags say of the picture; the others say how its pixels lie in that file.
_DESCRIPTIVE = (
    Base.ImageDescription,
    Base.Make,
    Base.Model,
    Base.Software,
    Base.DateTime,
    Base.Artist,
    Base.Copyright,
)

# Where a thumbnail's bytes are, as JPEG or in strips, and how many.
_PLACES = (Base.JpegIFOffset, Base.StripOffsets)
_LENGTHS = (Base.JpegIFByteCount, Base.StripByteCounts)

# sRGB in the words of PNG: white, red, green and blue, x and y each.
_SRGB_GAMMA = 0.45455
_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SRGB_CODE = bytes((1, 13))  # primaries and transfer function, by ITU-T H.273


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts them; 1 if nothing, or nothing that can be read, is said."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # Pillow reads EXIF byte by byte and stumbles in many ways
        return 1


def upright_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """EXIF with its header, orientation 1 and no thumbnail; a file's own bytes otherwise.

    What had to go is said in `notes`.
    """
    try:
        exif = image.info.get("exif") or _from_tags(image)
        if exif is None:
            return None
        while exif.startswith(EXIF_HEADER):
            exif = exif.removeprefix(EXIF_HEADER)
        return EXIF_HEADER + _upright(exif, notes)
    except Exception:
        notes.append("its EXIF cannot be read and is left out")
        return None


def upright_xmp(image: Image.Image, notes: list[str]) -> bytes | None:
    """XMP with orientation 1 and no thumbnails, a file's own bytes otherwise."""
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if not xmp or not isinstance(xmp, bytes):
        return None
    found, thumbnails = re.subn(rb"""(x[am]pGImg:image(?:=["']|>))[^"'<]+""", rb"\g<1>", xmp)
    if thumbnails:
        notes.append("the thumbnail in its XMP is left out")
    return re.sub(rb"""(tiff:Orientation(?:=["']|>))[1-8](?=["'<])""", rb"\g<1>1", found)


def dpi(image: Image.Image) -> tuple[float, float] | None:
    """Pixels an inch, across and down, of the picture as it lies in its file."""
    try:
        across, down = map(float, image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < math.inf and 0 < down < math.inf else None


def other_colours(image: Image.Image) -> list[str]:
    """Chunks of a PNG file, not yet loaded, by which its colours are others than sRGB or a profile's."""
    code = _cicp(image)
    if code is not None:  # counts more than a profile
        return [] if code[:2] == _SRGB_CODE else ["cICP"]
    if image.info.get("icc_profile") or "srgb" in image.info:
        return []
    found = []
    if abs(image.info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) > 1e-3:
        found.append("gAMA")
    said = image.info.get("chromaticity", _SRGB_CHROMATICITY)
    if max(abs(a - b) for a, b in zip(said, _SRGB_CHROMATICITY, strict=True)) > 1e-3:
        found.append("cHRM")
    return found


def _cicp(image: Image.Image) -> bytes | None:
    """A chunk that Pillow passes over."""
    file = image.fp if isinstance(image, PngImageFile) else None
    if file is None:
        return None
    before = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name in (b"cICP", b"IDAT"):
                return file.read(length) if name == b"cICP" else None
            file.seek(length + 4, 1)
        return None
    finally:
        file.seek(before)


def _upright(exif: bytes, notes: list[str]) -> bytes:
    """All is overwritten where it stands: makers' notes point to where things are."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (first,) = struct.unpack_from(f"{order}I", exif, 4)
    found, end = bytearray(exif), first + 2
    for end, tag in _entries(exif, order, first):
        if tag == Base.Orientation:
            struct.pack_into(f"{order}HIHH", found, end - 10, 3, 1, 1, 0)  # one short, 1
    thumbnail = int.from_bytes(exif[end : end + 4], "little" if order == "<" else "big")
    if thumbnail:
        _blank(found, end, 4)
        if thumbnail < len(exif):
            _blank_thumbnail(found, order, thumbnail)
        notes.append("the thumbnail in its EXIF is left out")
    return bytes(found)


def _entries(exif: bytes, order: str, directory: int) -> Iterator[tuple[int, int]]:
    """Where each entry of a directory ends, and its tag."""
    (count,) = struct.unpack_from(f"{order}H", exif, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        yield entry + 12, struct.unpack_from(f"{order}H", exif, entry)[0]


def _blank_thumbnail(exif: bytearray, order: str, directory: int) -> None:
    """It is the picture as it was before, and lies as its pixels lay."""
    whole, said, end = bytes(exif), {}, directory + 2
    for end, tag in _entries(whole, order, directory):
        if tag in (*_PLACES, *_LENGTHS):
            said[tag] = _integers(whole, order, end)
    for places, lengths in zip(_PLACES, _LENGTHS, strict=True):
        for place, length in zip(said.get(places, ()), said.get(lengths, ()), strict=False):
            _blank(exif, place, length)
    _blank(exif, directory, end + 4 - directory)


def _integers(exif: bytes, order: str, end: int) -> tuple[int, ...]:
    """Values of an entry, which lie in it if there is room for them."""
    kind, count = struct.unpack_from(f"{order}HI", exif, end - 10)
    layout = f"{order}{count}{ {3: 'H', 4: 'I'}[kind] }"
    fits = struct.calcsize(layout) <= 4
    return struct.unpack_from(
        layout, exif, end - 4 if fits else struct.unpack_from(f"{order}I", exif, end - 4)[0]
    )


def _blank(content: bytearray, start: int, length: int) -> None:
    stop = min(len(content), start + length)
    content[start:stop] = bytes(max(0, stop - start))


def _from_tags(image: Image.Image) -> bytes | None:
    """EXIF of files that have it in another form: TIFF, and the text of old PNG files."""
    tags, found = image.getexif(), Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in tags:
            found[tag] = tags[tag]
    for place in (IFD.Exif, IFD.GPSInfo):
        directory = {tag: value for tag, value in tags.get_ifd(place).items() if tag != IFD.Interop}
        if directory:  # Interop would be a place in the old file
            found[place] = directory
    return found.tobytes() if found else None
