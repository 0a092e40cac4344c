"""Scans to make pages of, and a reader of pages that runs nothing."""

from collections.abc import Callable
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

EVIL = (
    '<script>pwned = true; alert("x")</script><img src=x onerror="pwned = 1"> & "quotes" \'too\' {{ 7 * 7 }}'
)
HOSTILE = [
    EVIL,
    "</script><script>pwned = true</script><!-- <script> -->",
    "]]></td></tr></table><svg onload='pwned = true'>",
    "\u05d0\u05d1\u05d2 right to left \u202e and turned round",
    "emoji \U0001f30b\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "one line\nand another\r\n\tand a tab\u2028and a separator",
    "javascript:pwned=true",
    "\u0000 null",
]


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.visible = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.visible += data

    @property
    def text(self) -> str:
        return " ".join(self.visible.split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def parse() -> type[Page]:
    return Page


@pytest.fixture
def hostile() -> list[str]:
    return HOSTILE


@pytest.fixture
def a_picture(tmp_path) -> Callable:
    def draw(name: str, size: tuple[int, int] = (64, 64)):
        Image.new("RGB", size, name).save(tmp_path / f"{name}.png")
        return tmp_path / f"{name}.png"

    return draw


def a_detail(words=None, curve=None, curve_timesteps=None, picture=None, guarded=None):
    return SimpleNamespace(
        words=words, curve=curve, curve_timesteps=curve_timesteps, picture=picture, guarded=guarded
    )


@pytest.fixture(name="a_detail")
def _a_detail() -> Callable:
    return a_detail


@pytest.fixture
def a_scan() -> Callable:
    def scan(scores, *, threshold=None, details=None, prompts=None, metric="magnitude", seed_scores=None):
        scores = torch.tensor(scores)
        detection = SimpleNamespace(
            prompts=tuple(prompts or (f"prompt {i}" for i in range(len(scores)))),
            metric=metric,
            scores=scores,
            seed_scores=torch.stack([scores - 0.25, scores + 0.25], 1)
            if seed_scores is None
            else seed_scores,
            seeds=(3, 8),
            truncated=("",) * (len(scores) - 1) + ("the rest",),
        )
        return SimpleNamespace(
            detection=detection,
            threshold=threshold,
            threshold_source="given",
            order=tuple(torch.argsort(scores, descending=True, stable=True).tolist()),
            details=details or {},
            memorized=tuple(None if threshold is None else s > threshold for s in scores.tolist()),
        )

    return scan
