"""What a picture's file says beside its pixels, made to fit pixels that stand upright."""

from __future__ import annotations

import math
import re
import struct

from PIL import Image
from PIL.ExifTags import IFD, Base

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


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts them; 1 if nothing, or nothing that can be read, is said."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # Pillow reads EXIF byte by byte and stumbles in many ways
        return 1


def upright_exif(image: Image.Image) -> bytes | None:
    """EXIF with its header and orientation 1; a file's own bytes otherwise.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        exif = image.info.get("exif") or _from_tags(image)
        if exif is None:
            return None
        while exif.startswith(EXIF_HEADER):
            exif = exif.removeprefix(EXIF_HEADER)
        return EXIF_HEADER + _turned_upright(exif)
    except Exception as error:
        raise ValueError("its EXIF cannot be read") from error


def upright_xmp(image: Image.Image) -> bytes | None:
    """XMP with orientation 1, a file's own bytes otherwise."""
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if not xmp or not isinstance(xmp, bytes):
        return None
    return re.sub(rb"""(tiff:Orientation(?:=["']|>))[1-8](?=["'<])""", rb"\g<1>1", xmp)


def dpi(image: Image.Image) -> tuple[float, float] | None:
    """Pixels an inch, across and down, of the picture as it lies in its file."""
    try:
        across, down = map(float, image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < math.inf and 0 < down < math.inf else None


def _turned_upright(exif: bytes) -> bytes:
    """The orientation is overwritten where it stands: makers' notes point to where things are."""
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (first,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, first)
    found = bytearray(exif)
    for entry in range(first + 2, first + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from(f"{order}H", exif, entry)
        if tag == Base.Orientation:
            struct.pack_into(f"{order}HIHH", found, entry + 2, 3, 1, 1, 0)  # one short, 1
    return bytes(found)


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
