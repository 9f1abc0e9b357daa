"""The page as a reader has it: in headless Chromium, driven by Playwright, audited by axe-core."""

import json
import shutil

import pytest
from PIL import Image
from reporting import GRADES, HOSTILE, add, stored

from probe.report import Options, html, make, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


def every_kind(folder):
    """Results of every kind that the page can show, hostile names and real images among them."""
    scores = {"value": 0.7, "ci_low": 0.6, "ci_high": 0.8}
    for k, (name, value) in enumerate((("dinov2", 0.9), ("deit", 0.7))):
        facts = {"metrics": {"auroc": scores | {"value": 1.6 - value}, "accuracy": scores}}
        facts["weights"] = "random" if name == "deit" else "published"
        stored(folder, backbone=name, names=HOSTILE[:5], seed=k, **facts)
        add(folder, classes=GRADES, backbone=name, seed=k, feature="final/mean", **facts)
    stored(folder, backbone="sam", names=HOSTILE[:5], seed=2, metrics=facts["metrics"])
    history = [{"epoch": k, "train_loss": 1 / (k + 1), "value": 0.5 + k / 10} for k in range(4)]
    history[0]["train_loss"] = None
    facts = {"feature": "final/mean", "history": history, "folds": {}, "C": None}
    add(folder, scenario="unfrozen-linear", protocol="finetune", **facts)
    for k in range(3):
        add(folder, feature=f"block{k:02}/mean", seed=2 + k)
        add(folder, feature="final/mean", shots=2**k, seed=5 + k)
    for name, weights in (("dinov2", "published"), ("deit", "random")):
        findings = {
            "classes": ["Edema", "Mass", HOSTILE[0]],
            "many": True,
            "metric": "auroc",
            "feature": "final/mean",
        }
        add(folder, dataset="chest", backbone=name, weights=weights, **findings)
    (folder / "analysis").mkdir()
    (folder / "analysis" / "cka.csv").write_text(",a,b\na,1,.25\nb,.25,1\n")


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("browser")
    every_kind(folder)
    options = Options(analysis=folder / "analysis")
    (folder / "index.html").write_text(html(make([folder], options), options))
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def written(tmp_path_factory, browser):
    """The page as the command writes it, with pictures of its charts."""
    folder = tmp_path_factory.mktemp("written")
    add(folder, seed=1)
    add(folder, seed=2, backbone="sam")
    return write_report([folder], folder / "report").as_uri()


@pytest.fixture(scope="module")
def complaints():
    return []


@pytest.fixture(scope="module")
def page(browser, index, complaints):
    """The page, wide, with whatever it complains about and asks the network for."""
    page = browser.new_page(viewport=WIDE)
    page.set_default_timeout(20_000)
    page.on("console", lambda m: complaints.append(m.text) if m.type != "log" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("dialog", lambda d: (complaints.append(d.message), d.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:"))
            else complaints.append(r.url))  # fmt: skip
    page.goto(index)
    return page


def draw(page):
    """Bring every chart that isn't hidden into view until it is drawn."""
    for figure in page.query_selector_all("figure.chart:not([data-drawn])"):
        if figure.is_visible():
            figure.scroll_into_view_if_needed()
            figure.wait_for_selector(".main-svg", state="attached")


def draw_all(page):
    """Draw the charts of every result."""
    for key in page.eval_on_selector_all("select.pick option", "all => all.map(o => o.value)"):
        page.evaluate("key => { location.hash = key; }", key)
        page.wait_for_function("key => !document.getElementById(key).hidden", arg=key)
        draw(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('figure.chart')].every(f => f.dataset.drawn)"
    )


def test_every_chart_is_drawn_without_a_complaint(page, complaints):
    draw_all(page)
    kinds = set()
    charts = page.evaluate("JSON.parse(document.getElementById('data').textContent).charts")
    for figure in page.query_selector_all("figure.chart"):
        chart = charts[figure.get_attribute("data-chart")]
        kinds.add(chart["kind"])
        marks = figure.eval_on_selector(
            ".plot", "p => p.querySelectorAll('.main-svg path, .main-svg image').length"
        )
        assert marks > 2, chart["name"]
    assert kinds == {"lines", "dots", "bars", "heat", "points"}
    assert complaints == []
    titles = page.eval_on_selector_all("h2", "all => all.map(h => h.textContent)")
    expected = ["Backbones and data sets", "Gain over the reference", "Frozen and unfrozen"]
    expected += ["Score against C", "Score by depth", "Score against shots", "Convergence"]
    expected += ["Likeness of layers", "chest", "idrid", "ward", "Provenance"]
    assert titles == expected


def test_hostile_names_run_nothing_and_are_read_as_they_are(page, complaints):
    legend = page.inner_text("figure[data-chart*=ward-dinov2][data-chart$='-roc'] .legend")
    assert "<script>alert(1)</script>" in legend
    hover = page.evaluate(
        """() => { const f = document.querySelector('figure[data-chart*="ward-dinov2"][data-chart$="confusion"]');
                   return f.querySelector('.plot').textContent; }"""  # noqa: E501
    )
    assert "<script>alert" in hover  # the names of an axis, cut short
    assert complaints == [] and page.evaluate("document.scripts.length") <= 4


def names(page):
    return page.eval_on_selector_all(
        "table.main tbody tr:not([hidden]) th", "all => all.map(t => t.textContent.trim())"
    )


def test_the_table_sorts_by_a_column_both_ways(page):
    page.reload()
    button = page.locator("table.main thead button", has_text="ward")
    button.focus()
    page.keyboard.press("Enter")
    down = names(page)
    place = button.locator("xpath=..").evaluate("th => th.cellIndex")
    values = "(rows, k) => rows.slice(0, 3).map(r => Number(r.cells[k].dataset.value))"
    falling = page.eval_on_selector_all("table.main tbody tr", values, place)
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[2] > 0
    assert {n.split()[0] for n in down[:3]} == {"dinov2", "deit", "sam"}
    assert button.locator("xpath=..").get_attribute("aria-sort") == "descending"
    button.click()
    assert page.eval_on_selector_all("table.main tbody tr", values, place) == falling[::-1]
    last = page.locator(".main tbody tr").last
    assert "unfrozen" in last.inner_text()  # without a value: last, both ways


def test_filters_leave_a_scenario_and_show_another_metric(page):
    page.select_option("#scenario", "unfrozen-linear")
    assert [n.split()[0] for n in names(page)] == ["dinov2"]
    assert page.inner_text("#shown") == "1 model shown"
    page.select_option("#scenario", "")
    page.select_option("#metric", "auroc")
    cell = page.locator("table.main tr", has_text="deit").locator("td[data-cell]").last
    assert cell.locator(".value").inner_text() == ".900"
    assert page.locator("table.main td.best").count() == 1  # deit's weights are random
    best = page.locator("table.main td.best")
    assert best.locator("xpath=..").inner_text().startswith("sam")
    assert page.is_hidden("#marks") and page.is_visible("#untested")
    page.select_option("#metric", "")
    assert cell.locator(".value").inner_text() == ".833"


def the_map(page):
    key = page.get_attribute("article.result[aria-labelledby]:has(figure[data-chart$=map])", "id")
    page.evaluate("key => { location.hash = ''; location.hash = key; }", key)
    figure = page.locator(f"#{key} figure[data-chart$=map]")
    figure.scroll_into_view_if_needed()
    figure.locator(".main-svg").first.wait_for(state="attached")
    return figure


def test_pointing_at_an_image_shows_it_and_so_do_the_arrow_keys(page):
    figure = the_map(page)
    place = figure.locator(".scatterlayer .point").first.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    picture = figure.locator(".picture img")
    picture.wait_for()
    assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") == 56
    words = figure.locator(".picture").inner_text()
    assert "id-scan-" in words and "label:" in words and "split:" in words

    figure.locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    first = figure.locator(".picture strong").inner_text()
    page.keyboard.press("ArrowRight")
    assert figure.locator(".picture strong").inner_text() != first
    figure.locator("select").last.select_option("error")
    page.wait_for_function(
        "f => f.querySelector('.legend').textContent.includes('not tested')",
        arg=figure.element_handle(),
    )


def test_the_data_of_a_chart_are_one_click_away(page):
    figure = page.locator("figure[data-chart$=confusion]:visible").first
    figure.locator("summary").click()
    figure.locator("details td").nth(20).wait_for()  # the table is made when it is opened
    with page.expect_download() as download:
        figure.get_by_role("button", name="Save as CSV").click()
    assert download.value.suggested_filename.endswith("-confusion.csv")


def test_a_click_in_the_legend_makes_another_line_bold(page):
    figure = page.locator("figure[data-chart$='-roc']:visible").first
    figure.scroll_into_view_if_needed()
    buttons = figure.locator(".legend button")
    buttons.first.wait_for()
    wanted = buttons.nth(2).inner_text()
    buttons.nth(2).click()
    page.wait_for_function(
        "([f, t]) => f.querySelector('[aria-pressed=true]')?.textContent === t",
        arg=[figure.element_handle(), wanted],
    )
    bold = "p => Math.max(...[...p.querySelectorAll('.js-line')].map(l => parseFloat(getComputedStyle(l).strokeWidth)))"  # noqa: E501
    assert figure.locator(".plot").evaluate(bold) > 2


def test_axe_finds_nothing_on_light_or_dark(browser, index):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport=WIDE, color_scheme=scheme)
        page.goto(index)
        page.locator("figure.chart").first.scroll_into_view_if_needed()
        page.wait_for_selector("figure[data-drawn]")
        found = axe.run(page).response["violations"]
        page.close()
        assert found == [], json.dumps(
            [(v["id"], v["help"], [n["html"][:150] for n in v["nodes"][:3]]) for v in found],
            indent=1,
        )


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out_at_either_width(page, size, tmp_path):
    page.set_viewport_size(size)
    draw(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('[data-drawn] .plot')].every(p => !p.clientWidth "
        "|| Math.abs(p.querySelector('.main-svg').clientWidth - p.clientWidth) < 9)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for plot in page.query_selector_all(".plot:visible"):
        svg, box = plot.query_selector(".main-svg").bounding_box(), plot.bounding_box()
        assert svg["width"] <= box["width"] + 9 and svg["height"] > 150
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as seen:
        assert seen.width == size["width"] and len(seen.convert("RGB").getcolors(1 << 24)) > 500


@pytest.mark.parametrize("why", ["reduced motion", "no observer", "print"])
def test_where_nothing_scrolls_charts_are_drawn_at_once(browser, index, why):
    page = browser.new_page(viewport=WIDE, reduced_motion="reduce" if why[0] == "r" else None)
    if why == "no observer":
        page.add_init_script("delete window.IntersectionObserver")
    page.goto(index)
    if why == "print":
        page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function(
        "() => [...document.querySelectorAll('figure.chart')].every("
        "f => f.dataset.drawn || !f.querySelector('.plot').clientWidth)"
    )
    assert page.evaluate("scrollY") == 0
    if why == "print":  # on paper, whatever the system's colours
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    page.close()


def test_pictures_stand_where_no_script_runs_and_until_it_has_run(browser, written):
    page = browser.new_page(viewport=WIDE, java_script_enabled=False)
    page.goto(written)
    stills = page.locator("img.still")
    assert stills.count() > 5
    assert page.locator(".plot").first.bounding_box()["height"] < 20  # no gap for what won't come
    for still in stills.all():
        box = still.bounding_box()
        assert box["width"] > 200 and box["height"] > 80  # it was read: a broken one has no height
    page.close()
    page = browser.new_page(viewport=WIDE)  # plotly is never there
    page.add_init_script("delete window.DecompressionStream")
    page.goto(written)
    first = page.locator("figure.chart:has(.plot img.still)").first
    assert first.locator("img.still").first.evaluate("i => i.naturalWidth") > 200
    page.close()


def test_a_table_wider_than_the_page_says_that_it_scrolls(browser, index):
    page = browser.new_page(viewport=NARROW)
    page.goto(index)
    box = page.locator(".scroll:has(table.results)")
    hint = page.locator(".sideways:has(+ .scroll table.results)")
    hint.wait_for()
    assert "scroll sideways" in hint.inner_text()
    assert "more" in box.get_attribute("class").split()
    box.evaluate("b => { b.scrollLeft = b.scrollWidth; }")
    page.wait_for_function("b => !b.classList.contains('more')", arg=box.element_handle())
    assert "less" in box.get_attribute("class").split()
    page.close()


def test_long_names_are_broken_into_lines_and_not_cut(browser, tmp_path):
    facts = {"folds": {}, "C": None, "scenario": "unfrozen-linear", "protocol": "finetune"}
    for k, which in enumerate(("all", "last:1")):
        add(tmp_path, seed=k, settings={"unfreeze": which, "lr": 0.001 * (k + 1)}, **facts)
    for k, protocol in enumerate(("dinov2-logreg", "bigvision-fewshot")):
        add(tmp_path, seed=k, protocol=protocol)
    options = Options()
    (tmp_path / "index.html").write_text(html(make([tmp_path], options), options))
    for size in (WIDE, NARROW):
        page = browser.new_page(viewport=size)
        page.goto((tmp_path / "index.html").as_uri())
        for chart, selector in (
            ("gain", ".main-svg .xtick"),
            ("scenarios", ".main-svg .ytick"),
            ("scenarios", ".legend bdi"),
            ("C-", ".legend bdi"),
        ):
            figure = page.locator(f"figure[data-chart*='000-{chart}']").first
            figure.scroll_into_view_if_needed()
            figure.locator(".main-svg").first.wait_for(state="attached")
            said = figure.locator(selector).all_inner_texts()
            said = said if all(said) else figure.locator(selector).all_text_contents()
            assert said and not [text for text in said if "\u2026" in text], (chart, said)
            outer = figure.locator(".plot").bounding_box()
            for tick in figure.locator(".main-svg .xtick, .main-svg .ytick").all():
                box = tick.bounding_box()
                assert box["x"] >= outer["x"] - 1, (chart, tick.text_content())
                assert box["y"] + box["height"] <= outer["y"] + outer["height"] + 1
        page.close()


def test_on_paper_all_charts_of_the_page_are_light_and_drawn(browser, index):
    page = browser.new_page(viewport=WIDE, color_scheme="dark")
    page.goto(index)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "() => [...document.querySelectorAll('figure.chart')].every("
        "f => f.dataset.drawn || !f.offsetParent)"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 243)"
    page.close()
