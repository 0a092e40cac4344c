"""Pictures before and after, side by side on one sheet."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from pumice.evaluate.preprocess import check_images

_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_INK = (34, 34, 34)


def contact_sheet(
    rows: Sequence[Sequence[Tensor]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    picture_px: int = 128,
) -> Image.Image:
    """Lay pictures out in a table: a row for each concept or prompt, a column for each model.

    Args:
        rows: R of C pictures (3, H, W), floating in [0, 1] or uint8, of any size.
        columns: C titles, such as the names of edits.
        labels: R texts to the left, such as prompts. What does not fit is cut with an ellipsis.
        picture_px: side of the square that each picture is fitted into, px. Default 128.

    Returns:
        An RGB picture on white.

    Raises:
        TypeError: if a picture is no tensor of floats or bytes, or a text no string.
        ValueError: if there are no pictures, rows of different lengths, as many texts as do not fit, or
            pictures of another shape or range.
    """
    _check(rows, columns, labels, picture_px)
    text_px, gap = max(11, round(picture_px / 9)), max(4, round(picture_px / 16))
    font = ImageFont.load_default(size=text_px)
    line, margin, label_px = round(1.35 * text_px), 2 * gap, round(1.5 * picture_px)
    left, top, pitch = margin + label_px + margin, margin + line + gap, picture_px + gap
    size = (left + len(columns) * pitch - gap + margin, top + len(rows) * pitch - gap + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        middle = left + column * pitch + picture_px // 2
        pen.text((middle, top - gap), _cut(title, font, picture_px), _INK, font, anchor="md")
    for row, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        lines = _wrapped(label, font, label_px, max(1, picture_px // line))
        y = top + row * pitch + (picture_px - len(lines) * line) // 2
        for place, text in enumerate(lines):
            pen.text((margin, y + place * line), text, _INK, font)
        for column, picture in enumerate(pictures):
            image = ImageOps.contain(_to_pil(picture), (picture_px, picture_px), Image.Resampling.LANCZOS)
            x = left + column * pitch + (picture_px - image.width) // 2
            sheet.paste(image, (x, top + row * pitch + (picture_px - image.height) // 2))
    return sheet


def _wrapped(text: str, font: Any, width: int, most: int) -> list[str]:
    """Lines of words that fit, the last one cut if there are more."""
    words, lines = text.split(), list[str]()
    while words:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        if len(lines) + 1 == most:
            count = len(words)
        lines.append(_cut(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines


def _cut(text: str, font: Any, width: int) -> str:
    """As much of a text as fits, and an ellipsis if that is not all."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + _ELLIPSIS) > width:
        text = text[:-1].rstrip()
    return text + _ELLIPSIS


def _to_pil(picture: Tensor) -> Image.Image:
    if picture.dtype != torch.uint8:
        picture = (picture.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())


def _check(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], labels: Sequence[str], picture_px: int
) -> None:
    if operator.index(picture_px) < 16:
        raise ValueError(f"picture_px: got {picture_px}, expected at least 16")
    if not len(rows) or not len(columns):
        raise ValueError(f"rows, columns: got {len(rows)} and {len(columns)}, expected at least one of each")
    for name, texts in (("columns", columns), ("labels", labels)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name}: expected a list of strings")
    if len(labels) != len(rows):
        raise ValueError(f"labels: got {len(labels)}, expected {len(rows)}, one a row")
    for pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(
                f"rows: got {len(pictures)} pictures in one, expected {len(columns)}, as columns"
            )
        for picture in pictures:
            if not isinstance(picture, Tensor):
                raise TypeError(f"rows: got a {type(picture).__name__}, expected tensors (3, H, W)")
            if picture.ndim != 3:
                raise ValueError(f"rows: got a picture {tuple(picture.shape)}, expected (3, H, W)")
            if picture.dtype != torch.uint8:
                check_images("rows", picture[None])
            elif picture.shape[0] != 3 or not picture.numel():
                raise ValueError(f"rows: got a picture {tuple(picture.shape)}, expected (3, H, W)")
