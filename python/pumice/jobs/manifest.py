"""What is done of a job over many files: a folder's manifest.jsonl, which any kill leaves readable."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pumice
from pumice.io import write_whole

NAME = "manifest.jsonl"


class Manifest:
    """A line of what the job is, then one for each file that is done or failed, of which the last counts.

    The folder becomes the job's when the first results are there (`begin`), so that settings which nothing
    can be done with leave it as it was.

    Args:
        out: the folder, which is there.
        job: everything that results depend on, as JSON.
        restart: throw away what an earlier job has done.

    Attributes:
        path: of the manifest.
        lines: by the name of the source.

    Raises:
        ValueError: if the folder is of another job that has done something, or has other files in it.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, restart: bool) -> None:
        self.path, self._out, self._job, self._begun = out / NAME, out, job, False
        check_free(out)
        found = read(self.path)
        self.lines: dict[str, dict[str, Any]] = {}
        for line in found[1:]:
            if (out / line.get("output", "")).resolve().is_relative_to(out.resolve()):
                self.lines[line["source"]] = line
        difference = _difference(found[0]["job"], job) if found else ""
        self._goes_on = bool(found) and not difference and not restart
        self._old: list[Path] = []
        if not self._goes_on:
            self._old = [out / line["output"] for line in self.lines.values() if line["status"] == "done"]
            self.lines = {}
        if self._old and not restart:
            raise ValueError(
                f"out: {str(out)!r} is of another job: {difference}; choose another folder, or restart"
            )
        if found:
            _clean(out)

    def is_done(self, name: str, source: Path) -> bool:
        """Whether there is a result of the source as it is now."""
        line = self.lines.get(name)
        if line is None or line["status"] != "done" or not (self._out / line["output"]).is_file():
            return False
        return bool(line["sha256"] == digest(source))

    def begin(self) -> None:
        """Make the folder this job's, before there is a result; what another one left is thrown away."""
        if self._begun:
            return
        if self._goes_on:
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut a line
        else:
            for path in self._old:
                path.unlink(missing_ok=True)
            write_whole(self.path, json.dumps({"pumice": pumice.__version__, "job": self._job}) + "\n")
        self._begun = True

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add what became of files, all of them at once."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.lines |= {line["source"]: line for line in lines}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest, the job's first; none if it is not one. What a kill has cut is left out."""
    found: list[dict[str, Any]] = []
    for text in path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not found and not (isinstance(line, dict) and isinstance(line.get("job"), dict)):
            return []
        if not found or (isinstance(line, dict) and {"source", "status"} <= line.keys()):
            found.append(line)
    return found


def check_free(out: Path) -> None:
    """Make sure that a folder is empty or of a job, of whichever.

    Raises:
        ValueError: if it has other files in it; hidden ones do not count.
    """
    if not read(out / NAME) and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"out: {str(out)!r} is not empty and of no job, expected a new or empty folder")


def digest(path: Path) -> str | None:
    """SHA-256 of a file, in hex; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def alone(out: Path, name: str = "out") -> Iterator[None]:
    """Keep other processes from working in a folder, the argument `name`, at the same time."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ValueError(f"{name}: another process is at work in {str(out)!r}") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def _clean(out: Path) -> None:
    """Throw away what a run that was killed was writing, and nothing of others or of another job."""
    for folder, folders, files in os.walk(out):
        folders[:] = [each for each in folders if each[0] != "." and not Path(folder, each, NAME).exists()]
        for file in files:
            if file.startswith(".") and file.endswith(".partial"):
                Path(folder, file).unlink()


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}" for name in names)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
