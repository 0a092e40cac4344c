"""The page of a bench."""

from types import SimpleNamespace

import torch

from pumice.report.bench import bench_page

MEASURED = {
    "replication": 0.25,
    "replication_low": 0.125,
    "replication_high": 0.5,
    "similarity_mean": 0.71,
    "similarity_p95": 0.93,
    "agreement": 0.312,
    "quality": 0.97,
    "red_team": 1.0,
    "red_team_low": 0.75,
    "red_team_high": 1.0,
    "seconds": 12.34,
}


def a_bench(a_picture, rows, prompts=("a red fish", "a blue fish")):
    near = torch.tensor([[0.2, 0.9], [0.3, 0.1]]).repeat(len(prompts), 1)[: len(prompts)]
    files = {row["name"]: tuple(a_picture("red") for _ in prompts) for row in rows}
    return SimpleNamespace(
        rows=tuple(rows),
        prompts=tuple(prompts),
        similarities=dict.fromkeys(files, near),
        red_team_similarities=dict.fromkeys(files, near / 2 + 0.2),
        reference_pictures=tuple(a_picture("blue", (640, 640)) for _ in prompts),
        pictures=files,
        red_team_pictures=files,
        settings={"red_team_steps": 50, "replayed": 0.5},
    )


def test_one_row_a_mitigation_and_a_dash_for_what_is_missing(a_picture, parse):
    unknown = {"name": "guard"} | dict.fromkeys(MEASURED)
    source = bench_page(
        a_bench(a_picture, [{"name": "none"} | MEASURED, unknown]), model="a model", details={"device": "cpu"}
    )
    page = parse(source)
    assert page.count("tr") == 3
    measured = "none 25 % 12.5 % to 50 % 0.710 95 % below 0.930 0.312 0.970 100 % 75 % to 100 % 12.3 "
    assert measured + "guard" + 6 * " \N{EN DASH}" in page.text
    assert page.text.endswith("This run red team steps50 replayed0.5 devicecpu")
    bands = [(rect["x"], rect["width"]) for rect in page.attributes("rect") if rect["class"] == "plain"]
    assert bands == [("12.5", "37.5"), ("75.0", "25.0")], "nothing is drawn of what is missing"
    assert [line["x1"] for line in page.attributes("line")] == ["25.0", "100.0"]


def test_pictures_of_a_prompt_side_by_side(a_picture, parse):
    rows = [{"name": name} | MEASURED for name in ("none", "guard")]
    source = bench_page(a_bench(a_picture, rows), model="a model", details={})
    page = parse(source)
    images = page.attributes("img")
    assert [image["alt"] for image in images] == [
        "training picture",
        "drawn by none",
        "drawn by guard",
        "drawn by red team against none",
        "drawn by red team against guard",
    ] * 2
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert images[0]["src"] != images[1]["src"]
    first, second = page.text.split("a red fish ")[1].split(" a blue fish ")
    assert first.startswith(
        "training picture none0.90, a copy guard0.90, a copy by the red team none0.65, a copy"
    )
    assert second.startswith("training picture none0.30 guard0.30 by the red team none0.35 guard0.35")
    assert [figure.get("class") for figure in page.attributes("figure")] == [None, *["copy"] * 4, *[None] * 5]


def test_a_bench_that_kept_no_pictures(a_picture, parse):
    bench = a_bench(a_picture, [{"name": "none"} | MEASURED])
    for name in ("pictures", "red_team_pictures"):
        setattr(bench, name, {})
    bench.reference_pictures = ()
    page = parse(bench_page(bench, model="m", details={}))
    assert page.count("tr") == 2 and page.count("img") == 0 and "Pictures" not in page.text


def test_markup_is_dead_and_nothing_may_run(a_picture, parse, hostile):
    evil = hostile[0]
    bench = a_bench(a_picture, [{"name": evil} | MEASURED], prompts=hostile)
    source = bench_page(bench, model=evil, details={evil: evil})
    page = parse(source)
    assert page.count("script") == source.count("<!--") == 0 and page.count("img") == 3 * len(hostile)
    assert any("script-src 'none'" in meta.get("content", "") for meta in page.attributes("meta"))
    assert page.visible.count(evil) >= 5
