"""Pages as a browser shows them: those of a run and those of the site. Without Chromium, see the tests of the chapters on the book and the site, which read the HTML."""

import re

import pytest
from browser import Browser, chromium
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from attnbook.lab.book import markdown_table
from attnbook.lab.pages import to_html

pytestmark = pytest.mark.skipif(not chromium(), reason="needs Chromium (on Debian: apt install chromium)")
SIDEWAYS = "document.documentElement.scrollWidth - screen.width"  # a phone widens the window to what sticks out: its screen counts
#: what sticks out of the page and stands in no box that scrolls
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => { const r = e.getBoundingClientRect(); return r.width && r.right > screen.width + 1 && r.left >= 0
    && !e.closest('.math, .table, .out, pre, .highlight, .where') }).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as b:
        yield b


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A page with everything that is too wide for a phone."""
    folder = tmp_path_factory.mktemp("page")
    terms = " + ".join(f"x_{{{i}}}^2" for i in range(60))
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    claims = str(
        markdown_table(
            ["claim", "paper", "verdict"],
            [["It is faster " * 5, "2.5x", "**holds**: 3x"], ["x" * 90, "1", "**not measured**"]],
        )
    )
    nb = new_notebook(
        cells=[
            new_markdown_cell(
                "# A title that is rather long for a phone: Antidisestablishmentarianism\n\n> A promise.\n\n## Claims\n\n"
                + claims
            ),
            new_markdown_cell(
                f"## Wide\n\n$$\n{terms}\n$$\n\nInline ${terms}$ and `{'a_long_name.' * 12}` and {'w' * 120}.\n\n|{'a header |' * 14}\n|{'---|' * 14}\n|{'1234567890 |' * 14}\n\n### Deep\n\n[down](#folded)"
            ),
            new_code_cell(
                "x = '" + "y" * 300 + "'",
                outputs=[
                    new_output("stream", text="z" * 400),
                    new_output("display_data", {"image/png": dot}),
                    new_output("execute_result", {"text/markdown": claims}),
                ],
            ),
            new_markdown_cell("## Folded"),
            new_code_cell("#| test\ndef test_it():\n    assert 'needle'"),
        ]
    )
    write(nb, folder / "a.ipynb")
    return to_html(folder / "a.ipynb", folder / "a.html")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_page_does_not_scroll_sideways(browser, wide, width):
    browser.open(wide, width)
    assert browser.js(SIDEWAYS) == 0 and browser.js(OUTSIDE) == [] and browser.errors == []
    for box in (".math", ".table", ".code pre"):
        assert browser.js(
            f"Math.max(...[...document.querySelectorAll('{box}')].map(e => e.scrollWidth - e.clientWidth))"
        ) > (0 if width < 600 else -1), box


def test_the_test_can_fail(browser, wide):
    browser.open(wide, 390)
    browser.js("document.querySelector('.math').style.overflow = 'visible'")
    assert browser.js(SIDEWAYS) > 0


def test_claims_are_a_list_on_a_phone_and_a_table_on_a_screen(browser, wide):
    cells = "[...document.querySelectorAll('table.claims tbody tr:first-child td')].slice(0, 3).map(e => e.getBoundingClientRect())"
    browser.open(wide, 390)
    assert browser.js(
        f"{cells}.every((r, i, all) => r.width > 250 && r.right <= screen.width && (!i || r.top >= all[i - 1].bottom - 1))"
    )
    assert browser.js("getComputedStyle(document.querySelector('table.claims td'), '::before').content") == '"claim"'
    browser.open(wide, 1280)
    assert browser.js(f"{cells}.every((r, i, all) => !i || r.left >= all[i - 1].right - 1)")


def test_contents_are_at_the_side_and_behind_a_button_on_a_phone(browser, wide):
    shown = "document.querySelector('.side').getBoundingClientRect().height"
    browser.open(wide, 1280)
    assert browser.js(shown) > 300 and browser.js(
        "[...document.querySelectorAll('.side a')].map(e => e.textContent)"
    ) == ["Claims", "Wide", "Deep", "Folded"]
    browser.js("document.querySelector('.side a[href=\"#folded\"]').click()")
    assert browser.js("location.hash") == "#folded"
    browser.open(wide, 390)
    assert browser.js(shown) == 0
    browser.js("document.querySelector('label[for=menu]').click()")
    assert browser.js(shown) > 0


def test_tests_are_closed_and_open_by_a_click(browser, wide):
    browser.open(wide)
    height = "document.querySelector('details').getBoundingClientRect().height"
    closed = browser.js(height)
    browser.js("document.querySelector('summary').click()")
    assert closed < 60 and browser.js(height) > closed + 40


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_in_both_modes(browser, wide, dark):
    """The contrast of text, links, code and verdicts with what is behind them is at least 4.5, as WCAG wants it."""
    browser.open(wide, dark=dark)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    worst = browser.js("""(() => {
        const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
        const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c } return 'rgb(255, 255, 255)' };
        const found = [...document.querySelectorAll('p, a:not(.anchor), td, th, code, pre span, summary, strong, figcaption, h1, h2')].map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)] });
        return found.sort((x, y) => x[0] - y[0])[0] })()""")
    assert worst[0] >= 4.5, worst
    assert browser.js("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    )


# The site: the whole of the start page, one long chapter and the modules, built once.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from attnbook.lab.site import build_site

    return build_site(tmp_path_factory.mktemp("site") / "out", only=["layers", "halo"], claims=False, count=False)


def test_pages_of_the_site_have_no_faults(site):
    from attnbook.lab.site import page_faults

    assert page_faults(site.out) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_of_the_site_fit_and_ask_for_nothing(browser, site, width):
    for path in (
        "index.html",
        "3_locality/halo.html",
        "models.html",
        "api/index.html",
        "api/attnbook.halo.html",
        "api/attnbook.halo.kernels.html",
        "api/attnbook.engine.op.html",
    ):
        browser.open(site.out / path, width)
        assert (path, browser.js(SIDEWAYS), browser.js(OUTSIDE), browser.errors) == (path, 0, [], [])


def test_claims_of_a_chapter_can_be_read_on_a_phone(browser, site):
    browser.open(site.out / "3_locality/halo.html", 390)
    assert browser.js("document.querySelectorAll('table.claims td').length") > 50
    assert browser.js(
        "[...document.querySelectorAll('table.claims td')].every(e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= screen.width)"
    )


def test_a_search_leads_to_the_place(browser, site):
    browser.open(site.out / "index.html")
    browser.js("""(async () => { const i = document.getElementById('search'); i.focus(); i.value = 'halo_attention'; i.dispatchEvent(new Event('input'));
        for (let n = 0; n < 200 && !document.querySelector('#found a'); n++) await new Promise(r => setTimeout(r, 20)) })()""")
    hits = browser.js("[...document.querySelectorAll('#found a')].map(a => a.getAttribute('href').replace('./', ''))")
    assert "api/attnbook.halo.op.html#halo_attention" in hits[:3] and browser.errors == []
    browser.js(
        "(async () => { const i = document.getElementById('search'); i.value = 'zzzznothing'; i.dispatchEvent(new Event('input')); await new Promise(r => setTimeout(r, 100)) })()"
    )
    assert browser.js("document.getElementById('found').textContent") == "nothing found"


def test_buttons_of_the_site(browser, site):
    browser.open(site.out / "3_locality/halo.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.js(colour)
    browser.js("document.getElementById('theme').click()")
    assert before == "rgb(255, 255, 255)" != browser.js(colour)
    browser.open(site.out / "api/index.html")
    assert browser.js(colour) != before, "the choice is kept for the next page"
    browser.js("localStorage.clear()")
    browser.open(site.out / "3_locality/halo.html")
    browser.js("document.getElementById('fold').click()")
    assert browser.js("[...document.querySelectorAll('details.code')].every(d => d.open)")


def test_a_link_to_a_cell_opens_it(browser, site):
    page = (site.out / "3_locality/halo.html").read_text()
    cell = re.search(r'<div id="(cell-[^"]+)"><details', page)[1]
    browser.open((site.out / "3_locality/halo.html").as_uri() + f"#{cell}")
    assert browser.js(f"document.querySelector('#{cell} > details').open")
