"""The report page: everything in it, nothing outside it, nothing of a prompt's markup alive."""

import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from pumice.jobs import Scan
from pumice.memorization import Detection
from pumice.report import scan_page

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes" \'too\' {{ 7 * 7 }}'


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def a_scan(scores, threshold=None, pictures=None, prompts=None) -> Scan:
    prompts = prompts or [f"prompt {i}" for i in range(len(scores))]
    magnitudes = torch.tensor(scores).reshape(-1, 1, 1).repeat(1, 2, 1)
    detection = Detection(
        tuple(prompts),
        torch.tensor(scores),
        magnitudes,
        (0, 1),
        (981,),
        ("",) * (len(scores) - 1) + ("the rest",),
    )
    order = tuple(torch.argsort(detection.scores, descending=True).tolist())
    return Scan(detection, threshold, "given", order, pictures or {})


def page_of(scan: Scan, **texts) -> Page:
    return Page(
        scan_page(scan, **({"model": "a model", "prompts": "list.txt", "details": {"seeds": 2}} | texts))
    )


def test_rows_are_ranked_and_judged():
    page = page_of(a_scan([1.0, 3.0, 2.0], threshold=1.5))
    assert page.count("tr") == 4
    text = " ".join(page.text.split())
    assert text.index("prompt 1") < text.index("prompt 2") < text.index("prompt 0")
    assert "2 of 3 are called memorized: their score is above 1.500 (given)" in text
    assert "not read, too long: the rest" in text


def test_without_a_threshold_there_is_no_verdict():
    text = " ".join(page_of(a_scan([1.0, 3.0])).text.split())
    assert "No verdicts" in text and "called memorized" not in text


def test_markup_in_texts_is_dead():
    page = page_of(a_scan([1.0, 2.0], prompts=[EVIL, "a"]), model=EVIL, prompts=EVIL, details={EVIL: EVIL})
    assert page.count("script") == 0 and page.count("img") == 0
    assert page.text.count(EVIL) >= 4, "shown as it was typed"


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    Image.new("RGB", (640, 320), "red").save(tmp_path / "a.png")
    page = page_of(a_scan([1.0, 2.0], pictures={1: tmp_path / "a.png"}))
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert not [
        tag for tag, attributes in page.tags if tag in ("link", "script", "iframe") or "href" in attributes
    ]


@pytest.mark.parametrize(
    "scores", [[0.0], [1e-9, 1e-9], [5.0, 5.0], [0.1, 1000.0], [float(i) for i in range(50)]]
)
def test_the_histogram_holds_every_prompt_inside_its_frame(scores):
    page = page_of(a_scan(scores, threshold=0.5))
    titles = re.findall(r": (\d+) prompts", page.text)
    assert sum(map(int, titles)) == len(scores)
    for tag, attributes in page.tags:
        if tag == "rect":
            x, y, width, height = (float(attributes[key]) for key in ("x", "y", "width", "height"))
            assert 40 <= x and x + width <= 941 and 19.9 <= y and y + height <= 215.1
