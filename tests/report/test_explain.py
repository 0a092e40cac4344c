"""The page of explanations."""

import re
from types import SimpleNamespace

from pumice.report.explain import explain_page


def an_explanation(prompt: str, words: list[tuple[str, float]], magnitude: float = 2.0):
    return SimpleNamespace(
        prompt=prompt,
        words=tuple(SimpleNamespace(text=text, score=score) for text, score in words),
        magnitude=magnitude,
    )


def test_words_are_shaded_in_order_and_ranked_with_numbers(parse):
    found = an_explanation("a red fish", [("a", 0.02), ("red", 0.05), ("fish", 0.2)])
    page = parse(explain_page([found, an_explanation("b", [("b", 7.0)])], model="a model", details={}))
    spans = [span for span in page.attributes("span") if span.get("class") == "word"]
    shares = [re.search(r"--share: ([\d.]+)", span["style"])[1] for span in spans]
    assert shares == ["0.100", "0.250", "1.000", "1.000"], "of the strongest word of the same prompt"
    assert [span["title"] for span in spans[:3]] == [
        f"significance {number}" for number in ("0.0200", "0.0500", "0.200")
    ]
    assert "a red fish hardly mattersmatters most (0.200) fish0.200 red0.0500 a0.0200" in page.text
    assert "2 prompts, explained on a model" in page.text and "magnitude 2.000" in page.text


def test_words_of_no_significance(parse):
    page = parse(explain_page([an_explanation("a b", [("a", 0.0), ("b", 0.0)])], model="m", details={}))
    assert page.attributes("i") == [{"style": "--share: 0.000"}] * 2


def test_markup_is_dead_and_nothing_may_run(parse, hostile):
    evil = hostile[0]
    found = [an_explanation(text, [(text, 1.0)]) for text in hostile]
    source = explain_page(found, model=evil, details={evil: evil})
    page = parse(source)
    assert page.count("script") == page.count("img") == page.count("svg") == source.count("<!--") == 0
    assert any("script-src 'none'" in meta.get("content", "") for meta in page.attributes("meta"))
    assert page.visible.count(evil) >= 5
