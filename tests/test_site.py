"The site: its links and anchors, that it needs nothing from elsewhere, and what a browser makes of it."

import html
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.parse
from html.parser import HTMLParser

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("mkdocs"), reason="the site's tools are not installed: make docs"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
WIDTHS = {"phone": 390, "desk": 1440}
OF_EACH_KIND = [
    "index",
    "explorer",
    "claims",
    "paper",
    "book/index",
    "nbs/06_pruning",
    "experiments/index",
    "outputs/exp_revival/desk/exp_revival",
    "outputs/bench_data/bench_data",
    "howto/index",
]


CONVERTED = REPO / "build/.mkdocs-jupyter"  # pages by their contents


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The site as `make docs` builds it; the seconds of computing that took, which other work beside it hardly changes; and how many notebooks were converted, not found converted.

    A warning is an error.
    """
    site = tmp_path_factory.mktemp("site")
    before, began = _children_seconds(), time.time()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", "docs/mkdocs.yml", "-d", str(site)],
        cwd=REPO,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    converted = [p for p in CONVERTED.rglob("*") if p.is_file() and p.stat().st_mtime >= began]
    return site, _children_seconds() - before, len(converted)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def site(built):
    return built[0]


class Page(HTMLParser):
    "What a page's HTML refers to: links, what is loaded to show it, anchors, images."

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.images = [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[k] for k in ("id", "name") if k in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.loaded.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href") or "")


@pytest.fixture(scope="session")
def pages(site):
    return {p: Page(p) for p in sorted(site.rglob("*.html")) if p.name != "404.html"}


def test_a_page_costs_about_what_nbconvert_takes_for_it(built):
    "The whole site, by notebooks shown, at most twice as much as nbconvert takes for a few of them."
    from nbconvert import HTMLExporter

    site, seconds, converted = built
    shown = len([p for p in site.glob("**/*.html") if "nbs" in p.parts or "outputs" in p.parts])
    if converted < shown / 2:
        pytest.skip("most pages were converted before; rm -r build/.mkdocs-jupyter to convert them again")
    few = sorted(REPO.glob("nbs/[0-9]*.ipynb"))[::6]
    began, exporter = time.process_time(), HTMLExporter()
    for path in few:
        exporter.from_filename(str(path))
    theirs = (time.process_time() - began) / len(few)
    assert seconds / converted < 2 * theirs, (seconds, converted, theirs)


def test_there_is_a_page_for_every_notebook_and_every_result(site):
    for path in [
        *REPO.glob("nbs/[0-9h]*.ipynb"),
        *REPO.glob("outputs/*/desk*/*.ipynb"),
        *REPO.glob("outputs/*/paper*/*.ipynb"),
        *REPO.glob("outputs/bench_*/*.ipynb"),
    ]:
        assert (site / path.relative_to(REPO).with_suffix(".html")).is_file(), path


def test_links_and_anchors_lead_somewhere(pages):
    lost = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                continue
            there = target.is_file() and (
                not url.fragment or target not in pages or urllib.parse.unquote(url.fragment) in pages[target].anchors
            )
            if not there:
                lost.append(f"{path.name}: {link}")
    assert not lost


def test_nothing_is_loaded_from_elsewhere(site, pages):
    elsewhere = re.compile(r"^(https?:)?//")
    assert not [(p.name, u) for p, page in pages.items() for u in page.loaded if elsewhere.match(u)]
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"](https?:)?//", style.read_text()), style


def test_images_say_what_they_show(pages):
    shown = [i for page in pages.values() for i in page.images]
    assert len(shown) > 20
    for image in shown:
        assert len(image.get("alt") or "") > 8 and "No description" not in image["alt"]


def test_notebooks_are_read_without_what_is_for_tools(pages):
    for path in pages:
        text = path.read_text()
        assert "#| " not in text and "#|hide" not in text, path
        assert "jp-RenderedText" not in text or "application/vnd.jupyter.stderr" not in text, path


def test_formulas_are_set_and_code_keeps_its_dollars(site, pages):
    script = html.unescape(re.sub("<[^>]+>", "", (site / "nbs/howto_cluster.html").read_text()))
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK RAY_AUTH_MODE=token" in script
    assert "<math" in (site / "nbs/11_claims.html").read_text()
    for path in pages:
        assert "&lt;math" not in path.read_text(), path


def test_the_ledger_has_every_claim_and_leads_to_its_cell(site, pages):
    ledger = (site / "claims.html").read_text()
    for path in [*REPO.glob("outputs/exp_*/desk*/claims.json"), *REPO.glob("outputs/exp_*/paper*/claims.json")]:
        name, folder = path.parts[-3:-1]
        for claim in json.loads(path.read_text()):
            row = re.search(rf'<tr id="{name}-{folder}-{claim["id"]}">.*?</tr>', ledger, re.S)
            assert row and f'class="verdict {claim["verdict"]}"' in row[0], (name, claim["id"])
            assert "#cell-id=" in row[0] and ">defined</a>" in row[0], claim["id"]


def test_a_folder_of_results_that_appears_has_a_page_without_anything_else(built, tmp_path):
    shutil.copytree(CONVERTED, tmp_path / "build" / CONVERTED.name)  # what others had to be converted for
    for name in ("docs", "nbs", "wrapperlib", "README.md"):
        (tmp_path / name).symlink_to(REPO / name)
    texts = "".join((REPO / name).read_text() for name in ("README.md", "docs/pages/results.md"))
    shown = re.findall(r"\]\((?:\.\./\.\./)?outputs/(\w+/\w+)/\w+\.png\)", texts)
    for folder in {*shown, "exp_behavior/desk", "exp_probing/desk"}:  # whose figures pages show
        shutil.copytree(REPO / "outputs" / folder, tmp_path / "outputs" / folder)
    shutil.copytree(REPO / "outputs/exp_revival/desk", tmp_path / "outputs/exp_revival/paper")
    (tmp_path / "docs").unlink()
    shutil.copytree(REPO / "docs", tmp_path / "docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/mkdocs.yml"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True)
    site = tmp_path / "build" / "site"
    for page in ("index", "claims", "paper", "experiments/index"):
        assert "outputs/exp_revival/paper/exp_revival.html" in (site / f"{page}.html").read_text()
    assert "no results yet" in (site / "experiments/index.html").read_text()  # of the others


# --- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, site):
    "Open pages of a copy on disk; what goes wrong is collected."
    made = []

    def open_at(width, scheme="light"):
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
        page, wrong = context.new_page(), []
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url))
        made.append(context)

        def go(name):
            page.goto((site / f"{name}.html").as_uri(), wait_until="load")
            if name == "explorer":
                page.wait_for_selector("#explorer-charts svg")
            return page, wrong

        return go

    yield open_at
    for context in made:
        context.close()


@needs_browser
def test_every_page_loads_without_a_complaint_or_a_request(visit, pages, site):
    go = visit(1440)
    for path in pages:
        _, wrong = go(path.relative_to(site).with_suffix("").as_posix())
        assert not wrong, (path.name, wrong)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_fit_and_can_be_read(visit, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    go = visit(width, scheme)
    for name in OF_EACH_KIND:
        page, _ = go(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        small = page.evaluate(SMALL)
        assert not small, (name, small)
        found = Axe().run(page, options=dict(resultTypes=["violations"])).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, (name, [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious])


# text of an article that is smaller than 11 pixels, shown
SMALL = """() => [...document.querySelectorAll('article *')].filter(e => e.offsetParent && !e.closest('svg, math') &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && parseFloat(getComputedStyle(e).fontSize) < 11)
    .map(e => e.outerHTML.slice(0, 120)).slice(0, 5)"""


@needs_browser
def test_controls_of_the_explorer_change_the_charts(visit):
    page, wrong = visit(1440)("explorer")
    drawn = lambda: page.inner_html("#explorer-charts")  # noqa: E731
    for control, choice in dict(task="index", prior="H", c_tr="0.5", rate="η_S", back="η_S", step="128").items():
        if control == "back":  # a way back is measured for counting
            page.select_option("[name=task]", "count")
            page.select_option("[name=c_tr]", "1")
            page.select_option("[name=rate]", "η_M")
        before = drawn()
        page.select_option(f"[name={control}]", choice)
        page.wait_for_function("before => document.getElementById('explorer-charts').innerHTML !== before", arg=before)
        assert drawn() != before, control
    assert not wrong


@needs_browser
def test_the_explorer_shows_what_was_measured(visit):
    import pandas as pd

    page, _ = visit(390)("explorer")
    page.select_option("[name=prior]", "H")
    table = pd.read_csv(REPO / "outputs/exp_behavior/desk/results.csv")
    there = table.query(
        "prior == 'H' and c_tr == 1 and c_te == 0 and ft_lr == 3e-4 and step == 23 and metric == 'acc_opt'"
    )
    assert f"O_PT (a), C_Te = 0: {100 * there['value'].mean().round(3):.0f} %" in page.inner_text("#explorer-says")


@needs_browser
def test_the_explorer_keeps_what_was_chosen_when_the_theme_changes(visit):
    page, wrong = visit(1440)("explorer")
    page.select_option("[name=prior]", "M")
    said = page.inner_text("#explorer-says")
    page.evaluate("document.body.setAttribute('data-md-color-scheme', 'slate')")
    page.wait_for_timeout(1000)
    assert page.input_value("[name=prior]") == "M" and page.inner_text("#explorer-says") == said
    assert not wrong


@needs_browser
def test_the_search_works_in_a_copy_on_disk(visit):
    page, wrong = visit(1440)("index")
    page.fill(".md-search__input", "Student")
    page.wait_for_selector(".md-search-result__item a")
    assert not wrong
