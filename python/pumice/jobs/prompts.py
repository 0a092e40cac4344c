"""Prompt lists: text, CSV or JSONL, with or without pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

_Rows = Iterator[tuple[int, dict[str, object]]]


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """The prompts of a file, in order.

    `.txt` has one prompt a line, empty lines do not count; `.csv` a header with a column `prompt`; `.jsonl`
    on each line an object with a `prompt`, or just a string. All are UTF-8.

    Raises:
        ValueError: naming file and line, for anything that is not so, and for a file without prompts.
    """
    path = Path(path)
    prompts = []
    for number, fields in _rows(path, ("prompt",)):
        prompt = fields["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts: {path.name}, line {number}: has no prompt")
        prompts.append(prompt.strip())
    if not prompts:
        raise ValueError(f"prompts: {str(path)!r} has no prompts")
    return prompts


def read_pairs(path: str | PathLike[str]) -> dict[str, list[Path]]:
    """Prompts with the pictures that they are known to replay, in order; a prompt may have several lines.

    `.csv` has columns `prompt` and `picture`, `.jsonl` on each line an object with both; a picture is a file,
    relative to the list.

    Raises:
        ValueError: naming file and line, for anything that is not so, a picture that is not there among them.
    """
    path = Path(path)
    pairs: dict[str, list[Path]] = {}
    for number, prompt, name in _with(path, "picture"):
        picture = path.parent / name
        if not picture.is_file():
            raise ValueError(f"pictures: {path.name}, line {number}: {str(picture)!r} is not there")
        pairs.setdefault(prompt, []).append(picture)
    return pairs


def read_labels(path: str | PathLike[str]) -> list[tuple[str, str]]:
    """Prompts with the label of what their pictures show, in order.

    `.csv` has columns `prompt` and `label`, `.jsonl` on each line an object with both.

    Raises:
        ValueError: naming file and line, for anything that is not so.
    """
    return [(prompt, label) for _, prompt, label in _with(Path(path), "label")]


def _with(path: Path, field: str) -> list[tuple[int, str, str]]:
    """Line numbers, prompts and what else each has to have."""
    if path.suffix == ".txt":
        raise ValueError(
            f"prompts: {str(path)!r} has no {field}s; a .csv or .jsonl with prompt and {field} has"
        )
    found = []
    for number, fields in _rows(path, ("prompt", field)):
        for name, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"prompts: {path.name}, line {number}: has no {name}")
        found.append((number, str(fields["prompt"]).strip(), str(fields[field]).strip()))
    if not found:
        raise ValueError(f"prompts: {str(path)!r} has no prompts")
    return found


def _rows(path: Path, fields: tuple[str, ...]) -> _Rows:
    """Line numbers, and what stands there by field."""
    if path.suffix not in _READERS:
        raise ValueError(f"prompts: {str(path)!r} is not a {', '.join(_READERS)} file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"prompts: cannot read {str(path)!r}: {error.strerror}") from error
    lines = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {path.name}, line {number}: not UTF-8") from error
        if "\0" in lines[-1]:
            raise ValueError(f"prompts: {path.name}, line {number}: has a NUL character")
    return _READERS[path.suffix](lines, path.name, fields)


def _text(lines: list[str], name: str, fields: tuple[str, ...]) -> _Rows:
    return ((number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip())


def _csv(lines: list[str], name: str, fields: tuple[str, ...]) -> _Rows:
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        for field in fields:
            if header.count(field) != 1:
                raise ValueError(
                    f"prompts: {name}, line 1: the header needs one column {field!r}, got {header}"
                )
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"prompts: {name}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}"
                )
            yield rows.line_num, {field: row[header.index(field)] for field in fields}
    except csv.Error as error:
        raise ValueError(f"prompts: {name}, line {rows.line_num}: {error}") from error


def _jsonl(lines: list[str], name: str, fields: tuple[str, ...]) -> _Rows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {name}, line {number}: not JSON: {error.msg}") from error
        if not isinstance(value, dict):
            value = {"prompt": value}
        yield number, {field: value.get(field) for field in fields}


_READERS: dict[str, Callable[[list[str], str, tuple[str, ...]], _Rows]] = {
    ".txt": _text,
    ".csv": _csv,
    ".jsonl": _jsonl,
}
