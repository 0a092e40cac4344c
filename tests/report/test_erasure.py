"""The page of an erasure."""

from types import SimpleNamespace

import torch

from pumice.evaluate import attacks
from pumice.report import erasure_page
from pumice.report.erasure import ATTACKS, SHOWN, Failed, shown, successes

RATES = {
    f"{kind}_{k}{end}": value
    for k in (1, 5)
    for kind, values in (("esr", (75.0, 50.0, 90.5)), ("psr", (100.0, 62.5, 100.0)))
    for end, value in zip(("", "_low", "_high"), values, strict=True)
} | {"loss_1": 0.0, "loss_5": 12.34}
OTHERS = {"agreement_preserved": 0.312, "distance_preserved": 0.0456, "fid": 7.89}


def an_erasure(names=("none", "uce"), erased=1, preserved=1, seeds=2, rows=None, labels=None):
    """Pictures are of one brightness each, different everywhere."""
    count = erased + preserved
    levels = torch.arange(len(names) * count, dtype=torch.uint8) * 5
    pictures = levels.view(len(names), count, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    return SimpleNamespace(
        erased=tuple((f"a Ball {i}", "Ball") for i in range(erased)),
        preserved=tuple((f"a fish {i}", "fish") for i in range(preserved)),
        rows=tuple({"name": name} | (rows or RATES | OTHERS) for name in names),
        labels=labels or dict.fromkeys(names, (("box", "star"),) * count * seeds),
        pictures=dict(zip(names, pictures, strict=True)),
        settings={"seeds": list(range(seeds)), "k": [1, 5]},
    )


def an_attack(label="Ball", attack="concept_inversion", edit="uce"):
    curves = {"none": [(0, 10.0), (50, 100.0)], edit: [(0, 0.0), (50, 12.5 if label == "Ball" else 37.5)]}
    rows = [(name, *(f"{success:.1f}" for _, success in curve)) for name, curve in curves.items()]
    table = [("edit", "0 steps", "50 steps"), *rows]
    return SimpleNamespace(label=label, attack=attack, curve=curves.__getitem__, table=lambda: table)


def page_of(found, **settings):
    return erasure_page(found, **{"model": "a model", "details": {"device": "cpu"}} | settings)


def test_pictures_come_first_and_then_one_row_an_edit(parse):
    unknown = dict.fromkeys(RATES | OTHERS)
    found = an_erasure()
    found.rows = ({"name": "none"} | RATES | OTHERS, {"name": "uce"} | unknown)
    source = page_of({"ball": found})
    page = parse(source)
    assert source.index("<img") < source.index("<table")
    assert page.count("tr") == 3
    rates = "75 % 50 % to 90.5 % 100 % 62.5 % to 100 % "
    assert f"none {rates}0.0 {rates}12.3 0.312 0.046 7.9 uce" + 9 * " \N{EN DASH}" in page.text
    assert page.text.endswith("This run devicecpu")
    bands = [(rect["x"], rect["width"]) for rect in page.attributes("rect") if rect["class"] == "plain"]
    assert bands == [("50.0", "40.5"), ("62.5", "37.5")] * 2, "nothing is drawn of what is missing"
    assert [line["x1"] for line in page.attributes("line")] == ["75.0", "100.0"] * 2


def test_what_was_not_measured_has_no_column(parse):
    plain = RATES | dict.fromkeys(OTHERS)
    page = parse(page_of({"ball": an_erasure(rows=plain)}))
    assert "FID" not in page.text and "Agreement" not in page.text
    assert "FID" in parse(page_of({"ball": an_erasure()})).text


def test_pictures_before_and_after_and_what_is_wrong_with_them(parse):
    labels = {
        "none": (("ball",), ("ball",), ("fish",), ("fish",)),  # two seeds
        "good": (("box",), ("ball",), ("fish",), ("box",)),  # the first counts here
        "bad": (("ball",), ("box",), ("moon",), ("fish",)),
    }
    found = an_erasure(names=("none", "good", "bad"), labels=labels)
    page = parse(page_of({"ball": found}))
    images = page.attributes("img")
    assert [image["alt"] for image in images] == ["drawn by none", "drawn by good", "drawn by bad"] * 2
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert len({image["src"] for image in images}) == 6, "each its own"
    assert [figure.get("class") for figure in page.attributes("figure")] == [None, None, "copy"] * 2
    assert "To be gone a Ball 0 beforeball goodbox badball, still there To stay a fish 0" in page.text
    assert "beforefish goodfish badmoon, lost" in page.text


def test_the_model_as_it_is_is_never_called_wrong(parse):
    page = parse(page_of({"ball": an_erasure(names=("none",), labels={"none": (("ball",), ("box",)) * 2})}))
    assert not any(figure.get("class") for figure in page.attributes("figure"))


def test_a_few_prompts_of_each_kind_are_shown(parse):
    found = an_erasure(erased=SHOWN + 3, preserved=SHOWN + 1)
    assert shown(found) == [*range(SHOWN), *range(SHOWN + 3, 2 * SHOWN + 3)]
    page = parse(page_of({"ball": found, "star": an_erasure(erased=0)}))
    assert page.count("img") == 2 * 2 * SHOWN + 2
    assert f"{SHOWN + 3} erased and {SHOWN + 1} preserved prompts" in page.text
    assert "2 concepts, in pictures of a model" in page.text


def test_every_attack_has_a_column_and_a_table_by_label(parse):
    made = [an_attack(), an_attack("box"), an_attack(attack="p4d")]
    page = parse(page_of({"ball": an_erasure()}, attacks={"ball": made}))
    assert "FIDconcept-inversionp4d none" in page.text
    assert "7.9 100 % 100 % uce" in page.text and "7.9 25 % 12.5 %" in page.text, "means over labels"
    table = " Edit0 steps50 steps none 10 %100 % uce 0 %"
    assert f"concept-inversion: a word learned for Ball{table}12.5 %" in page.text
    assert f"concept-inversion: a word learned for box{table}37.5 %" in page.text
    assert f"p4d: prompts found in place of those of Ball{table}12.5 %" in page.text
    assert "Attack" not in parse(page_of({"ball": an_erasure()})).text


def test_a_failed_attack_says_why_and_has_no_figure(parse):
    made = [an_attack(), Failed("p4d", "Ball", "out of <memory>"), Failed("concept_inversion", "box", "no")]
    assert successes(made, "uce") == {"concept-inversion": 12.5, "p4d": None}, "a mean over the others"
    source = page_of({"ball": an_erasure()}, attacks={"ball": made})
    text = parse(source).text
    assert "p4d: prompts found in place of those of Ball Failed: out of <memory>" in text
    assert "7.9 100 % \N{EN DASH} uce" in text and "out of <memory>" not in source


def test_every_attack_has_a_name():
    functions = {name for name in attacks.__all__ if name.islower()}
    assert {name.replace("-", "_") for name in ATTACKS} == functions


def test_markup_is_dead_and_nothing_may_run(parse, hostile):
    evil = hostile[0]
    found = an_erasure(names=("none", evil), labels=dict.fromkeys(("none", evil), ((evil,),) * 4))
    found.erased = ((evil, evil),)
    source = page_of(
        {evil: found}, attacks={evil: [an_attack(evil, edit=evil)]}, model=evil, details={evil: evil}
    )
    page = parse(source)
    assert page.count("script") == source.count("<!--") == 0 and page.count("img") == 4
    assert any("script-src 'none'" in meta.get("content", "") for meta in page.attributes("meta"))
    assert page.visible.count(evil) >= 8
    assert not any("http" in str(value) for _, attributes in page.tags for value in attributes.values())
