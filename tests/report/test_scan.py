"""The scan's page as it is sent: everything in it, nothing outside it, nothing of a prompt's markup alive."""

import base64
import hashlib
import json
import math
import re

import pytest
import torch

from pumice.report.scan import MEANINGS, PAGE, scan_page

TEXTS = {"model": "a model", "prompts": "list.txt", "details": {"seeds": 2}}


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_rows_are_ranked_and_judged(a_scan, parse):
    page = parse(scan_page(a_scan([1.0, 3.0, 2.0], threshold=1.5), **TEXTS))
    assert page.count("tr") == 4
    assert page.text.index("prompt 1") < page.text.index("prompt 2") < page.text.index("prompt 0")
    assert "2 of 3 are called memorized: their score is above 1.500 (given)" in page.text
    assert "not read, too long: the rest" in page.text
    ids = [row["id"] for row in page.attributes("tr") if "id" in row]
    assert ids == ["prompt-2", "prompt-3", "prompt-1"], "places in the list, counted from one"


def test_without_a_threshold_there_is_no_verdict(a_scan, parse):
    page = parse(scan_page(a_scan([1.0, 3.0]), **TEXTS))
    assert "No verdicts" in page.text and "called memorized" not in page.text
    assert page.count("select") == 0, "nothing to filter by"


@pytest.mark.parametrize("metric", MEANINGS)
def test_says_what_the_score_means(metric, a_scan, parse):
    scan = a_scan([1.0, 3.0], threshold=2.0, metric=metric)
    page = scan_page(scan, **TEXTS)
    assert MEANINGS[metric] in parse(page).text
    assert data_of(page)["threshold"] == (2.0 if metric == "magnitude" else None), (
        "the curve is of magnitudes"
    )


def test_seeds_that_were_not_needed(a_scan, parse):
    scores = torch.tensor([[1.0, math.nan], [3.0, 3.5]])
    page = scan_page(a_scan([1.0, 3.25], seed_scores=scores), **TEXTS)
    assert "averaged over at most 2 seeds" in parse(page).text
    assert [known["seedScores"] for known in data_of(page)["prompts"]] == [[3.0, 3.5], [1.0, None]]


def test_markup_in_texts_is_dead(a_scan, a_detail, parse, hostile):
    details = {i: a_detail(words=((text, 1.0),)) for i, text in enumerate(hostile)}
    scan = a_scan([float(i) for i in range(len(hostile))], prompts=hostile, details=details)
    evil = hostile[0]
    source = scan_page(scan, model=evil, prompts=evil, details={evil: evil})
    page = parse(source)
    assert page.count("img") == 0
    assert page.count("script") == source.count("<script") == source.count("</script") == 2, "data and ours"
    assert source.count("<!--") == 0
    assert page.visible.count(evil) >= 4, "shown as it was typed"
    words = [known["words"][0][0] for known in data_of(source)["prompts"]]
    assert words == [scan.detection.prompts[index] for index in scan.order], "what was told apart is whole"


def test_only_our_script_may_run(a_scan, parse):
    source = scan_page(a_scan([1.0]), **TEXTS)
    (policy,) = [meta["content"] for meta in parse(source).attributes("meta") if "http-equiv" in meta]
    script = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "script-src 'unsafe-inline'" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script[0])


def test_nothing_is_loaded_from_elsewhere(a_scan, a_detail, a_picture, parse):
    detail = a_detail(picture=a_picture("red", (640, 320)), guarded=a_picture("green"))
    source = scan_page(a_scan([1.0, 2.0], details={1: detail}), **TEXTS)
    page = parse(source)
    (image,) = page.attributes("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert data_of(source)["prompts"][0]["guarded"].startswith("data:image/png;base64,")
    assert not [
        tag
        for tag, attributes in page.tags
        if tag in ("link", "iframe") or {"href", "action"} & attributes.keys()
    ]
    assert not [script for script in page.attributes("script") if "src" in script]


def test_what_is_not_known_is_left_out(a_scan, a_detail):
    details = {1: a_detail(), 0: a_detail(curve=(2.0, math.inf, 1 / 3), curve_timesteps=(981, 961, 941))}
    with_all, with_none = data_of(scan_page(a_scan([3.0, 2.0], details=details), **TEXTS))["prompts"]
    assert with_all == {
        "seedScores": [2.75, 3.25],
        "curve": [2.0, None, 0.33333],
        "timesteps": [981, 961, 941],
    }
    assert with_none.keys() == {"seedScores"}


def test_a_long_list_is_in_the_table_whole(a_scan, parse):
    page = parse(scan_page(a_scan([float(i) for i in range(PAGE + 50)]), **TEXTS))
    assert page.count("tbody") == 2 and page.count("tr") == PAGE + 51


@pytest.mark.parametrize(
    "scores",
    [
        [0.0],
        [1e-9, 1e-9],
        [5.0, 5.0],
        [0.1, 1000.0],
        [-3.0, -0.5],
        [-2.0, 9.0],
        [3.1, 3.2],
        [float(i) for i in range(50)],
    ],
)
def test_the_histogram_holds_every_prompt_inside_its_frame(scores, a_scan, parse):
    page = parse(scan_page(a_scan(scores, threshold=0.5), **TEXTS))
    titles = re.findall(r": (\d+) prompts", page.text)
    assert sum(map(int, titles)) == len(scores)
    (mark,) = [line for line in page.attributes("line") if line["class"] == "mark"]
    assert 40 <= float(mark["x1"]) <= 940
    for tag, attributes in page.tags:
        if tag == "rect":
            x, y, width, height = (float(attributes[key]) for key in ("x", "y", "width", "height"))
            assert 40 <= x and x + width <= 941 and 19.9 <= y and y + height <= 215.1
