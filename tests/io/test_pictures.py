"""Pictures come in as they are meant to be seen, and go out with nothing lost."""

import errno
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from pumice.io import Picture, read_image, save_lossless, within_budget

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6" dc:rights="mine, \xc3\xa9"/></x:xmpmeta>'


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def exif(orientation, maker=b"\x01\x02 a note of the maker's \xff"):
    """EXIF that Pillow would write in another order: the sub-directory before the first one."""
    found = struct.pack(">2sHI", b"MM", 42, 38 + len(maker))
    found += (
        struct.pack(">HHHII", 1, 0x927C, 7, len(maker), 26) + struct.pack(">I", 0) + maker + b"name\0\0\0\0"
    )
    found += b"\0" * (38 + len(maker) - len(found))
    found += struct.pack(">H", 3)
    found += struct.pack(">HHI4s", Base.Make, 2, 4, b"abc\0")
    found += struct.pack(">HHIHH", Base.Orientation, 3, 1, orientation, 0)
    found += struct.pack(">HHII", IFD.Exif, 4, 1, 8)
    return b"Exif\0\0" + found + struct.pack(">I", 0)


def profile(space, tag, content):
    """A minimal ICC profile of a printer (CMYK) or a monitor (GRAY), to Lab or XYZ."""
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I", 2)
    table += struct.pack(">4sII", tag, 156, len(content)) + struct.pack(
        ">4sII", b"wtpt", 156 + len(content), 20
    )
    size = 156 + len(content) + 20
    header = struct.pack(">I4sI4s4s4s", size, b"\0" * 4, 0x02400000, kind, space, connection)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + content + white


def cmyk_profile():
    """Ink without black is a grey of L = 50 where there is any cyan, black is black, no ink is white."""
    corners = [(0 if k else 128 if c else 255, 128, 128) for c in (0, 1) for _ in range(4) for k in (0, 1)]
    ramp = bytes(range(256))
    lut = (
        b"mft1"
        + b"\0" * 4
        + bytes((4, 3, 2, 0))
        + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    )
    return profile(b"CMYK", b"A2B0", lut + ramp * 4 + bytes(sum(corners, ())) + ramp * 3)


LINEAR_GREY = profile(b"GRAY", b"kTRC", b"curv\0\0\0\0" + struct.pack(">I", 0))


def test_reads_what_was_saved(tmp_path):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.shape == (3, 5, 7) and found.dtype == torch.float32
    assert torch.equal((found * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (7, 5))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.shape == (3, 7, 5) and found[0, 0, 4] == 1 and found.sum() == 1


def test_grey_and_size(tmp_path):
    Image.new("L", (8, 4), 51).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", size=(2, 6))
    assert found.shape == (3, 2, 6)
    torch.testing.assert_close(found, torch.full((3, 2, 6), 0.2))


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_picture(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"pictures: '.*a.png' cannot be read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_upright(tmp_path, orientation, suffix):
    """Four flat quarters, turned as a camera would have stored them, stand as they were."""
    quarters = np.array([[10, 90], [170, 250]], np.uint8).repeat(16, 0).repeat(24, 1)
    upright = Image.fromarray(np.stack([quarters] * 3, 2))
    back = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Image.Transpose: what undoes the orientation
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    tags = Image.Exif()
    tags[Base.Orientation] = orientation
    tags[Base.Artist] = "somebody"
    stored.save(tmp_path / f"a{suffix}", exif=tags, **({"lossless": True} if suffix == ".webp" else {}))
    found = Picture.open(tmp_path / f"a{suffix}")
    reference = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert found.pixels.shape == reference.shape
    assert int((found.pixels.int() - reference.int()).abs().max()) <= 2 * (suffix == ".jpg")
    again = Image.Exif()
    again.load(found.exif)
    assert again.get(Base.Orientation, 1) == 1 and again[Base.Artist] == "somebody"


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_metadata_comes_through_byte_by_byte(tmp_path, suffix):
    original = Image.fromarray(noise(40, 56, 3))
    original.save(tmp_path / "a.jpg", exif=exif(6), icc_profile=SRGB, dpi=(300, 150), xmp=XMP, quality=95)
    picture = Picture.open(tmp_path / "a.jpg")
    assert picture.pixels.shape == (3, 56, 40) and picture.notes == ()
    save_lossless(picture.with_pixels(picture.pixels), tmp_path / f"b{suffix}")
    with Image.open(tmp_path / f"b{suffix}") as found:
        found.load()
    assert found.info["icc_profile"] == SRGB
    assert found.info["exif"].removeprefix(b"Exif\0\0") == exif(1).removeprefix(b"Exif\0\0")
    assert found.getexif()[Base.Make] == "abc" and found.getexif()[Base.Orientation] == 1
    assert b"the maker's" in found.getexif().get_ifd(IFD.Exif)[0x927C]
    assert found.info["xmp"] == XMP.replace(b'"6"', b'"1"')
    if suffix == ".png":
        assert np.allclose(found.info["dpi"], (150, 300), atol=0.02)
    again = Picture.open(tmp_path / f"b{suffix}")
    assert torch.equal(again.pixels, picture.pixels)
    assert (again.icc, again.exif, again.xmp) == (picture.icc, picture.exif, picture.xmp)


def test_tags_of_tiff_without_those_of_its_layout(tmp_path):
    tags = Image.Exif()
    tags[Base.Artist] = "somebody"
    tags[IFD.Exif] = {Base.LensModel: "glass"}
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / "a.tiff", exif=tags.tobytes())
    found = Image.Exif()
    found.load(Picture.open(tmp_path / "a.tiff").exif)
    assert found[Base.Artist] == "somebody" and found.get_ifd(IFD.Exif)[Base.LensModel] == "glass"
    assert Base.StripOffsets not in found and Base.Compression not in found


def with_thumbnail(order, thumbnail, strips=False):
    """EXIF with a second directory, which points to a picture."""
    second = 8 + 2 + 2 * 12 + 4  # where it begins
    place, length = (
        (Base.StripOffsets, Base.StripByteCounts) if strips else (Base.JpegIFOffset, Base.JpegIFByteCount)
    )
    values = (place, second + 2 + 4 * 12 + 4), (length, len(thumbnail))
    found = struct.pack(f"{order}2sHI", {"<": b"II", ">": b"MM"}[order], 42, 8)
    found += struct.pack(f"{order}H", 2)
    found += struct.pack(f"{order}HHIHH", Base.Orientation, 3, 1, 6, 0)
    found += struct.pack(f"{order}HHI4s", Base.Make, 2, 4, b"abc\0")
    found += struct.pack(f"{order}I", second)
    entries = [
        struct.pack(f"{order}HHIHH", Base.Orientation, 3, 1, 6, 0),
        struct.pack(f"{order}HHIHH", Base.Compression, 3, 1, 6, 0),
        *(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values),
    ]
    found += struct.pack(f"{order}H", 4) + b"".join(entries) + struct.pack(f"{order}I", 0)
    return b"Exif\0\0" + found + thumbnail + b"after"


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_thumbnails_go(tmp_path, order, strips):
    """They are the picture as it was, unprotected, and lie as its pixels lay."""
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / "thumb.jpg")
    thumbnail = (tmp_path / "thumb.jpg").read_bytes()
    said = with_thumbnail(order, thumbnail, strips)
    Image.fromarray(noise(40, 56, 3)).save(tmp_path / "a.jpg", exif=said)
    found = Picture.open(tmp_path / "a.jpg")
    assert found.notes == ("the thumbnail in its EXIF is left out",)
    assert thumbnail in said and thumbnail[20:60] not in found.exif and len(found.exif) == len(said)
    assert found.exif.endswith(b"\0after") and not any(found.exif[6 + 34 : -5]), "all of it, and no more"
    again = Image.Exif()
    again.load(found.exif)
    assert dict(again) == {Base.Orientation: 1, Base.Make: "abc"} and not again.get_ifd(IFD.IFD1)
    save_lossless(found.with_pixels(found.pixels), tmp_path / "b.png")
    assert Picture.open(tmp_path / "b.png").notes == (), "nothing is left to go"


def test_a_thumbnail_that_is_not_there(tmp_path):
    whole = with_thumbnail("<", b"x" * 50)
    for exif_, kept in ((whole[: 6 + 38], True), (whole[: 6 + 60], False)):
        Image.fromarray(noise(8, 9, 3)).save(tmp_path / "a.jpg", exif=exif_)
        found = Picture.open(tmp_path / "a.jpg")
        assert (found.exif is not None) == kept and len(found.notes) == 1


@pytest.mark.parametrize(("start", "end"), [(b">", b"</"), (b'="', b'"')])
def test_thumbnails_of_xmp_go(tmp_path, start, end):
    head, tail = b'<d tiff:Orientation="6"/><xmpGImg:image' + start, end + b" dc:rights='mine'"
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / "a.jpg", xmp=head + b"/9j/4AAQ&#xA;SkZJRg==" + tail)
    found = Picture.open(tmp_path / "a.jpg")
    assert found.xmp == head.replace(b"6", b"1") + tail
    assert found.notes == ("the thumbnail in its XMP is left out",)


def chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


GAMMA, SRGB_GAMMA = (chunk(b"gAMA", struct.pack(">I", value)) for value in (100000, 45455))
WIDE, NARROW = (
    chunk(b"cHRM", struct.pack(">8I", 31270, 32900, *primaries, 15000, 6000))
    for primaries in ((68000, 32000, 26500, 69000), (64000, 33000, 30000, 60000))
)
HDR, SDR = (chunk(b"cICP", bytes(code)) for code in ((9, 16, 0, 1), (1, 13, 0, 1)))


@pytest.mark.parametrize(
    ("chunks", "icc", "lost"),
    [
        (b"", None, ""),
        (GAMMA, None, "gAMA"),
        (WIDE, None, "cHRM"),
        (GAMMA + WIDE, None, "gAMA and cHRM"),
        (SRGB_GAMMA + NARROW, None, ""),
        (chunk(b"sRGB", b"\0") + GAMMA, None, ""),
        (GAMMA, SRGB, ""),
        (HDR, SRGB, "cICP"),
        (SDR + GAMMA, None, ""),
    ],
)
def test_colours_of_png_without_a_profile(tmp_path, chunks, icc, lost):
    path = tmp_path / "a.png"
    Image.fromarray(noise(4, 5, 3)).save(path, icc_profile=icc)
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunks + content[33:])  # after the header
    found = Picture.open(path)
    assert found.notes == ((f"its {lost} left out, its colours are taken for sRGB",) if lost else ())
    assert found.icc == icc and torch.equal(found.pixels.permute(1, 2, 0), torch.from_numpy(noise(4, 5, 3)))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_profile_of_any_size(tmp_path, suffix):
    icc = SRGB + noise(1_500_000).tobytes()
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / "a.jpg", icc_profile=icc)
    picture, limit = Picture.open(tmp_path / "a.jpg"), PngImagePlugin.MAX_TEXT_CHUNK
    save_lossless(picture.with_pixels(picture.pixels), tmp_path / f"b{suffix}")
    again = Picture.open(tmp_path / f"b{suffix}")
    assert again.icc == picture.icc == icc and torch.equal(again.pixels, picture.pixels)
    assert read_image(tmp_path / f"b{suffix}").shape == (3, 8, 9)
    assert PngImagePlugin.MAX_TEXT_CHUNK == limit


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_left_out_and_said(tmp_path):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.jpg", exif=exif(6)[:50])
    found = Picture.open(tmp_path / "a.jpg")
    assert found.exif is None and found.notes == ("its EXIF cannot be read and is left out",)
    assert found.pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_colours_under_alpha_are_kept(tmp_path, suffix):
    pixels = noise(20, 30, 4)
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = Picture.open(tmp_path / "a.png")
    assert torch.equal(torch.cat([picture.pixels, picture.alpha]).permute(1, 2, 0), torch.from_numpy(pixels))
    save_lossless(picture.with_pixels(255 - picture.pixels), tmp_path / f"b{suffix}")
    again = np.array(Image.open(tmp_path / f"b{suffix}"))
    assert np.array_equal(again[..., :3], 255 - pixels[..., :3]) and np.array_equal(
        again[..., 3], pixels[..., 3]
    )


def test_opaque_alpha_stays_in_png(tmp_path):
    image = Image.fromarray(noise(4, 4, 3)).convert("RGBA")
    for name in ("a.png", "a.webp"):  # WebP has no alpha channel for it, but nothing is lost
        save_lossless(image, tmp_path / name)
        assert Image.open(tmp_path / name).convert("RGBA").tobytes() == image.tobytes()
    assert Image.open(tmp_path / "a.png").mode == "RGBA"


def test_modes(tmp_path):
    grey, alpha = noise(6, 5), noise(6, 5, seed=1)
    for image, transparent in (
        (Image.fromarray(grey), False),
        (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), True),
    ):
        image.save(tmp_path / "a.png")
        found = Picture.open(tmp_path / "a.png")
        assert torch.equal(found.pixels, torch.from_numpy(grey).expand(3, -1, -1))
        assert (found.alpha is not None) == transparent
        assert not transparent or torch.equal(found.alpha[0], torch.from_numpy(alpha))
        assert found.notes == (f"{image.mode} read as RGB",)
    Image.fromarray(grey > 127).save(tmp_path / "a.png")
    assert Picture.open(tmp_path / "a.png").pixels.unique().tolist() == [0, 255]


def test_palettes(tmp_path):
    indices = noise(6, 5) % 3
    image = Image.fromarray(indices).convert("P")
    colours = np.array([[1, 2, 3], [40, 50, 60], [200, 100, 0]], np.uint8)
    image.putpalette(colours.flatten().tolist())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "index.png", transparency=1)
    image.save(tmp_path / "table.png", transparency=bytes([255, 7, 0]))
    for name, opacity in (("plain", None), ("index", [255, 0, 255]), ("table", [255, 7, 0])):
        found = Picture.open(tmp_path / f"{name}.png")
        assert torch.equal(found.pixels.permute(1, 2, 0), torch.from_numpy(colours[indices]))
        if opacity is None:
            assert found.alpha is None
        else:
            assert np.array_equal(found.alpha[0], np.array(opacity)[indices])


def test_a_transparent_colour(tmp_path):
    pixels = noise(6, 5, 3) // 128
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(0, 1, 0))
    found = Picture.open(tmp_path / "a.png")
    assert torch.equal(found.alpha[0] == 0, torch.from_numpy((pixels == (0, 1, 0)).all(2)))


def test_cmyk_by_its_profile(tmp_path):
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, 8:16, 0] = 255
    inks[:, 16:, 3] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tiff", icc_profile=cmyk_profile())
    found = Picture.open(tmp_path / "a.tiff")
    assert found.icc is None and "sRGB by the picture's profile" in found.notes[1]
    white, cyan, black = found.pixels[:, 4, [4, 12, 20]].T.int()
    assert white.min() >= 254 and black.max() <= 1
    assert (cyan - 119).abs().max() <= 2  # L = 50.2 is the grey 119.4 of sRGB


def test_cmyk_without_a_profile(tmp_path):
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.tiff")
    found = Picture.open(tmp_path / "a.tiff")
    assert found.pixels[:, 0, 0].tolist() == [0, 255, 255]
    assert found.notes == ("CMYK read as RGB", "CMYK without a profile, its colours are a guess")


@pytest.mark.parametrize("icc", [SRGB, b"no profile"])
def test_cmyk_with_a_profile_of_something_else(tmp_path, icc):
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.tiff", icc_profile=icc)
    found = Picture.open(tmp_path / "a.tiff")
    assert found.pixels[:, 0, 0].tolist() == [0, 255, 255] and found.icc is None
    assert "cannot be used for CMYK" in found.notes[1]


def test_profiled_grey(tmp_path):
    Image.new("L", (4, 4), 128).save(tmp_path / "a.png", icc_profile=LINEAR_GREY)
    found = Picture.open(tmp_path / "a.png")
    light = 128 / 255
    assert (
        found.icc is None and (found.pixels - 255 * (1.055 * light ** (1 / 2.4) - 0.055)).abs().max() <= 1.5
    )
    Image.new("L", (4, 4), 128).save(tmp_path / "a.png", icc_profile=SRGB)  # as many programs do
    found = Picture.open(tmp_path / "a.png")
    assert found.icc == SRGB and bool((found.pixels == 128).all())


def test_16_bits(tmp_path):
    Image.fromarray(noise(4, 4).astype(np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"^images: '.*grey.png' cannot be read: its mode is I;16"):
        Picture.open(tmp_path / "grey.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="its mode is F"):
        Picture.open(tmp_path / "float.tiff")
    (tmp_path / "rgb.png").write_bytes(rgb16(4, 3))
    found = Picture.open(tmp_path / "rgb.png")
    assert found.notes == ("16 bits a channel read as 8",) and found.pixels.shape == (3, 3, 4)


def rgb16(width, height):
    """A PNG file of 16 bits a channel, which Pillow does not write."""
    rows = b"".join(b"\0" + noise(width * 6, seed=row).tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff"])
def test_several_frames_are_refused(tmp_path, suffix):
    first, *others = (Image.fromarray(noise(8, 8, 3, seed=seed)) for seed in range(3))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=others)
    with pytest.raises(
        ValueError, match=rf"^images: '.*a{suffix}' cannot be read: it has 3 frames"
    ) as caught:
        Picture.open(tmp_path / f"a{suffix}")
    assert "\n" not in str(caught.value)
    first.save(tmp_path / f"b{suffix}")
    assert Picture.open(tmp_path / f"b{suffix}").pixels.shape == (3, 8, 8)


def test_the_first_of_a_phones_pictures(tmp_path):
    first, gain = Image.fromarray(noise(16, 16, 3)), Image.fromarray(noise(8, 8, 3))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[gain])
    found = Picture.open(tmp_path / "a.jpg")
    assert found.pixels.shape == (3, 16, 16) and found.notes == ("the first of 2 pictures in the file",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp", ".jp2", ".avif"])
def test_broken_files_give_one_line(tmp_path, suffix):
    """Cut or flipped anywhere: a picture, or one line that names the file; never anything else."""
    path = tmp_path / f"a{suffix}"
    try:
        Image.fromarray(noise(40, 40, 3)).save(path, exif=exif(6))
    except (OSError, KeyError, ValueError):
        pytest.skip("this Pillow does not write it")
    whole, flip = path.read_bytes(), random.Random(0)
    refused = []
    for trial in range(60):
        content = bytearray(whole)
        if trial % 2:
            for _ in range(8):
                content[flip.randrange(min(len(content), 400))] = flip.randrange(256)
        else:
            del content[flip.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            Picture.open(path)
        except ValueError as error:
            refused.append(str(error))
    start = f"images: {str(path)!r} cannot be read: "
    assert all(each.startswith(start) and len(each) > len(start) and "\n" not in each for each in refused)
    assert len(refused) >= 10


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40000)
    with pytest.raises(ValueError, match=r"images: .*cannot be read: .*decompression bomb"):
        Picture.open(tmp_path / "a.png")


def test_what_is_neither_picture_nor_path(tmp_path):
    with pytest.raises(TypeError, match="target: got a int, expected a PIL image or a path"):
        Picture.open(3, "target")
    with pytest.raises(ValueError, match=r"images: .* cannot be read"):
        Picture.open(tmp_path)


def test_pil_images_stay_as_they_are(tmp_path):
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "a.jpg", exif=exif(6), xmp=XMP)
    with Image.open(tmp_path / "a.jpg") as image:
        before = dict(image.info)
        found = Picture.open(image)
        assert found.pixels.shape == (3, 7, 5) and image.size == (7, 5) and image.info == before
        assert torch.equal(found.pixels, Picture.open(tmp_path / "a.jpg").pixels)
    plain = Picture.open(Image.new("P", (3, 2)))
    assert (plain.icc, plain.exif, plain.xmp, plain.dpi, plain.alpha) == (None,) * 5


def test_old_png_text_holds_exif(tmp_path):
    tags = Image.Exif()
    tags[Base.Orientation], tags[Base.Artist] = 8, "somebody"
    data = tags.tobytes()
    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n")
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / "a.png", pnginfo=text)
    found = Picture.open(tmp_path / "a.png")
    again = Image.Exif()
    again.load(found.exif)
    assert found.pixels.shape == (3, 7, 5) and dict(again) == {Base.Artist: "somebody"}


@pytest.mark.parametrize("dpi", [(0, 72), (float("nan"), 1), 72])
def test_a_density_that_makes_no_sense_is_none(dpi, tmp_path):
    image = Image.new("RGB", (2, 2))
    image.info["dpi"] = dpi
    assert Picture.open(image).dpi is None
    save_lossless(image, tmp_path / "a.png")


def test_other_pixels_must_fit():
    picture = Picture.open(Image.new("RGB", (5, 4)))
    with pytest.raises(
        ValueError, match=r"pixels: got torch.uint8 of shape \(3, 5, 4\), expected .* \(3, 4, 5\)"
    ):
        picture.with_pixels(torch.zeros(3, 5, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixels: got torch.float32"):
        picture.with_pixels(torch.zeros(3, 4, 5))


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        (
            Image.new("RGB", (2, 2)),
            "a.jpg",
            r"path: got '.*a.jpg', expected a name that ends in .png or .webp",
        ),
        (Image.new("L", (2, 2)), "a.png", "image: got mode L, expected RGB or RGBA"),
        (Image.new("RGB", (16384, 1)), "a.webp", "path: WebP has no room for 16384 x 1 pixels"),
    ],
)
def test_what_cannot_be_saved(tmp_path, image, name, message):
    with pytest.raises(ValueError, match=message):
        save_lossless(image, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_is_lost_is_an_error(tmp_path, monkeypatch):
    image = Image.fromarray(noise(8, 8, 3))
    real = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, file, kind, **more: real(self, file, "JPEG"))
    image.info["exif"] = exif(1)
    with pytest.raises(ValueError, match=r"path: '.*a.png' would lose pixels and exif"):
        save_lossless(image, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_lossless(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_lossless(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize(
    ("eps", "levels"), [(4 / 255, 4), (0.025, 6), (8 / 255, 8), (0.003, 0), (1, 255), (0, 0)]
)
def test_the_budget_holds_in_8_bits(tmp_path, suffix, eps, levels):
    original = torch.from_numpy(noise(3, 40, 50))
    change = eps * torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sign()
    perturbed = (original / 255 + change).clamp(0, 1)
    picture = Picture.open(Image.fromarray(original.permute(1, 2, 0).numpy()))
    save_lossless(picture.with_pixels(within_budget(perturbed, original, eps)), tmp_path / f"a{suffix}")
    found = Picture.open(tmp_path / f"a{suffix}").pixels
    assert int((found.int() - original.int()).abs().max()) == levels
    assert bool(((found.float() - 255 * perturbed).abs() <= 0.5 + 255 * eps - levels + 1e-3).all())


def test_the_budget_of_values_next_to_the_range():
    original = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    low, high = (
        within_budget(torch.zeros(4), original, 2 / 255),
        within_budget(torch.ones(4), original, 2 / 255),
    )
    assert low.tolist() == [0, 0, 252, 253] and high.tolist() == [2, 3, 255, 255]


def test_without_a_budget_pixels_are_rounded():
    original = torch.tensor([0, 100], dtype=torch.uint8)
    assert within_budget(torch.tensor([0.9, 100.4 / 255]), original, None).tolist() == [230, 100]
    with pytest.raises(ValueError, match="perturbed: got NaN"):
        within_budget(torch.tensor([0.9, float("nan")]), original, None)
