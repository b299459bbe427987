"""The page of `threetowers explore` in a real browser: by mouse, by keyboard alone, on a phone, in the dark."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from kit.explored import SCRIPT, explored_runs, png
from threetowers.explore.listen import Listener
from threetowers.explore.server import application
from threetowers.explore.start import open_runs

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
Page = Any


@pytest.fixture(scope="module")
def runs(photos: Path, timm_tower: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return explored_runs(tmp_path_factory.mktemp("browsed"), photos, timm_tower)


@pytest.fixture(scope="module")
def address(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in this process, on images of which one has a caption that tries to be markup."""
    data = tmp_path_factory.mktemp("data")
    for name, colour in (("a", "red"), ("b", "lime"), ("c", "blue"), ("d", "yellow"), ("e", "orange")):
        (data / f"{name}.png").write_bytes(png(colour))
        (data / f"{name}.txt").write_text(SCRIPT if name == "a" else f"a {colour} square")
    explorer = open_runs([runs["baseline"], runs["3t"]], str(data), "cpu")
    ports: Queue[int] = Queue()
    server = Listener(application(explorer, list(runs.values())), "127.0.0.1", 0, ports.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{ports.get(timeout=60)}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed under one of the names {', '.join(NAMES)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    yield from opened(browser, address, viewport={"width": 1280, "height": 860})


def opened(browser: Any, address: str, **options: Any) -> Iterator[Page]:
    """The page, with a first search done; fails for what the browser complains about, the policy included."""
    context = browser.new_context(**options)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#results .thumb")
    yield page
    assert [
        text for text in said if "status of 422" not in text
    ] == []  # a refused upload, which one test makes
    assert all(url.startswith((address, "blob:")) for url in asked), "it works offline"
    assert page.title() == "Three Towers: explore", "no caption was run"
    context.close()


def images(page: Page, column: int) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        f"#results .column:nth-child({column}) .thumb", "all => all.map(each => each.dataset.image)"
    )
    return found


def settled(page: Page, script: str) -> None:
    """Waits until an expression is true; the browser's own way of waiting needs what the policy forbids."""
    until = time.monotonic() + 15
    while not page.evaluate(script):
        assert time.monotonic() < until, script
        page.wait_for_timeout(50)


def test_search_by_text_and_by_an_image_of_the_results(page: Page) -> None:
    page.fill("#text", "a lime square")
    page.click("#search-form .primary")
    settled(page, "document.querySelectorAll('#results .right').length === 2")
    assert page.locator("#results .column").count() == 2
    assert len(images(page, 1)) == 5
    page.click("#results .column:first-child .picture")
    page.wait_for_selector("#chosen img")
    settled(page, "document.querySelectorAll('#results .column:first-child .thumb').length === 4")
    page.check("input[value=captions]")
    page.wait_for_selector("#results .texts li")
    assert SCRIPT in page.text_content("#results"), "a caption is text, whatever it holds"
    assert page.locator("#results script, #results img[src=x]").count() == 0


def test_the_slider_ranks_again_as_it_moves(page: Page) -> None:
    before = [images(page, column) for column in (1, 2)]
    scores = page.text_content("#results .column:nth-child(2) .score")
    page.evaluate(
        "() => { const s = document.getElementById('alpha'); for (let v = 0; v <= 100; v++) {"
        " s.value = v / 100; s.dispatchEvent(new Event('input')); } }"
    )
    settled(page, "document.querySelector('#results .column:nth-child(2) .weight').textContent === 'α 1.00'")
    assert page.text_content("#alpha-value") == "1.00"
    assert images(page, 1) == before[0], "the baseline has no third tower"
    assert page.text_content("#results .column:nth-child(2) .score") != scores


def test_an_own_image_by_the_button_and_by_drag_and_drop(page: Page, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(png("lime"))
    page.set_input_files("#file", tmp_path / "own.png")
    page.wait_for_selector("#chosen img[src^='blob:']")
    page.wait_for_selector("#results .texts li")
    page.click("#chosen button")
    assert page.locator("#chosen").is_hidden()
    page.evaluate(
        """async () => {
          const file = new File([await (await fetch('/image/1')).blob()], 'dropped.png', { type: 'image/png' });
          const data = new DataTransfer(); data.items.add(file);
          for (const type of ['dragenter', 'dragover', 'drop'])
            window.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    page.wait_for_selector("#results .texts li")
    assert page.locator("#drop").is_hidden()
    (tmp_path / "none.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "none.png")
    page.wait_for_selector("#status.wrong")
    assert "not an image" in page.text_content("#status")


def test_what_is_found_goes_by_what_is_looked_for(page: Page, tmp_path: Path) -> None:
    """A text finds images and an image finds both, whatever came before; each keeps what a person chose for it."""
    (tmp_path / "own.png").write_bytes(png("lime"))

    def found() -> list[Any]:
        chosen = page.get_attribute("input[name=want]:checked", "value")
        visible = [
            page.locator(f"#results .column:first-child .{kind}").is_visible() for kind in ("thumbs", "texts")
        ]
        return [page.text_content("#want-label"), chosen, *visible]

    def look_for_text() -> list[Any]:
        page.fill("#text", "a blue square")
        page.click("#search-form .primary")
        settled(page, "document.querySelectorAll('#results .right').length === 2")
        return found()

    def look_for_image() -> list[Any]:
        page.set_input_files("#file", tmp_path / "own.png")
        page.wait_for_selector("#results .texts li")
        return found()

    assert look_for_text() == ["A text finds", "images", True, False]
    assert look_for_image() == ["An image finds", "both", True, True]
    assert "images and" in page.text_content("#status") and "nearest captions" in page.text_content("#status")
    assert look_for_text() == ["A text finds", "images", True, False]
    look_for_image()
    page.check("input[value=captions]")
    settled(page, "document.querySelector('#results .images').hidden")
    assert look_for_text() == ["A text finds", "images", True, False]
    assert look_for_image() == ["An image finds", "captions", False, True]


def test_classes_that_are_typed_in(page: Page, tmp_path: Path) -> None:
    page.click("#tab-classes")
    page.fill("#names", "red, lime\nblue")
    page.click("#templates button:last-child")
    page.wait_for_selector(".class")
    assert page.input_value("#template") == "{}"
    assert "none of these" in page.text_content("#classes")
    page.fill("#template", "a {} square")
    page.click("#classes-form .primary")
    page.wait_for_selector(".class")
    assert page.locator(".class").count() == 6
    counts = [int(text) for text in page.locator(".column:first-child h4 small").all_text_contents()]
    assert sum(counts) == 5
    (tmp_path / "own.png").write_bytes(png("blue"))
    page.set_input_files("#file", tmp_path / "own.png")
    page.wait_for_selector(".own td.best")
    assert page.locator(".own tbody tr").count() == 3


def test_similarities_of_pinned_images(page: Page) -> None:
    page.hover("#results .column:first-child .thumb:first-child")
    pin = page.locator("#results .column:first-child .thumb:first-child .pin")
    assert pin.text_content() == "Pin"
    pin.click()
    assert pin.text_content() == "Pinned" and pin.get_attribute("aria-pressed") == "true"
    page.click("#tab-matrix")
    page.wait_for_selector(".heat")
    assert page.locator(".heat").count() == 2 and page.locator("#pins img").count() == 1
    lines = page.input_value("#matrix-texts").splitlines()
    assert page.locator(".heat").first.locator(".cell").count() == len(lines)
    page.click("#pins button")
    assert page.locator("#pins img").count() == 0


def test_the_map_zooms_hovers_and_searches(page: Page) -> None:
    page.click("#tab-map")
    settled(page, "document.getElementById('status').textContent.includes('points')")
    page.select_option("#map-column", "1")
    settled(page, "!document.getElementById('map-system').disabled")
    page.select_option("#map-system", "third")
    settled(page, "document.getElementById('status').textContent.includes('points')")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    page.click("#zoom-all")
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#spot img")
    spot = page.locator("#spot").bounding_box()
    assert box["x"] <= spot["x"] and spot["x"] + spot["width"] <= box["x"] + box["width"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#results li")
    assert page.get_attribute("#tab-search", "aria-selected") == "true"


def test_the_map_stays_whole_when_the_window_changes(page: Page) -> None:
    """As much is seen at another width: dots are painted, and none of them at the edges."""
    page.click("#tab-map")
    settled(page, "document.getElementById('status').textContent.includes('points')")
    for width in (400, 1280, 330):
        page.set_viewport_size({"width": width, "height": 860})
        page.wait_for_timeout(300)
        edge, inside = page.evaluate(
            """() => {
              const canvas = document.getElementById('canvas'), [w, h] = [canvas.width, canvas.height];
              const read = new OffscreenCanvas(w, h).getContext('2d', { willReadFrequently: true });
              read.drawImage(canvas, 0, 0);
              const painted = (...box) => read.getImageData(...box).data.filter((v, i) => i % 4 === 3 && v).length;
              return [painted(0, 0, w, 10) + painted(0, h - 10, w, 10) + painted(0, 0, 10, h)
                + painted(w - 10, 0, 10, h), painted(0, 0, w, h)];
            }"""
        )
        assert edge == 0 < inside, width


@pytest.mark.parametrize("touch", [False, True])
def test_captions_and_pins_are_seen_without_pointing(browser: Any, address: str, touch: bool) -> None:
    for page in opened(
        browser, address, viewport={"width": 400, "height": 860}, has_touch=touch, is_mobile=touch
    ):
        thumb = page.locator("#results .column:last-child .thumb").last
        assert thumb.locator(".words").is_visible() and thumb.locator(".words").text_content()
        opacity = thumb.locator(".pin").evaluate("pin => getComputedStyle(pin).opacity")
        assert opacity == "1" if touch else opacity == "0"


@pytest.mark.parametrize("width", [700, 1280])
def test_answers_beside_each_other_begin_at_one_height(browser: Any, address: str, width: int) -> None:
    """Also where the name of one run takes several lines."""
    for page in opened(browser, address, viewport={"width": width, "height": 860}):
        page.evaluate("document.querySelector('#results h3').append(' name'.repeat(30))")
        tops = page.eval_on_selector_all(
            "#results .thumbs", "all => all.map(each => each.getBoundingClientRect().top)"
        )
        assert len(tops) == 2 and len(set(tops)) == 1
        assert [text[:1] for text in page.locator("#results .head small").all_text_contents()] == ["t", "α"]


def test_curves_follow_a_run(page: Page, runs: dict[str, Path]) -> None:
    page.click("#tab-curves")
    page.wait_for_selector("#plots path")
    assert "step 7 of 6" in page.text_content("#legend")
    finished = page.locator("#legend li").nth(2).text_content() or ""
    assert finished.startswith("3T (") and finished.endswith(") 3t, finished, 6 steps"), (
        "the folder comes second"
    )
    path = runs["begun"] / "metrics.jsonl"
    before = path.read_text()
    try:
        with path.open("a") as file:
            file.write('ss": 1}\n{"step": 9, "train/loss": 1.5}\n')
        settled(page, "document.getElementById('legend').textContent.includes('step 9 of 6')")
    finally:
        path.write_text(before)


def test_by_keyboard_alone(page: Page) -> None:
    """Tab, arrow keys, Enter and typing reach every view, and the focus can always be seen."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-search"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "alpha"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    settled(page, "document.querySelector('#results .weight').textContent === 'α 1.00'")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Control+a")
    page.keyboard.type("a blue square")
    page.keyboard.press("Enter")
    settled(page, "document.querySelectorAll('#results .right').length === 2")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('picture')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert "Search with this image" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.focus("#tab-search")
    for name in ("classes", "matrix", "map", "curves"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.locator(f"#{name}").is_visible()
    page.keyboard.press("Home")
    assert page.locator("#search").is_visible()


def test_everything_has_a_name(page: Page) -> None:
    """What can be operated has a label for screen readers, and images have an alternative text."""
    for name in ("search", "classes", "matrix", "map", "curves"):
        page.click(f"#tab-{name}")
        time.sleep(0.3)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, textarea, canvas, svg[role=img]')]
              .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))
              .map((e) => e.outerHTML)"""
        )
        assert nameless == []
        assert page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_do_not_scroll_sideways(browser: Any, address: str, width: int) -> None:
    for page in opened(
        browser, address, viewport={"width": width, "height": 800}, has_touch=True, is_mobile=True
    ):
        for name in ("search", "classes", "matrix", "map", "curves"):
            page.click(f"#tab-{name}")
            time.sleep(0.3)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")])
def test_light_and_dark(browser: Any, address: str, scheme: str, paper: str) -> None:
    for page in opened(browser, address, color_scheme=scheme):
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper


def test_a_page_of_another_origin_learns_nothing(browser: Any, address: str) -> None:
    """It can neither read an answer, nor show an image, nor be given one in a frame."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address.replace("127.0.0.1", "localhost") + "/nowhere")
    found = page.evaluate(
        """async (address) => {
          const read = await fetch(address + '/api/about').then(() => 'read', () => 'refused');
          const sent = await fetch(address + '/api/upload', { method: 'POST', body: 'x', mode: 'no-cors' }).then(
            () => 'sent', () => 'refused');
          return [read, sent];
        }""",
        address,
    )
    assert found[0] == "refused"
    context.close()
