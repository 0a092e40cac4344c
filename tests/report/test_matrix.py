"""The pages of a matrix and of a mismatch."""

from types import SimpleNamespace

import pytest
import torch

from pumice.evaluate import Mismatch
from pumice.report.matrix import SHOWN, matrix_page, mismatch_page, scatter

NUMBERS = {
    f"{judge}{end}": value
    for judge, values in {
        "identity": (0.9, 0.85, 0.95),
        "quality": (0.8, 0.75, 0.851),
        "score": (0.85, 0.8, 0.9),
        "agreement": (0.31, 0.3, 0.32),
        "recovered": (0.5, 0.25, 0.905),
    }.items()
    for end, value in zip(("", "_low", "_high"), values, strict=True)
} | {
    "psnr_protected": 27.3,
    "psnr_purified": 30.12,
    "seconds_protect": 1.2,
    "seconds_purify": 3.4,
    "seconds_learn": 56.7,
}


def a_matrix(protections=("none", "mist"), purifiers=("none", "jpeg"), recipes=("plain",), **change):
    cells = [(a, b, c) for a in protections for b in purifiers for c in recipes]
    shades = torch.arange(len(cells) * 4, dtype=torch.uint8).view(-1, 1, 1, 2, 2, 1, 1, 1)
    drawn = (shades * 3).expand(-1, 1, 1, 2, 2, 3, 8, 8)
    learned = torch.arange(200, 200 + 4 * len(cells), dtype=torch.uint8).view(-1, 4, 1, 1, 1)
    return SimpleNamespace(
        rows=tuple({"protection": a, "purifier": b, "recipe": c} | NUMBERS | change for a, b, c in cells),
        drawn=dict(zip(cells, drawn, strict=True)),
        pictures={
            ("subject", *key): each.expand(4, 3, 8, 8)
            for key, each in zip(dict.fromkeys(cell[:2] for cell in cells), learned, strict=False)
        },
        settings={"subjects": ["subject"], "seeds": [0, 1, 2]},
    )


def a_mismatch(names=("clean", "mist"), points=((0.0, 0.0), (1.0, 0.5), (0.5, -0.25))):
    row = {"pictures": 3, "share": 0.25, "probability": 0.4, "displacement": 0.1234}
    rows = tuple({"name": name, **row, "probability_low": 0.3, "probability_high": 0.5} for name in names)
    return Mismatch(
        rows,
        {name: torch.full((3,), 0.4) for name in names},
        {name: torch.tensor(points) for name in names},
        {"subject": "a photo of person", "other": "a photo of noise", "clip": "ViT-B/32"},
    )


def page_of(found, **settings):
    return matrix_page(found, **{"model": "a model", "details": {"device": "cpu"}} | settings)


def test_one_row_a_cell(parse):
    page = parse(page_of(a_matrix()))
    assert page.count("tr") == 1 + 4
    numbers = "50 % 25 % to 90.5 % 0.900 0.850 to 0.950 0.800 0.750 to 0.851 0.310 0.300 to 0.320 30.1"
    assert f"mist jpeg plain {numbers} 1 + 3 + 57" in page.text
    assert "1 subject, 3 trainings of each in every cell, on a model" in page.text
    bands = [(rect["x"], rect["width"]) for rect in page.attributes("rect") if rect["class"] == "plain"]
    assert bands == [("25.0", "65.5")] * 4
    assert page.text.endswith("This run devicecpu")


def test_what_was_not_measured_is_not_shown(parse):
    names = [f"{judge}{end}" for judge in ("agreement", "recovered") for end in ("", "_low", "_high")]
    page = parse(page_of(a_matrix(psnr_purified=None, **dict.fromkeys(names))))
    assert "Agreement" not in page.text and page.count("rect") == 0
    assert "mist jpeg plain \N{EN DASH} 0.900" in page.text
    assert "0.851 \N{EN DASH} 1 + 3" in page.text and "mismatch" not in page.text


def test_more_than_all_or_less_than_nothing_stays_on_the_bar(parse):
    page = parse(page_of(a_matrix(recovered=1.2, recovered_low=-0.3, recovered_high=1.9)))
    assert "120 % -30 % to 190 %" in page.text
    assert [rect["width"] for rect in page.attributes("rect") if rect["class"] == "plain"] == ["100.0"] * 4
    assert {line["x1"] for line in page.attributes("line")} == {"100.0"}
    alone = parse(page_of(a_matrix(recovered_low=None, recovered_high=None)))
    assert {rect["width"] for rect in alone.attributes("rect") if rect["class"] == "plain"} == {"0.0"}


def test_pictures_of_what_is_learned_and_drawn(parse):
    page = parse(page_of(a_matrix(recipes=("plain", "both"))))
    images = page.attributes("img")
    assert len(images) == 4 * 3 * SHOWN
    assert images[3 * SHOWN]["alt"] == "none, jpeg: learned"
    assert [image["alt"] for image in images[-2:]] == ["mist, jpeg: both"] * 2
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert len({image["src"] for image in images}) == 12 * SHOWN, "each its own"


def test_the_plot_keeps_its_scale_and_its_frame():
    plot = scatter(a_mismatch())
    first = plot["groups"][0]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point)) for point in first["points"]]
    assert y0 - y1 == pytest.approx((x1 - x0) / 2, abs=0.2), "one scale, up is positive"
    assert all(0 < x < plot["width"] for x in (x0, x1, x2))
    assert all(0 < y < plot["height"] for y in (y0, y1, y2))
    assert plot["groups"][0]["hue"] != plot["groups"][1]["hue"]
    assert tuple(map(float, first["middle"])) == pytest.approx(
        ((x0 + x1 + x2) / 3, (y0 + y1 + y2) / 3), abs=0.1
    )


def test_points_that_are_the_same_are_in_the_middle():
    plot = scatter(a_mismatch(points=((0.5, 0.5),) * 3))
    assert set(plot["groups"][0]["points"]) == {("320.0", "180.0")}


@pytest.mark.parametrize("alone", [True, False])
def test_a_mismatch_is_a_plot_and_a_table(parse, alone):
    found = a_mismatch()
    source = (
        mismatch_page(found, model="ViT-B/32", details={}) if alone else page_of(a_matrix(), mismatch=found)
    )
    page = parse(source)
    assert "clean 3 25 % 0.400 0.300 to 0.500 0.123" in page.text
    assert "Whether ViT-B/32 takes a picture rather for “a photo of person”" in page.text
    assert sum(path.get("class") == "mark-of" for path in page.attributes("path")) == 2 * (3 + 1)


def test_names_are_text(parse, hostile):
    found = a_matrix(protections=hostile[:2], purifiers=hostile[2:3])
    source = page_of(
        found, mismatch=a_mismatch(hostile[3:5]), model=hostile[0], details={hostile[6]: hostile[7]}
    )
    page = parse(source)
    assert page.count("script") == 0 and page.count("svg") == 2 + 1 + 2
    assert hostile[0] in page.visible and all("onload" not in dict(each) for _, each in page.tags)
