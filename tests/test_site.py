"""The site: it builds strictly, its links lead somewhere, and without a network a browser shows all that a page has.

Pages are opened from the disk, as a reader without a server opens them. Screenshots are written to the folder that the
environment variable SCREENSHOTS names, for a person to look at.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from filelock import FileLock
from playwright.sync_api import sync_playwright

from test_explorer import by_the_naive_layer

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


# --- the site, built once -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The built site; test processes share it."""
    common = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder = common / "site"
    with FileLock(common / "site.lock"):
        if not (common / "site.done").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (common / "site.done").write_text(done.stderr)
    return folder


@pytest.fixture(scope="session")
def pages(site):
    """Every page by its path, parsed."""
    return {path.relative_to(site).as_posix(): Parsed(path.read_text()) for path in sorted(site.rglob("*.html"))}


class Parsed(HTMLParser):
    """A page's anchors, links, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.text, self.anchors, self.links, self.loaded = text, {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(attributes["href"])
        elif attributes.get("src"):
            self.loaded.append(attributes["src"])


def test_it_builds_strictly_with_every_page_of_the_navigation(pages):
    navigation = re.findall(r"[:-] ([\w/]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) > 20
    assert {f"{page}.html" for page in navigation} <= set(pages)


def test_links_and_anchors_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue  # its links begin at the root of a server
        for link in page.links + page.loaded:
            path, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", link):
                continue
            target = (site / name).parent / unquote(path) if path else site / name
            relative = os.path.relpath(target, site)
            if not target.exists() or (relative in pages and unquote(anchor) not in pages[relative].anchors):
                broken.append(f"{name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [f"{name}: {x}" for name, page in pages.items() for x in page.loaded if re.match(r"(https?:)?//", x)]


def test_no_page_tells_where_it_was_built(pages):
    assert not [name for name, page in pages.items() if str(ROOT) in page.text]


def test_the_table_of_chapters_says_what_the_chapters_say():
    """Minutes, and the chapters that the head of a chapter links: `1, 5`, or the ends of `1 to 4`."""
    table = (ROOT / "docs" / "tutorials" / "index.md").read_text()
    rows = re.findall(r"\(\.\./\.\./tutorials/(\w+)\.ipynb\) \| (\d+) \|([^|]*)\|", table)
    assert len(rows) == 8
    for name, minutes, after in rows:
        head, _, _ = (ROOT / "tutorials" / f"{name}.py").read_text().partition("**Device**")
        told = re.search(r"\*\*Time\*\* (\d+) minutes", head)[1], re.findall(r"\(0(\d)_\w+\.ipynb\)", head)
        assert told == (minutes, re.findall(r"\d", after)), name


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A tab that notes errors and requests."""

    def __init__(self, browser, site, viewport=DESKTOP, scheme="light", **options):
        self.site, self.problems = site, []
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme, **options)
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.note(message.text))
        self.page.on("pageerror", lambda error: self.note(f"error: {error}"))
        self.page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:"))
                     or self.note(f"requests {request.url}"))  # fmt: skip
        self.page.on("requestfailed", lambda request: "ABORTED" in request.failure  # the next page came first
                     or self.note(f"misses {request.url}"))  # fmt: skip

    def note(self, problem):
        self.problems.append(f"{self.page.url.rpartition('/site/')[2]}: {problem}")

    def open(self, name):
        self.page.goto((self.site / name).as_uri(), wait_until="load")
        return self.page


@pytest.fixture
def tab(browser, site):
    tab = Tab(browser, site)
    yield tab
    tab.page.close()
    assert not tab.problems


#: What is wrong with a page that is open, as a list of sentences; `formulas` is how many its source has.
LOOK = r"""(formulas) => {
  const problems = [];
  const count = (selector) => document.querySelectorAll(selector).length;
  if (count(".arithmatex") !== formulas) problems.push(`${count(".arithmatex")} formulas of ${formulas}`);
  if (count(".arithmatex > .katex, .arithmatex > .katex-display") !== formulas)
    problems.push(`${count(".arithmatex > .katex, .arithmatex > .katex-display")} rendered formulas of ${formulas}`);
  if (count(".katex-error")) problems.push("a formula has an error");
  const article = (document.querySelector("article") ?? document.body).cloneNode(true);
  article.querySelectorAll("pre, code, .arithmatex, script").forEach((element) => element.remove());
  const left = article.textContent.match(/\$[^$\n]+\$|\$\$|\\[([]|\\begin\{|\]\([^)]*\)/);
  if (left) problems.push(`source shows: ${left[0]}`);
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) problems.push(`${wide} pixels wider than the window`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) problems.push(`no image: ${image.src}`);
  for (const image of document.querySelectorAll("article img"))
    if (!image.hasAttribute("alt")) problems.push(`no description: ${image.src}`);
  if (!document.fonts.check("12px KaTeX_Main") && formulas) problems.push("no fonts for formulas");
  return problems;
}"""


#: Luminance of the paper, and the contrast of text and links with it (WCAG's definitions).
LIGHT = r"""() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = (selector) => {
    const element = document.querySelector(selector);
    const ink = element ? luminance(getComputedStyle(element).color) : 1 - paper;
    return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
  };
  return { paper, text: contrast("article p"), link: contrast("article p > a") };
}"""


@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_shows_what_it_has(browser, site, pages, window):
    """Formulas, pictures, the width, light and dark; neither errors nor requests."""
    tab = Tab(browser, site, window)
    for name, page in pages.items():
        if name == "404.html" or (name.startswith("source/") and window is DESKTOP):
            continue
        tab.page.emulate_media(color_scheme="light")
        shown = tab.open(name)
        for problem in shown.evaluate(LOOK, len(re.findall(r'class="arithmatex"', page.text))):
            tab.note(problem)
        for scheme in ("light", "dark"):
            shown.emulate_media(color_scheme=scheme)
            shown.wait_for_function(f"({LIGHT})().paper {'>' if scheme == 'light' else '<'} 0.5")
            seen = shown.evaluate(LIGHT)
            if seen["text"] < 7 or seen["link"] < 4.5:
                tab.note(f"{scheme}: contrast {seen}")
            if folder := os.environ.get("SCREENSHOTS"):
                file = f"{name.removesuffix('.html').replace('/', '-')} {window['width']} {scheme}.png"
                shown.screenshot(path=Path(folder) / file, full_page=True)
    tab.page.close()
    assert not tab.problems


def test_search_works_from_the_disk(tab):
    page = tab.open("index.html")
    page.keyboard.press("/")
    page.keyboard.type("halving")
    page.wait_for_selector(".md-search-result__item a[href*='mathematics.html']", state="attached")


# --- the explorer ---------------------------------------------------------------------------------------------------


def shown_numbers(page):
    """What the table says: sum of magnitudes, strongest patch as (row, column) from 0, its weight, for each map."""
    rows = {}
    for name in ("fwd", "rev", "both"):
        total, place, weight = page.locator(f"#explorer-row-{name} td").all_inner_texts()
        where = tuple(int(n) for n in re.findall(r"\d+", place)) or None
        rows[name] = float(total), where, float(weight.replace("−", "-"))
    return rows


def assert_shows(page, token, tau):
    """The token's numbers are those of the naive layer, as far as two digits, and for a weight its byte, tell."""
    A_fwd, A_rev = by_the_naive_layer(tau)
    assert f"Token {token}: " in page.inner_text("#explorer-token")
    for name, (total, where, weight) in shown_numbers(page).items():
        row = {"fwd": A_fwd[token], "rev": A_rev[token], "both": A_fwd[token] + A_rev[token]}[name].copy()
        row[token] = 0
        assert total == pytest.approx(abs(row).sum(), abs=6e-3)
        assert abs(weight) == pytest.approx(abs(row).max(), abs=1 / 254 + 6e-3)
        if where:
            assert weight == pytest.approx(row[where[0] * 14 + where[1]], abs=1 / 254 + 6e-3)


def click(page, canvas, token, how="click"):
    box = page.locator(canvas).bounding_box()
    row, column = divmod(token, 14)
    position = {"x": (column + 0.5) * box["width"] / 14, "y": (row + 0.5) * box["height"] / 14}
    getattr(page.locator(canvas), how)(position=position)


def pixels(page):
    return page.evaluate("document.getElementById('explorer-both').toDataURL()")


@pytest.mark.parametrize("canvas", ["#explorer-photo", "#explorer-both"])
def test_explorer_answers_clicks(tab, canvas):
    page = tab.open("explorer.html")
    before = pixels(page)
    for token in (0, 100, 195):
        click(page, canvas, token)
        assert_shows(page, token, tau=16)
    assert pixels(page) != before


def test_explorer_answers_touch(browser, site):
    tab = Tab(browser, site, PHONE, has_touch=True, is_mobile=True)
    page = tab.open("explorer.html")
    click(page, "#explorer-photo", 45, how="tap")
    assert_shows(page, 45, tau=16)
    page.close()
    assert not tab.problems


def test_explorer_answers_the_slider(tab):
    page = tab.open("explorer.html")
    slider = page.locator("#explorer-tau")
    click(page, "#explorer-photo", 60)
    seen = set()
    for step, tau in [(0, 0.0), (1, 1.0), (7, 64.0), (8, float("inf"))]:
        slider.fill(str(step))
        assert_shows(page, 60, tau)
        seen.add(pixels(page) + page.inner_text("#explorer-gate"))
    assert len(seen) == 4
    assert "plain linear attention" in page.inner_text("#explorer-gate")


def test_explorer_answers_keys(tab):
    page = tab.open("explorer.html")
    click(page, "#explorer-photo", 0)
    page.focus("#explorer-photo")
    for key in ("ArrowUp", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowDown"):  # the first two lead nowhere
        page.keyboard.press(key)
    assert_shows(page, 29, tau=16)
    page.focus("#explorer-tau")
    page.keyboard.press("ArrowRight")
    assert_shows(page, 29, tau=32)


# --- the animations --------------------------------------------------------------------------------------------------


#: What an animation shows: its words, its drawing and its pixels.
STAGE = """() => document.getElementById("where").textContent + document.getElementById("stage").innerHTML +
  [...document.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL()).join()"""


@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["scan", "chunk"])
def test_animations_step(browser, site, name, window):
    """By key, button and slider, forth and back: every step is a picture of its own, inside the window."""
    tab = Tab(browser, site, window, "dark" if window is PHONE else "light")
    page = tab.open(f"animations/{name}.html")
    pictures = [page.evaluate(STAGE)]
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        pictures.append(page.evaluate(STAGE))
    page.click("#forward")
    pictures.append(page.evaluate(STAGE))
    assert len(set(pictures)) == 4
    page.click("#back")
    assert page.evaluate(STAGE) == pictures[2]
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(STAGE) == pictures[1]
    page.locator("#slider").fill("3")
    assert page.evaluate(STAGE) == pictures[3]
    page.click("#play")
    page.wait_for_function(f"(before) => ({STAGE})() !== before", arg=pictures[3])
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()
    assert not tab.problems
