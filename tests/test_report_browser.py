# SPDX-License-Identifier: MIT
"""The report in a real browser: Chromium of the system, driven by Playwright.

Every page is watched: nothing may be fetched, and nothing may be logged.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from report_data import SMALL, make_run, write_picture

from patchnetvlad import compare
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.plots.drawing import METHODS
from patchnetvlad.report.write import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.usefixtures("thin_network"),
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)"),
]
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
WORDS = {"r": "Right", "w": "Wrong", "s": "Rescued", "h": "Hurt", "n": "No answer"}


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        # Chromium's sandbox does not work for root in a container.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """Open a page, and see at the end that it was quiet."""
    contexts, noise = [], []

    def show(file, address="", viewport=WIDE, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on(
            "request",
            lambda request: (
                noise.append(request.url)
                if not request.url.startswith(("data:", file.as_uri()))
                else None
            ),
        )
        page.goto(file.as_uri() + address)
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
        return page

    show.noise = noise
    yield show
    for context in contexts:
        context.close()
    assert noise == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), 130, 150, 20, size=(96, 72))
    file = write_report(run.results, candidates=3, progress=False)
    return file, data_of(file), run


@pytest.fixture(scope="module")
def lined(tmp_path_factory):
    """A report with lines, of a few small pictures and their real features."""
    root = tmp_path_factory.mktemp("lined")
    for part, count in (("query", 3), ("index", 5)):
        for i in range(count):
            write_picture(root / part / f"{i}.jpg", i, (200, 150))
        (root / f"{part}.txt").write_text("".join(f"{part}/{i}.jpg\n" for i in range(count)))
    places = np.arange(5)[:, None] * [100.0, 30.0]
    np.savez(root / "gt.npz", utmQ=places[:3], utmDb=places, posDistThr=25.0)
    for part in ("query", "index"):
        extract(SMALL, root / f"{part}.txt", root, root / part, device="cpu", progress=False)
    rerank(
        SMALL, root / "query.txt", root / "index.txt", root / "query", root / "index",
        dataset_root=root, ground_truth=root / "gt.npz", results_dir=root, device="cpu",
        progress=False,
    )  # fmt: skip
    file = write_report(root, device="cpu", progress=False)
    return file, data_of(file)


def data_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


def rows(page):
    """Return the queries that the table shows, by their place in the list."""
    return [int(q) for q in page.eval_on_selector_all("#rows tr", "e => e.map(r => r.dataset.q)")]


def all_rows(page):
    """Leaf through all pages."""
    found = rows(page)
    while page.locator("#page-next").is_visible() and page.locator("#page-next").is_enabled():
        page.click("#page-next")
        found += rows(page)
    return found


def wait_for_rows(page, count):
    from playwright.sync_api import expect

    expect(page.locator("#rows tr")).to_have_count(count)


def wait_until(page, condition):
    """Wait for JavaScript to be true; the page's policy lets Playwright wait for none by itself."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def close(page):
    page.keyboard.press("Escape")
    page.wait_for_selector("#rows a:focus")


def press_chip(page, letter):
    page.click(f'#filters button[data-status="{letter}"]')


def test_filters(show, made):
    file, data, _ = made
    page = show(file)
    counts = Counter(data["status"])
    assert min(counts[letter] for letter in WORDS) > 0
    for letter, word in WORDS.items():
        chip = page.locator(f'#filters button[data-status="{letter}"]')
        assert chip.inner_text().split() == [*word.split(), str(counts[letter])]
        press_chip(page, letter)
        assert chip.get_attribute("aria-pressed") == "true"
        found = all_rows(page)
        assert found == [q for q, status in enumerate(data["status"]) if status == letter]
        shown = {text.strip() for text in page.locator("#rows .status").all_inner_texts()}
        assert shown == {word}
        assert page.locator("#count").inner_text().startswith(f"{counts[letter]} quer")
        press_chip(page, letter)
    for letter in "wh":  # two at a time
        press_chip(page, letter)
    assert len(all_rows(page)) == counts["w"] + counts["h"]
    press_chip(page, "")
    assert sorted(all_rows(page)) == list(range(130))
    assert page.locator('#filters button[data-status=""]').get_attribute("aria-pressed") == "true"


def test_search(show, made):
    file, data, _ = made
    page = show(file)
    page.fill("#search", "QUERY/0004")
    wait_for_rows(page, 10)
    assert rows(page) == list(range(40, 50))
    press_chip(page, "r")
    assert rows(page) == [q for q in range(40, 50) if data["status"][q] == "r"]
    press_chip(page, "")
    page.fill("#search", data["names"][41])
    wait_for_rows(page, 1)
    assert rows(page) == [41]
    page.fill("#search", "no such name")
    page.wait_for_selector("#table", state="hidden")
    assert "No query is like that" in page.locator("#count").inner_text()
    page.fill("#search", "onerror=alert(1)")  # of a name that is no markup
    press_chip(page, "")
    wait_for_rows(page, 1)
    assert "</script><img" in page.locator("#rows a").inner_text()


@pytest.mark.parametrize("key", ["status", "before", "after", "score", "distance"])
def test_sort(show, made, key):
    file, data, _ = made
    page = show(file)
    last = 1e9  # no right candidate: behind all others
    values = {
        "status": ["hswrn".index(letter) for letter in data["status"]],
        "before": [rank or last for rank in data["before"]],
        "after": [rank or last for rank in data["after"]],
    }.get(key, data.get(key))
    header = page.locator(f'th[data-key="{key}"]')
    ways = set()
    for _ in range(2):
        header.locator("button").click()
        way = header.get_attribute("aria-sort")
        ways.add(way)
        found = [values[q] for q in all_rows(page)]
        assert found == sorted(values, reverse=way == "descending")
        assert page.locator("#head [aria-sort]").count() == 1
    assert ways == {"ascending", "descending"}
    # The select box, for narrow windows, says the same.
    assert page.locator("#sort").input_value().startswith(key)
    page.evaluate("document.getElementById('sort').value = 'place rising'")
    page.dispatch_event("#sort", "change")
    assert all_rows(page) == list(range(130))


def test_sort_by_name(show, made):
    file, data, _ = made
    page = show(file)
    page.click('th[data-key="name"] button')
    found = [
        data["names"][q] for q in all_rows(page) if re.fullmatch(r"query/\d+.jpg", data["names"][q])
    ]
    assert found == sorted(found)


def test_pages(show, made):
    file, _, _ = made
    page = show(file)
    assert rows(page) == list(range(50))
    assert page.locator("#page-previous").is_disabled()
    page.click("#page-last")
    assert rows(page) == list(range(100, 130))
    assert page.locator("#page-next").is_disabled()
    assert page.locator("#page-number").inner_text() == "Page 3 of 3"
    assert page.locator("#count").inner_text() == "130 queries, 101 to 130 shown"
    page.click("#page-first")
    assert rows(page) == list(range(50))


def test_click_a_query(show, made):
    file, data, run = made
    page = show(file)
    page.locator("#rows tr").nth(7).locator("td.state").click()
    assert page.locator("#detail").is_visible()
    assert page.url.endswith("#q=8")
    assert page.locator("#detail-title").inner_text() == data["names"][7]
    assert WORDS[data["status"][7]] in page.locator("#detail-status").inner_text()
    strips = page.locator(".strip")
    for strip, order in zip(
        (strips.nth(0), strips.nth(1)), (run.reranked, run.retrieved), strict=True
    ):
        cards = strip.locator(".card")
        names = [run.index.names[row] for row in order[7, :3]]
        assert [cards.nth(i).get_attribute("title") for i in range(3)] == names
        right = np.hypot(*(run.truth.utm_index[order[7, :3]] - run.truth.utm_queries[7]).T) <= 25
        marks = [cards.nth(i).locator(".mark").inner_text().strip() for i in range(3)]
        assert marks == ["right" if r else "wrong" for r in right]
    strips.nth(0).locator(".card").nth(1).click()
    assert re.search(r"#q=8&c=\d+$", page.url)
    chosen = page.locator('.card[aria-pressed="true"]')
    assert chosen.first.get_attribute("title") == run.index.names[run.reranked[7, 1]]
    assert run.index.names[run.reranked[7, 1]] in page.locator("#pair-candidate").inner_text()
    assert page.locator("#candidates tr.chosen").count() == 1
    # Scores of the table are those of the results.
    line = page.locator("#candidates tr.chosen td").all_inner_texts()
    place = list(run.retrieved[7]).index(run.reranked[7, 1])
    agree = [int(text.replace(",", "")) for text in line[5:8]]
    np.testing.assert_allclose(agree, -run.patch_scores[7, place] * data["patches"], atol=0.6)
    page.click("#detail-close")
    page.wait_for_selector("#rows a:focus")
    assert not page.locator("#detail").is_visible()
    assert "q=" not in page.url


def test_first_right_candidate_is_shown(show, made):
    file, data, _ = made
    q = next(i for i, rank in enumerate(data["before"]) if rank > 3)
    page = show(file, f"#q={q + 1}")
    ranks = page.locator(".strip").nth(1).locator(".rank").all_inner_texts()
    assert ranks == ["1", "2", "3", str(data["before"][q])]
    missed = next(i for i, s in enumerate(data["status"]) if s == "w" and not data["after"][i])
    page = show(file, f"#q={missed + 1}")
    ranks = page.locator(".strip").nth(0).locator(".rank").all_inner_texts()
    assert ranks == ["1", "2", "3", "not among 20"]


def paths(page):
    """Return the lines of each patch size that the page draws."""
    groups = page.locator("#pair g[data-size]").all()
    drawn = {int(g.get_attribute("data-size")): g.locator(".strokes") for g in groups}
    return [drawn[size].get_attribute("d") for size in sorted(drawn)]


def test_lines(show, lined):
    file, data = lined
    page = show(file, "#q=2")
    boxes = page.locator("#sizes input:not(#all-lines)")
    assert boxes.count() == 2
    few = sum(path.count("L") for path in paths(page))
    assert few == 15
    page.check("#all-lines")
    labels = page.locator("#sizes label").all_inner_texts()[:2]
    for size, label, path in zip(data["sizes"], labels, paths(page), strict=True):
        count = int(re.search(rf"size {size}: (\d+) of \d+ inliers", label)[1])
        assert path.count("L") == min(count, 60) > 3
        # All lines lead from the one picture to the other.
        ends = np.array(re.findall(r"-?[\d.]+", path), dtype=float).reshape(-1, 4)
        images = [page.locator("#pair image").nth(i) for i in range(2)]
        for image, part in zip(images, (ends[:, :2], ends[:, 2:]), strict=True):
            x, y, w, h = (
                float(image.get_attribute(name)) for name in ("x", "y", "width", "height")
            )
            assert (part >= [x - 0.1, y - 0.1]).all()
            assert (part <= [x + w + 0.1, y + h + 0.1]).all()
    group = page.locator(f'#pair g[data-size="{data["sizes"][0]}"]')
    assert group.is_visible()
    boxes.nth(0).uncheck()
    assert not group.is_visible()
    page.keyboard.press("ArrowRight")  # the choice stays
    assert page.locator("#detail-title").inner_text() == data["names"][2]
    assert not page.locator(f'#pair g[data-size="{data["sizes"][0]}"]').is_visible()
    page.locator(".card").last.click()
    assert "not in this report" in page.locator("#sizes").inner_text()


def test_keyboard_alone(show, made):
    file, data, _ = made
    page = show(file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "queries"
    seen = []
    while page.evaluate("document.activeElement.closest('#rows') === null"):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 5)"))
        assert len(seen) < 30
    assert seen[0].startswith("All")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#detail-title").inner_text() == data["names"][2]
    assert page.evaluate("document.activeElement.id") == "detail-title"
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() == data["names"][3]
    assert data["names"][3] in page.locator("#detail-says").text_content()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#detail-title").inner_text() == data["names"][1]
    for _ in range(40):  # the focus stays within
        page.keyboard.press("Tab")
        where = page.evaluate(
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
        assert where
    close(page)
    assert not page.locator("#detail").is_visible()
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#q=2"


def test_next_and_previous_keep_to_the_filter(show, made):
    file, data, _ = made
    page = show(file)
    press_chip(page, "h")
    hurt = [q for q, status in enumerate(data["status"]) if status == "h"]
    assert len(hurt) > 1
    page.locator("#rows a").first.click()
    assert page.locator("#detail-previous").is_disabled()
    assert page.locator("#detail-where").inner_text() == f"1 of {len(hurt)} chosen"
    page.keyboard.press("ArrowLeft")
    for q in hurt[1:]:
        page.click("#detail-next")
        assert page.locator("#detail-title").inner_text() == data["names"][q]
    assert page.locator("#detail-next").is_disabled()


def test_focus_returns_to_another_page_of_the_table(show, made):
    file, _, _ = made
    page = show(file, "#q=50")
    page.keyboard.press("ArrowRight")
    close(page)
    assert rows(page)[0] == 50
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#q=51"


def test_addresses(show, made):
    file, data, _ = made
    page = show(file, "#q=77&c=2")
    assert page.locator("#detail-title").inner_text() == data["names"][76]
    assert page.locator('.card[aria-pressed="true"]').first.get_attribute("data-candidate") == "1"
    for wrong in ("#q=0", "#q=131", "#q=x", "#nothing"):
        page = show(file, wrong)
        assert not page.locator("#detail").is_visible()
    page.locator("#rows a").nth(3).click()
    assert page.locator("#detail").is_visible()
    page.keyboard.press("ArrowRight")
    page.go_back()  # to the table, not from query to query
    page.wait_for_selector("#detail", state="hidden")
    assert page.url.split("#")[0] == file.as_uri()
    page.go_forward()
    page.wait_for_selector("#detail", state="visible")
    assert page.locator("#detail-title").inner_text() == data["names"][4]
    page = show(file, "#q=131")
    page.locator("#rows a").nth(3).click()
    page.go_back()
    page.wait_for_selector("#detail", state="hidden")
    assert page.url.endswith("#q=131")


def test_back_after_a_query_was_closed(show, made):
    file, _, _ = made
    page = show(file, "#before")
    for open_it in (
        lambda: page.locator("#rows a").nth(3).click(),
        lambda: page.locator("#rows .place").nth(5).click(),
    ):
        length = page.evaluate("history.length")
        for _ in range(3):
            open_it()
            page.wait_for_selector("#detail", state="visible")
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Escape")
            wait_until(page, "location.hash === '#before'")
            assert not page.locator("#detail").is_visible()
        assert page.evaluate("history.length") <= length + 1
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#q=7"
    page.go_forward()
    page.wait_for_selector("#detail", state="visible")
    page.keyboard.press("Escape")
    wait_until(page, "location.hash === '#before'")
    page = show(file, "#q=5")  # nothing to go back to
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.url.rstrip("#") == file.as_uri()


def test_opened_again_at_once(show, made):
    file, data, _ = made
    page = show(file)
    page.evaluate(
        """() => {
            const links = document.querySelectorAll("#rows a");
            links[3].click();
            document.getElementById("detail").close();  // its event comes later
            links[4].click();
        }"""
    )
    page.wait_for_timeout(300)
    assert page.locator("#detail").is_visible()
    assert page.locator("#detail-title").inner_text() == data["names"][4]
    page.evaluate(
        """() => {
            const detail = document.getElementById("detail");
            detail.close();
            document.querySelectorAll("#rows a")[5].click();
            detail.close();
        }"""
    )
    page.wait_for_timeout(300)
    assert not page.locator("#detail").is_visible()
    page.locator("#rows a").nth(6).click()
    assert page.locator("#detail-title").inner_text() == data["names"][6]


def test_opened_again_on_the_way_back(show, made):
    """The browser has not gone back to the table yet when the next query is asked for."""
    file, data, _ = made
    page = show(file)
    page.evaluate(
        """() => {
            const links = document.querySelectorAll("#rows a");
            const detail = document.getElementById("detail");
            detail.addEventListener("close", () => links[4].click(), { once: true });
            links[3].click();
            detail.close();
        }"""
    )
    page.wait_for_selector("#detail", state="visible")
    page.wait_for_timeout(300)
    assert page.locator("#detail-title").inner_text() == data["names"][4]
    page.go_back()
    page.wait_for_selector("#detail", state="hidden")
    assert page.url.split("#")[0] == file.as_uri()


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_tables_are_whole(show, made, viewport):
    """Nothing has to be scrolled to the side, and every number stands by its name."""
    file, data, _ = made
    page = show(file, viewport=viewport)
    tables = page.locator("table.numbers")
    assert tables.count() == 4  # recalls, thresholds, usual scores; candidates are hidden
    page.locator("#rows a").nth(2).click()
    for table in tables.all():
        box = table.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= viewport["width"]
        assert table.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    # The rightmost edge of each number is in the window, too.
    edges = (
        "e => Math.max(...[...e.querySelectorAll('td')].map(c => c.getBoundingClientRect().right))"
    )
    assert all(table.evaluate(edges) <= viewport["width"] for table in tables.all())
    named = page.locator("#candidates td >> nth=0").evaluate(
        "e => getComputedStyle(e, '::before').content"
    )
    assert (named == '"After"') == (viewport is NARROW)
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() == data["names"][3]


def test_captions_stand_above_their_pictures(show, lined):
    for viewport in (WIDE, NARROW):
        page = show(lined[0], "#q=2", viewport)
        images = page.locator("#pair image")
        for i, caption in enumerate(("#pair-query", "#pair-candidate")):
            text, image = page.locator(caption).bounding_box(), images.nth(i).bounding_box()
            assert text["y"] + text["height"] <= image["y"] + 1
            assert image["y"] - text["y"] < 120
        card = page.locator(".card").first
        says = card.locator(".away").bounding_box()
        assert says["y"] + says["height"] <= card.locator(".picture").bounding_box()["y"] + 1
    # A window that grows puts the caption back.
    page.set_viewport_size(WIDE)
    page.wait_for_timeout(200)
    assert page.locator("#pair-text #pair-candidate").count() == 1


def test_answers_without_ground_truth(show, tmp_path):
    """The page begins with them, several a query, each below its name and its score."""
    run = make_run(tmp_path, 12, 20, 6, truth=False, size=(64, 48), nasty=False)
    file = write_report(run.results, candidates=4, progress=False)
    for viewport in (WIDE, NARROW):
        page = show(file, viewport=viewport)
        assert page.locator("main h2:visible").first.inner_text() == "Answers"
        for q in (0, 11):
            answers = page.locator(f'tr[data-q="{q}"] .answers li')
            names = [answers.nth(i).get_attribute("title") for i in range(answers.count())]
            assert names == [run.index.names[row] for row in run.reranked[q, :4]]
            assert answers.locator("img").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        first = page.locator('tr[data-q="0"] .answers li').first
        assert first.locator(".name").bounding_box()["y"] < first.locator("img").bounding_box()["y"]


def test_one_colour_a_method(show, made):
    for scheme in ("light", "dark"):
        page = show(made[0], color_scheme=scheme)
        style = "getComputedStyle(document.documentElement).getPropertyValue"
        found = [page.evaluate(f"{style}('--{name}').trim()") for name in ("before", "after")]
        assert found == list(METHODS.values())
        stroke = page.locator(".chart path.line.after").first.evaluate(
            "e => getComputedStyle(e).stroke"
        )
        assert stroke == "rgb(0, 114, 178)"


def test_map(show, made):
    file, data, _ = made
    page = show(file)
    box = page.locator("#map-canvas").bounding_box()
    says = page.locator("#map-says")
    idle = says.inner_text()
    page.locator("#map-canvas").scroll_into_view_if_needed()
    box = page.locator("#map-canvas").bounding_box()
    for x in np.linspace(box["x"] + 20, box["x"] + box["width"] - 20, 40):
        for y in np.linspace(box["y"] + 20, box["y"] + box["height"] - 20, 12):
            page.mouse.move(x, y)
            if says.inner_text() != idle:
                break
        if says.inner_text() != idle:
            break
    name = says.inner_text().rsplit(": ", 1)[0].split(": right")[0].split(": no answer")[0]
    q = data["names"].index(name.split(": ")[0])
    page.mouse.click(x, y)
    assert page.locator("#detail-title").inner_text() == data["names"][q]
    close(page)

    def ink():
        picture = Image.open(io.BytesIO(page.locator("#map-canvas").screenshot()))
        return int((np.asarray(picture.convert("RGB")).sum(axis=2) < 600).sum())

    page.mouse.move(1, 1)
    page.wait_for_timeout(100)
    whole = ink()
    assert whole > 300
    press_chip(page, "h")  # the others fade
    page.wait_for_timeout(100)
    assert 0 < ink() < whole
    press_chip(page, "")
    page.click("#map-in")
    page.click("#map-in")
    page.wait_for_timeout(100)
    assert ink() != whole
    page.click("#map-all")
    page.wait_for_timeout(100)
    assert ink() == whole


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_fits_the_window(show, lined, made, viewport, scheme):
    for file, *_ in (lined, made):
        page = show(file, viewport=viewport, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        page.locator("#rows a").nth(1).click()
        inside = "document.getElementById('detail-body')"
        assert page.evaluate(f"{inside}.scrollWidth <= {inside}.clientWidth")
        box = page.locator("#detail").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= viewport["width"]
        images = page.locator("#pair image")
        one, two = images.nth(0).bounding_box(), images.nth(1).bounding_box()
        if viewport is NARROW:
            assert two["y"] >= one["y"] + one["height"]
        else:
            assert two["x"] >= one["x"] + one["width"]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return parse(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.disabled || e.closest('script, style')) continue;
    const style = getComputedStyle(e);
    const svg = e instanceof SVGElement;
    if (svg && e.tagName !== 'text') continue;
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 30)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(show, made, scheme):
    """All text has the contrast 4.5 that WCAG asks for at level AA."""
    page = show(made[0], color_scheme=scheme)
    page.click(".provenance summary")
    press_chip(page, "w")
    press_chip(page, "h")
    page.wait_for_timeout(300)  # colours fade in
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:5]
    page.locator("#rows a").first.click()
    page.wait_for_timeout(300)
    found = page.evaluate(CONTRAST)
    assert found[0][0] >= 4.5, found[:5]


def test_names_for_screen_readers(show, made):
    page = show(made[0])
    page.locator("#rows a").first.click()
    unnamed = page.evaluate(
        """() => {
          const kinds = 'button, input, select, a, [role=region], [role=img]';
          const named = (e) => e.ariaLabel || e.hasAttribute('aria-labelledby')
            || e.textContent.trim() || e.closest('label') || e.querySelector('title');
          return [...document.querySelectorAll(kinds)]
            .filter((e) => e.checkVisibility() && !named(e)).map((e) => e.outerHTML); }"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.images].every((e) => e.hasAttribute('alt'))")
    close(page)
    for viewport in (WIDE, NARROW):  # also where rows look like cards
        page.set_viewport_size(viewport)
        tree = page.locator("#table").aria_snapshot()
        assert len(re.findall(r"- '?row ", tree)) >= 50
        assert len(re.findall(r"- '?rowheader ", tree)) == 50
        assert len(re.findall(r"- '?cell ", tree)) >= 50 * 5


def test_without_javascript(show, made):
    page = show(made[0], java_script_enabled=False)
    assert page.locator(".chart svg").first.is_visible()
    assert "needs JavaScript" in page.locator("#queries").inner_text()
    assert not page.locator("#toolbar").is_visible()


def test_nothing_else_can_run(show, made):
    """The policy of the page stops what is not its own script."""
    page = show(made[0])
    ran = page.evaluate(
        """() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';
        const stop = new Promise((r) => document.addEventListener(
          'securitypolicyviolation', (e) => r(e.violatedDirective)));
        document.body.append(s); return stop; }"""
    )
    assert ran.startswith("script-src")
    assert page.evaluate("window.ran") is None
    assert len(show.noise) == 1
    assert "Content Security Policy" in show.noise.pop()  # Chromium says what it stopped


def test_the_folder_of_all_names_is_said_once(show, tmp_path):
    run = make_run(tmp_path, 12, 20, 5, size=(64, 48), nasty=False)
    for part in ("query", "index"):
        lines = (tmp_path / f"{part}.txt").read_text().splitlines()
        (tmp_path / f"{part}.txt").write_text("".join(f"{tmp_path}/{line}\n" for line in lines))
    lists = {f"{part}_list": tmp_path / f"{part}.txt" for part in ("query", "index")}
    page = show(write_report(run.results, **lists, progress=False))
    assert page.locator(".prefix").inner_text() == f"Names are below {tmp_path}/"
    assert page.locator("#rows a").first.inner_text() == "query/00000.jpg"
    assert page.locator("#rows a").first.get_attribute("title") == f"{tmp_path}/query/00000.jpg"
    page.fill("#search", f"{tmp_path}/query/00003.jpg")  # a name as it stands in the list
    wait_for_rows(page, 1)
    assert rows(page) == [3]


def test_print(show, made):
    page = show(made[0])
    page.emulate_media(media="print")
    assert not page.locator("#toolbar").is_visible()
    assert page.locator("#table").is_visible()
    assert len(page.pdf()) > 10_000


@pytest.mark.parametrize("kind", ["truth", "patches", "record"])
def test_results_that_lack_something(show, tmp_path, kind):
    run = make_run(
        tmp_path, 12, 20, 5, truth=kind != "truth", patches=kind != "patches", size=(64, 48)
    )
    if kind == "record":
        (run.results / "run.json").unlink()
        file = write_report(
            run.results, query_list=tmp_path / "query.txt", index_list=tmp_path / "index.txt",
            progress=False,
        )  # fmt: skip
    else:
        file = write_report(run.results, progress=False)
    page = show(file)
    assert len(rows(page)) == 12
    for chip in page.locator("#filters button").all():
        chip.click()
    page.locator("#filters button").first.click()
    for button in page.locator("#head button").all():
        button.click()
        button.click()
        assert len(rows(page)) == 12
    page.locator("#rows a").first.click()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    for card in page.locator(".card").all():
        card.click()
    assert page.locator("#detail").is_visible()
    # What no picture has, says so.
    shutil.rmtree(tmp_path / "query")
    file = write_report(replace(run).results, progress=False) if kind != "record" else file
    page = show(file, "#q=1")
    if kind != "record":
        assert "no picture" in page.locator("#pair").text_content()


def opening_time(show, file):
    """Return a page, and the seconds until it shows the first queries with their pictures."""
    start = time.perf_counter()
    page = show(file)
    page.wait_for_selector("#rows img >> nth=60")
    return page, time.perf_counter() - start


def test_opens_at_once(show, made):
    assert opening_time(show, made[0])[1] < 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_seven_thousand_queries(show, tmp_path):
    """Opens in 3 s, is under 60 MB, and answers at once."""
    run = make_run(tmp_path, 7000, 10_000, 100, size=(320, 240), nasty=False)
    file = write_report(run.results, progress=False)
    assert file.stat().st_size < 60e6
    page, seconds = opening_time(show, file)
    print(f"{file.stat().st_size / 1e6:.1f} MB open in {seconds:.2f} s")
    assert seconds < 3
    for work in (
        lambda: press_chip(page, "h"),
        lambda: press_chip(page, ""),
        lambda: page.click('th[data-key="distance"] button'),
        lambda: page.click("#page-last"),
        lambda: page.locator("#rows a").last.click(),
        lambda: page.keyboard.press("ArrowLeft"),
    ):
        start = time.perf_counter()
        work()
        page.evaluate("new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")
        print(f"{time.perf_counter() - start:.3f} s")
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_comparison_of_runs(show, tmp_path, viewport):
    """Step through the queries on which runs differ, with buttons and keys."""
    run = make_run(tmp_path / "run", 30, 20, 8, size=(64, 48), nasty=False)
    np.save(tmp_path / "first.npy", run.retrieved)
    np.save(tmp_path / "worse.npy", run.retrieved[:, ::-1])
    names = {"first": tmp_path / "first.npy", "patches": run.results}
    found = compare({**names, f"a long name {'x' * 60}": tmp_path / "worse.npy"}, tmp_path / "out")
    page = show(tmp_path / "out" / "comparison.html", viewport=viewport)
    page.select_option("#after", "1")
    before, after = found.hits[0, :, 0], found.hits[1, :, 0]
    won = np.flatnonzero(after & ~before)
    lost = np.flatnonzero(before & ~after)
    where = page.locator("#where")
    assert where.inner_text() == f"1 of {len(won) + len(lost)}"
    assert page.locator("#previous").is_disabled()
    page.click("text=Only patches is right")
    assert where.inner_text() == f"1 of {len(won)}"
    page.keyboard.press("ArrowRight")
    page.click("#next")
    page.keyboard.press("ArrowLeft")
    assert where.inner_text() == f"2 of {len(won)}"
    figures = page.locator("#answers figure")
    assert figures.count() == 4
    name = run.queries.names[won[1]]
    assert figures.nth(0).locator("small").inner_text() == name.removeprefix(
        json.loads(page.locator("#data").text_content())["prefix"]
    )
    marks = page.locator("#answers .mark").all_inner_texts()
    assert [mark.strip() for mark in marks[:2]] == ["wrong", "right"]
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("#answers img").evaluate_all(loaded)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
