"""The pages in a browser: what a reader does with them, and what a prompt cannot do to the reader."""

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from pumice.report.bench import bench_page
from pumice.report.explain import explain_page
from pumice.report.scan import scan_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

TEXTS = {"model": "a model", "prompts": "list.txt", "details": {"seeds": 2}}
PROMPTS = ["a red fish", "Banana boat", "a Zebra", "the long one"]
WORDS = (("a", 0.02), ("red", 0.05), ("fish", 0.2))
CURVE = (3.0, 1.0, 0.5, 2.0)

WATCH = (
    "violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective))"
)
CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const luminance = (...layers) => {
        for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    };
    const texts = "p, td, th, h3, label, .word, .number, figcaption, dt, dd";
    return [...document.querySelectorAll(texts)].map((element) => {
        const behind = [];
        for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
        const page = luminance(...behind), ink = luminance(getComputedStyle(element).color);
        return (Math.max(page, ink) + 0.05) / (Math.min(page, ink) + 0.05);
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path) -> Iterator[Callable]:
    """Open a page. In the end it has asked for nothing, said nothing, and tried nothing that it may not."""
    visits, seen = [], []

    def open_page(source: str, *, at: str = "", **options):
        file = tmp_path / "page.html"
        file.write_text(source, "utf-8")
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | options)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url.startswith(("data:", "file:")) or seen.append(request.url)
        )
        page.add_init_script(WATCH)
        page.goto(file.as_uri() + at)
        visits.append(page)
        return page

    open_page.seen = seen
    yield open_page
    for page in visits:
        if page.evaluate("typeof violations !== 'undefined'"):
            assert page.evaluate("violations") == [] and page.evaluate("typeof pwned") == "undefined"
        page.context.close()
    assert seen == []


@pytest.fixture
def scanned(a_scan, a_detail, a_picture):
    detail = a_detail(WORDS, CURVE, (981, 661, 341, 21), a_picture("red"), a_picture("green"))
    return a_scan([2.5, 1.0, 0.5, 3.0], threshold=1.5, prompts=PROMPTS, details={0: detail})


def prompts_of(page) -> list[str]:
    return page.locator(".prompts .text").all_inner_texts()


def test_sorting(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    by_score = ["the long one", "a red fish", "Banana boat", "a Zebra"]
    assert prompts_of(page) == by_score
    page.click("th >> text=Prompt")
    assert prompts_of(page) == ["a red fish", "a Zebra", "Banana boat", "the long one"]
    assert page.locator("th[aria-sort]").evaluate_all("all => all.map(e => [e.innerText, e.ariaSort])") == [
        ["Prompt", "ascending"]
    ]
    page.click("th >> text=Prompt")
    assert prompts_of(page) == ["the long one", "Banana boat", "a Zebra", "a red fish"]
    page.click("th >> text=Score")
    assert prompts_of(page) == by_score, "the highest first"
    page.click("th >> text=Score")
    assert prompts_of(page) == by_score[::-1]
    page.click("th >> text=#")
    assert prompts_of(page) == by_score


def test_filtering(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    count = page.locator("output")
    assert count.inner_text() == "4 of 4 prompts"
    page.get_by_label("Search").fill("A ")
    assert prompts_of(page) == ["a red fish", "Banana boat", "a Zebra"], "whatever the case"
    page.get_by_label("Verdict").select_option("fresh")
    assert prompts_of(page) == ["Banana boat", "a Zebra"]
    assert count.inner_text() == "2 of 4 prompts, 2 hidden"
    page.get_by_label("Search").fill("")
    page.get_by_label("Verdict").select_option("memorized")
    assert prompts_of(page) == ["the long one", "a red fish"]
    page.get_by_label("Search").fill(".*")
    assert prompts_of(page) == [] and count.inner_text() == "0 of 4 prompts, 4 hidden"
    page.get_by_label("Search").press("Enter")
    assert count.inner_text() == "0 of 4 prompts, 4 hidden", "the page stays"


def test_the_detail_of_a_prompt(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    page.click("text=a red fish")
    detail = page.locator(".detail")
    assert detail.count() == 1 and page.url.endswith("#prompt-1")

    words = detail.locator(".word")
    assert words.all_inner_texts() == ["a", "red", "fish"]
    shades = words.evaluate_all("all => all.map(e => Number(e.style.getPropertyValue('--share')))")
    assert shades == [pytest.approx(0.1), pytest.approx(0.25), 1.0]
    assert len(set(words.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))) == 3
    assert len(set(words.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundSize)"))) == 3
    assert words.evaluate_all("all => all.map(e => e.title)") == [
        f"significance {number}" for number in ("0.0200", "0.0500", "0.200")
    ]
    ranking = detail.locator(".words-part li").all_inner_texts()
    assert [line.split() for line in ranking] == [["fish", "0.200"], ["red", "0.0500"], ["a", "0.0200"]]
    assert "matters most (0.200)" in detail.locator(".legend").inner_text()

    assert detail.locator("circle title").all_text_contents() == [
        "t = 981: 3.00", "t = 661: 1.00", "t = 341: 0.500", "t = 21: 2.00",
    ]  # fmt: skip
    points = detail.locator("circle").evaluate_all(
        "all => all.map(e => [e.cx, e.cy].map(v => v.baseVal.value))"
    )
    (zero, threshold) = (
        detail.locator(line).first.evaluate("e => e.y1.baseVal.value") for line in (".axis", ".mark")
    )
    unit = (zero - points[0][1]) / 3.0
    assert [zero - y for _, y in points] == pytest.approx([unit * value for value in CURVE], abs=0.2)
    assert zero - threshold == pytest.approx(1.5 * unit, abs=0.2)
    assert [b[0] - a[0] for a, b in pairwise(points)] == pytest.approx([122.7] * 3, abs=0.2)

    pictures = detail.locator("figure")
    assert [text.strip() for text in pictures.all_inner_texts()] == ["without the guard", "with the guard"]
    assert pictures.locator("img").evaluate_all("all => all.map(e => e.naturalWidth)") == [64, 64]
    assert len(set(pictures.locator("img").evaluate_all("all => all.map(e => e.src)"))) == 2
    seeds = detail.locator(".seeds-part li").all_inner_texts()
    assert [line.split() for line in seeds] == [["seed", "3", "2.25"], ["seed", "8", "2.75"]]
    assert detail.locator(".missing").count() == 0

    page.click("th >> text=Prompt")
    assert page.locator("tr:has(.text:text('a red fish')) + .detail").count() == 1, "it moves with its row"
    page.get_by_label("Search").fill("zebra")
    assert detail.count() == 0
    page.get_by_label("Search").fill("")
    assert detail.count() == 1
    page.click(".text:text('a red fish')")
    assert detail.count() == 0


def test_a_prompt_without_details_says_so(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    page.click("text=the long one")
    assert page.locator(".missing").inner_text() == (
        "Not computed for this prompt: words, magnitude at each step, picture without the guard, "
        "picture with the guard."
    )
    assert page.locator(".unread").inner_text() == "the rest"
    assert page.locator(".detail svg, .detail img, .detail .word").count() == 0


def test_parts_of_a_detail(visit, a_scan, a_detail, a_picture):
    details = {
        0: a_detail(curve=(1.0, float("nan"), 2.0)),
        1: a_detail(guarded=a_picture("green"), curve=(0.0,)),
        2: a_detail(words=(("same", 0.0), ("same", 0.0))),
    }
    page = visit(scan_page(a_scan([3.0, 2.0, 1.0], details=details), **TEXTS))
    for toggle in page.locator(".toggle").all():
        toggle.click()
    first, second, third = page.locator(".detail").all()
    assert first.locator("circle title").all_text_contents() == ["step 1: 1.00", "step 3: 2.00"]
    assert first.locator(".mark").count() == 0, "no threshold, no line"
    assert second.locator("circle").count() == 1
    assert second.locator("figcaption").all_inner_texts() == ["with the guard"]
    assert third.locator(".word").evaluate_all(
        "all => all.map(e => e.style.getPropertyValue('--share'))"
    ) == ["0", "0"]
    assert "NaN" not in page.content()


def test_by_keyboard_alone(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    page.get_by_label("Verdict").focus()
    focused = []
    while len(focused) < 5:
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText"))
    assert focused == ["#", "Prompt", "Score", "1: the long one", "2: a red fish"]
    toggle = page.locator(".toggle:focus")
    assert toggle.evaluate("e => getComputedStyle(e).outlineStyle") == "solid", "one sees where one is"
    assert toggle.get_attribute("aria-expanded") == "false"
    page.keyboard.press("Enter")
    assert toggle.get_attribute("aria-expanded") == "true"
    assert page.locator(f"#{toggle.get_attribute('aria-controls')} .word").count() == 3
    page.keyboard.press("Space")
    assert toggle.get_attribute("aria-expanded") == "false" and page.locator(".detail").count() == 0


def test_marking_text_does_not_open(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.text'))")
    page.locator(".verdict").first.dispatch_event("click")
    assert page.locator(".detail").count() == 0
    page.locator(".toggle").first.press("Enter")
    assert page.locator(".detail").count() == 1, "a button means it"


def test_hostile_texts_are_inert(visit, a_scan, a_detail, hostile):
    details = {i: a_detail(words=((text, 1.0), ("b", 0.5))) for i, text in enumerate(hostile)}
    scan = a_scan([float(-i) for i in range(len(hostile))], prompts=hostile, details=details)
    page = visit(scan_page(scan, model=hostile[0], prompts=hostile[1], details={hostile[0]: hostile[1]}))
    for toggle in page.locator(".toggle").all():
        toggle.click()
    page.click("th >> text=Prompt")
    page.get_by_label("Search").fill("script")
    page.get_by_label("Search").fill("")
    page.click("th >> text=#")
    shown = page.locator(".text").all_text_contents()
    words = page.locator(".word:first-child").all_text_contents()
    assert words == hostile
    as_html = [text.replace("\r\n", "\n").replace("\0", "") for text in hostile]
    assert shown == as_html, "as far as HTML has these characters"
    assert page.locator("script").count() == 2 and page.locator("svg").count() == 1
    assert page.locator("img").count() == 0


def test_the_policy_stops_what_is_not_ours(visit, scanned):
    page = visit(scan_page(scanned, **TEXTS))
    refused = page.evaluate(
        """() => {
            try { document.body.innerHTML += "<b>x</b>"; return false; } catch { return true; }
        }"""
    )
    assert refused, "markup from strings is refused even to ourselves"
    image = "const i = new Image(); i.onerror = i.onload = done; i.src = 'https://127.0.0.1:9/x.png';"
    page.evaluate(f"() => new Promise(done => {{ {image} }})")
    assert set(page.evaluate("violations.splice(0)")) == {"require-trusted-types-for", "img-src"}
    assert len(visit.seen) == 3, "said, and no answer from the address"
    visit.seen.clear()


SHORT = 10


@pytest.fixture
def short_pages(monkeypatch):
    monkeypatch.setattr("pumice.report.scan.PAGE", SHORT)


def test_a_long_list_is_shown_in_pages(visit, a_scan, short_pages):
    count = 2 * SHORT + 5
    source = scan_page(a_scan([1.0 - i / count for i in range(count)]), **TEXTS)
    page = visit(source)
    assert page.locator(".text").count() == SHORT
    more = page.locator(".more")
    assert more.inner_text() == f"Show {SHORT} more of {SHORT + 5}"
    more.click()
    assert more.inner_text() == "Show 5 more of 5"
    more.click()
    assert page.locator(".text").count() == count and more.is_hidden()
    page.get_by_label("Search").fill("prompt 1")
    assert page.locator("output").inner_text() == "11 of 25 prompts, 14 hidden", "all are searched"
    page.evaluate(f"location.hash = 'prompt-{count}'")
    page.wait_for_selector(".detail")
    assert page.locator("output").inner_text() == f"{count} of {count} prompts", "not hidden by the filter"


def test_a_link_opens_a_prompt(visit, a_scan, short_pages):
    count = SHORT + 1
    source = scan_page(a_scan([1.0 - i / count for i in range(count)]), **TEXTS)
    page = visit(source, at=f"#prompt-{SHORT + 1}")
    assert page.locator(f"#prompt-{SHORT + 1} + .detail").is_visible()
    assert page.locator(f"#prompt-{SHORT + 1}").evaluate("e => e.getBoundingClientRect().top < innerHeight")
    assert visit(source, at="#prompt-x").locator(".detail").count() == 0


def test_without_scripts_the_table_is_there(visit, a_scan, short_pages):
    source = scan_page(a_scan([float(i) for i in range(SHORT + 5)], threshold=1.0), **TEXTS)
    page = visit(source, java_script_enabled=False)
    assert page.locator(".prompts .text >> visible=true").count() == SHORT + 5
    assert page.locator("form, button.more").locator("visible=true").count() == 0


@pytest.fixture
def pages(scanned, a_picture) -> dict[str, str]:
    """One of each kind."""
    words = [SimpleNamespace(text=text, score=score) for text, score in WORDS]
    explanation = SimpleNamespace(prompt="a red fish " * 12, words=words * 12, magnitude=2.5)
    rates = (
        "replication",
        "replication_low",
        "replication_high",
        "red_team",
        "red_team_low",
        "red_team_high",
    )
    numbers = ("similarity_mean", "similarity_p95", "agreement", "quality", "seconds")
    row = dict.fromkeys(rates, 0.25) | dict.fromkeys(numbers, 0.5)
    names = ("none", "guard", "a mitigation of a long name")
    files = {name: (a_picture("red"),) for name in names}
    bench = SimpleNamespace(
        rows=[{"name": name} | row for name in names],
        prompts=("a red fish",),
        similarities=dict.fromkeys(names, torch.ones(1, 2)),
        red_team_similarities=dict.fromkeys(names, torch.ones(1, 2)),
        reference_pictures=(a_picture("blue"),),
        pictures=files,
        red_team_pictures=files,
        settings={"replayed": 0.5},
    )
    return {
        "scan": scan_page(scanned, **TEXTS),
        "explain": explain_page([explanation], model="m", details={}),
        "bench": bench_page(bench, model="m", details={}),
    }


@pytest.mark.parametrize("kind", ["scan", "explain", "bench"])
def test_fits_a_phone(kind, visit, pages):
    page = visit(pages[kind], viewport={"width": 360, "height": 700})
    if kind == "scan":
        page.click("text=a red fish")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme, visit, pages):
    page = visit(pages["scan"], color_scheme=scheme)
    page.click("text=a red fish")
    measured = page.evaluate(CONTRASTS)
    assert len(measured) > 50 and min(measured) >= 4.5
