"""Prompt lists: text, CSV or JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """The prompts of a file, in order.

    `.txt` has one prompt a line, empty lines do not count; `.csv` a header with a column `prompt`; `.jsonl`
    on each line an object with a `prompt`, or just a string. All are UTF-8.

    Raises:
        ValueError: naming file and line, for anything that is not so, and for a file without prompts.
    """
    path = Path(path)
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
    prompts = []
    for number, prompt in _READERS[path.suffix](lines, path.name):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts: {path.name}, line {number}: has no prompt")
        prompts.append(prompt.strip())
    if not prompts:
        raise ValueError(f"prompts: {str(path)!r} has no prompts")
    return prompts


def _text(lines: list[str], name: str) -> Iterator[tuple[int, object]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _csv(lines: list[str], name: str) -> Iterator[tuple[int, object]]:
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if header.count("prompt") != 1:
            raise ValueError(f"prompts: {name}, line 1: the header needs one column 'prompt', got {header}")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"prompts: {name}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}"
                )
            yield rows.line_num, row[header.index("prompt")]
    except csv.Error as error:
        raise ValueError(f"prompts: {name}, line {rows.line_num}: {error}") from error


def _jsonl(lines: list[str], name: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {name}, line {number}: not JSON: {error.msg}") from error
        yield number, value.get("prompt") if isinstance(value, dict) else value


_READERS: dict[str, Callable[[list[str], str], Iterator[tuple[int, object]]]] = {
    ".txt": _text,
    ".csv": _csv,
    ".jsonl": _jsonl,
}
