"""The page and the pictures: structure, escaping, independence of anything outside, and a real browser."""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from weft.measure import Latency, LayerRow, Timing
from weft.report.page import render_page
from weft.report.picture import KINDS, describe, draw_svg, write_picture
from weft.report.report import Report
from weft.structures.base import Cost, Rectangle
from weft.structures.low_rank import LowRank

HOSTILE = "<script>alert('a&b')</script>\"'"
SVG = "{http://www.w3.org/2000/svg}"


def picture_json(*blocks: Rectangle) -> list[dict[str, Any]]:
    return [vars(block) for block in blocks]


LAYERS = [
    LayerRow(
        "stem.convolution",
        "LowRank(rank=3)",
        (8, 3, 3, 3),
        Cost(216, 864, 216),
        Cost(105, 420, 105),
        picture_json(Rectangle(0, 0, 8, 27, "low_rank", "3")),
    ),
    LayerRow(
        HOSTILE,
        f"Hostile({HOSTILE})",
        (64, 64),
        Cost(4096, 16384, 4096),
        Cost(1536, 6144, 1536),
        picture_json(Rectangle(0, 0, 32, 32), Rectangle(32, 0, 32, 32, "low_rank", HOSTILE)),
    ),
    LayerRow(
        "head",
        "Product(factors=2)",
        (10, 64),
        Cost(640, 2560, 640),
        Cost(200, 1000, 200),
        picture_json(
            Rectangle(0, 0, 10, 10, "sparse", factor=1), Rectangle(0, 0, 10, 64, "coded", "4 bits", factor=2)
        ),
    ),
]
LATENCIES = [
    Latency(1, 1, Timing(4e-4, 3e-4, 6e-4, 900), Timing(2e-4, 1.8e-4, 2.5e-4, 900)),
    Latency(128, 2, Timing(8e-3, 7e-3, 9e-3, 90), Timing(8.5e-3, 7.5e-3, 9.5e-3, 90)),
    Latency(256, 2, Timing(1e-2, 0.9e-2, 1.1e-2, 90), Timing(1.5e-2, 1.4e-2, 1.6e-2, 90)),
]
REPORT = Report(
    metric="accuracy",
    dense_value=0.9172,
    value=0.9104,
    dense_cost=Cost(6000, 24_000, 50_000),
    cost=Cost(2000, 8000, 20_000),
    latencies=LATENCIES,
    layers=LAYERS,
    environment={"processor": "a <fast> one", "torch": "2.13.0"},
)
LOG = [
    {"layer": "stem.convolution", "error": 0.1234, "seconds": 0.1},
    {"layer": HOSTILE, "error": 0.5, "seconds": 0.1},
    *({"step": step, "epoch": 0, "loss": 2.0 / (1 + step), "seconds": 0.1 * step} for step in range(900)),
]


PARETO = {
    "cost": "multiply_adds",
    "dense": 1000,
    "curves": {
        "all": [[100, 2.0], [300, 0.2], [600, 0.02], [1000, 0.0]],
        "LowRank": [[150, 2.5], [500, 0.3], [1000, 0.0]],
        HOSTILE: [[100, 2.0], [900, 0.5]],
        "Nothing": [[1000, 0.0]],
    },
    "chosen": [300, 0.2],
}


class Page(HTMLParser):
    """Reads a page: checks that its elements are balanced and keeps what the tests ask about."""

    VOID = ("meta", "link", "input", "br", "wbr")
    DRAWN = ("rect", "path", "polyline", "polygon")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.DRAWN
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.open[-1] if self.open else "", []).append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(name="source", scope="module")
def _source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    written = REPORT.write_html(
        path,
        title=f"A title {HOSTILE}",
        command="weft demo --out 'a <b>'",
        asked="bytes=0.25 & more",
        log=LOG,
        pareto=PARETO,
    )
    assert written == path
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_section(source: str) -> None:
    page = Page(source)
    assert page.texts["h2"] == [
        "Latencies",
        "Layers",
        "What each family can reach",
        "Training",
        "To repeat it",
    ]
    assert f"A title {HOSTILE}" in page.texts["h1"]
    assert page.texts["code"] == ["weft demo --out 'a <b>'"]
    assert "bytes=0.25 & more" in page.texts["p"]
    assert "a <fast> one" in page.texts["dd"]
    for row in REPORT.rows():
        assert row[0] in page.texts["th"]
        assert set(row[1:]) <= set(page.texts["td"])


def test_names_are_escaped_everywhere(source: str) -> None:
    page = Page(source)
    assert HOSTILE not in source
    assert len(page.named("script")) == 1  # the page's own
    assert HOSTILE in page.texts["span"]
    assert f"Hostile({HOSTILE})" in page.texts["td"]
    assert HOSTILE in page.texts["title"] or HOSTILE in page.texts["text"]  # the block's label


def test_nothing_is_fetched_from_elsewhere(source: str) -> None:
    page = Page(source)
    assert not re.findall(r"(?:https?:|file:|ftp:)?//[\w.]", source)
    assert not re.findall(r"url\(|@import|@font-face|fetch\(|XMLHttpRequest", source)
    addresses = [
        attributes[key]
        for _, attributes in page.elements
        for key in ("src", "href", "data", "action", "srcset")
        if key in attributes
    ]
    assert addresses == ["data:,"]
    policy = next(meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_latencies_say_only_what_the_spread_supports(source: str) -> None:
    notes = Page(source).texts["span"]
    assert "2.00 times as fast" in notes
    assert "no clear difference: within the spread" in notes
    assert "slower: 1.50 times the dense time" in notes


def test_bars_are_in_proportion(source: str) -> None:
    bars = [
        float(str(rect["width"]))
        for rect in Page(source).named("rect")
        if rect.get("x") == "0" and rect.get("y") == "3"
    ]
    ratios = [compressed / dense for dense, compressed in zip(bars[::2], bars[1::2], strict=True)]
    assert ratios == pytest.approx([0.5, 8.5 / 8, 1.5], rel=1e-3)


def test_errors_come_from_the_log(source: str) -> None:
    cells = Page(source).texts["td"]
    assert "0.1234" in cells
    assert "0.5000" in cells
    assert "relative error" in source
    assert "relative error" not in render_page(REPORT.to_json(), REPORT.rows(), title="without a log")


def test_long_training_is_drawn_with_few_points(source: str) -> None:
    curve = Page(source).named("polyline")[-1]
    points = [tuple(map(float, point.split(","))) for point in str(curve["points"]).split()]
    assert 100 <= len(points) <= 400
    assert points[0][0] == 0
    assert points[-1][0] == 100
    heights = [height for _, height in points]
    assert heights == sorted(heights)  # a falling loss goes down the page
    assert "on a logarithmic scale" in source


def test_every_familys_curve_is_drawn_with_the_plans_point_on_it(source: str) -> None:
    page = Page(source)
    lines = {}
    for line in page.named("polyline"):
        _, *kind = str(line["class"]).split()
        if kind:
            points = str(line["points"]).split()
            lines[kind[0]] = [tuple(map(float, point.split(","))) for point in points]
    assert len(lines) == 3  # nothing can be drawn of a family that never loses
    for points in lines.values():
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in points)
        assert points == sorted(points)  # falling losses go down the page
    best = lines["all"]
    assert best[0] == (0.0, pytest.approx(100 * math.log(2.5 / 2.0) / math.log(2.5 / 0.02), abs=0.01))
    chosen = next(span for span in page.named("span") if span.get("class") == "chosen")
    assert f"left: {best[1][0]}%; top: {best[1][1]}%" == chosen["style"]
    assert "30.0 % of the multiply-adds" in source
    assert {"all families together", "LowRank", HOSTILE, "the plan"} <= set(page.texts["li"])


def test_curves_without_a_loss_are_left_out(tmp_path: Path) -> None:
    bare = {"cost": "bytes", "dense": 10, "curves": {"all": [[10, 0.0]]}, "chosen": [10, 0.0]}
    page = Page(REPORT.write_html(tmp_path / "page.html", pareto=bare).read_text(encoding="utf-8"))
    assert "What each family can reach" not in page.texts["h2"]
    single = {"cost": "bytes", "dense": 10, "curves": {"all": [[5, 1.0]]}, "chosen": [5, 1.0]}
    page = Page(REPORT.write_html(tmp_path / "page.html", pareto=single).read_text(encoding="utf-8"))
    assert "What each family can reach" in page.texts["h2"]


def test_metric_and_size_have_curves_of_their_own_where_they_change(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1 / (step + 1), "size": 100 - step // 4} for step in range(8)]
    log += [{"step": 8, "metric": value} for value in (0.5, float("nan"), 0.9)]
    source = REPORT.write_html(tmp_path / "page.html", log=log).read_text(encoding="utf-8")
    assert len(Page(source).named("polyline")) == 3
    assert "Metric over 2 epochs: 0.5 at the first, 0.9 on average" in source
    assert "Size in bytes over 8 steps" in source
    same = [{**entry, "size": 100} for entry in log if "loss" in entry]
    assert len(Page(REPORT.write_html(tmp_path / "page.html", log=same).read_text()).named("polyline")) == 1


def test_a_page_without_layers_latencies_and_log_is_whole(tmp_path: Path) -> None:
    bare = Report("accuracy", 0.0, float("nan"), Cost(), Cost(), [], [], {})
    page = Page(bare.write_html(tmp_path / "bare.html").read_text(encoding="utf-8"))
    assert page.texts["h2"] == ["Layers", "To repeat it"]
    assert any("No layer is structured" in text for text in page.texts["p"])


@pytest.mark.parametrize(
    ("losses", "drawn"), [([], 0), ([1.0], 0), ([1.0, 1.0], 1), ([0.0, 1e-9], 1), ([-1.0, 5.0, 2.0], 1)]
)
def test_any_curve_can_be_drawn(tmp_path: Path, losses: list[float], drawn: int) -> None:
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    page = Page(REPORT.write_html(tmp_path / "page.html", log=log).read_text(encoding="utf-8"))
    assert len(page.named("polyline")) == drawn


# -- pictures


def areas(svg: str) -> dict[str, float]:
    """The area of the blocks by kind, read from the drawing."""
    found = dict.fromkeys(KINDS, 0.0)
    for element in ElementTree.fromstring(svg).iter():
        kind = element.get("class", "").removeprefix("block-")
        if kind in found:
            for width, height in re.findall(r"h([\d.]+)v([\d.]+)h-", element.get("d", "")):
                found[kind] += float(width) * float(height)
            found[kind] += float(element.get("width", "0")) * float(element.get("height", "0"))
    return found


def test_blocks_are_drawn_in_proportion() -> None:
    blocks = [
        Rectangle(0, 0, 30, 100, "low_rank", "7"),
        Rectangle(30, 0, 10, 50),
        *(Rectangle(30 + row, 50, 1, 50, "sparse", "x" * 40) for row in range(10)),  # labels that do not fit
    ]
    found = areas(draw_svg(blocks, 40, 100))
    assert found["low_rank"] == pytest.approx(6 * found["dense"], rel=0.01)
    assert found["sparse"] == pytest.approx(found["dense"], rel=0.01)
    assert found["coded"] == 0


def test_a_label_is_written_where_it_fits_and_else_shown_on_pointing() -> None:
    fits = ElementTree.fromstring(draw_svg([Rectangle(0, 0, 10, 10, "low_rank", "12")], 10, 10))
    assert [text.text for text in fits.iter("text")] == ["12"]
    assert not list(fits.iter("title"))
    small = ElementTree.fromstring(draw_svg([Rectangle(0, 0, 1, 1, "low_rank", "12")], 500, 500))
    assert not list(small.iter("text"))
    assert [title.text for title in small.iter("title")] == ["12"]


def test_factors_stand_side_by_side() -> None:
    blocks = [Rectangle(0, 0, 20, 5, factor=1), Rectangle(0, 0, 5, 40, "sparse", factor=2)]
    root = ElementTree.fromstring(draw_svg(blocks, 20, 40))
    frames = [element.get("d", "") for element in root.iter("path") if element.get("class") == "frame"]
    (left, width), (right, _) = [
        tuple(map(float, re.match(r"M([\d.]+) [\d.]+h([\d.]+)", outline).groups())) for outline in frames
    ]
    assert right > left + width
    assert [text.text for text in root.iter("text")] == ["×"]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5000), (5000, 1), (1000, 1280)])
def test_any_shape_has_a_drawing_of_sensible_size(rows: int, columns: int) -> None:
    root = ElementTree.fromstring(draw_svg([Rectangle(0, 0, rows, columns)], rows, columns))
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    assert 100 <= width <= 690
    assert 100 <= height <= 450


def test_thousands_of_blocks_are_one_path() -> None:
    blocks = [Rectangle(row, column, 1, 1, "sparse") for row in range(100) for column in range(0, 100, 2)]
    svg = draw_svg(blocks, 100, 100)
    assert svg.count("<path") == 2  # the blocks and the frame
    assert len(svg) < 40 * len(blocks)


def test_a_picture_in_words() -> None:
    blocks = [
        Rectangle(0, 0, 1, 1),
        Rectangle(0, 0, 1, 1, "low_rank", "3"),
        Rectangle(0, 0, 1, 1, "low_rank", "11"),
        Rectangle(0, 0, 1, 1, "coded", "4 bits"),
    ]
    assert describe(blocks) == "2 low rank (rank 3 to 11), 1 dense, 1 coded"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_style_sheet_knows_every_kind_of_block(source: str, theme: str) -> None:
    light, dark = source.split("prefers-color-scheme: dark")
    for kind in KINDS:
        assert f".block-{kind}" in (dark if theme == "dark" else light + dark.split("\n}\n", 1)[1])


def test_a_picture_file_is_an_image_with_a_legend(tmp_path: Path) -> None:
    member = LowRank(rank=2).fit(torch.randn(12, 20))
    root = ElementTree.parse(write_picture(member, tmp_path / "layer.svg")).getroot()
    assert root.tag == f"{SVG}svg"
    assert [text.text for text in root.iter(f"{SVG}text")] == ["2", "1 low rank (rank 2)"]
    assert [file.name for file in tmp_path.iterdir()] == ["layer.svg"]


def test_a_picture_file_can_be_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'weft[plot]'")
    from matplotlib.image import imread  # noqa: PLC0415

    pixels = imread(write_picture(LowRank(rank=2).fit(torch.randn(12, 20)), tmp_path / "layer.png"))
    green = tuple(int(KINDS["low_rank"].fill[place : place + 2], 16) for place in (1, 3, 5))
    share = ((255 * pixels[..., :3]).round() == green).all(-1).mean()
    assert share > 0.5
    assert pixels.shape[1] > pixels.shape[0]


def test_png_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'weft\[plot\]'"):
        write_picture(LowRank(rank=2).fit(torch.randn(12, 20)), tmp_path / "layer.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["layer.pdf", "layer"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"path must be a .svg or .png file"):
        write_picture(LowRank(rank=2).fit(torch.randn(12, 20)), tmp_path / name)


# -- a real browser


@pytest.fixture(name="browser", scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(name="opened")
def _opened(browser: Any, source: str, tmp_path: Path) -> Any:
    path = tmp_path / "report.html"
    path.write_text(source, encoding="utf-8")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    browser.get(path.as_uri())
    return browser


def names(browser: Any) -> list[str]:
    """The layers that are shown, in their order."""
    script = (
        "return [...document.querySelectorAll('.layer th')].filter(x => x.offsetParent).map(x => x.innerText)"
    )
    return browser.execute_script(script)


def click(browser: Any, selector: str, number: int = 0) -> None:
    browser.find_elements("css selector", selector)[number].click()


def test_the_browser_reports_no_error_and_asks_the_network_for_nothing(opened: Any) -> None:
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"] == opened.current_url
    ]
    assert opened.current_url in asked  # the log does tell
    assert [url for url in asked if url not in {opened.current_url, "data:,"}] == []


def test_headings_sort_in_both_directions(opened: Any) -> None:
    first = ["stem.convolution", HOSTILE, "head"]
    assert names(opened) == first
    click(opened, "thead th button", 5 - 2)  # parameters: 105, 1536, 200
    assert names(opened) == ["stem.convolution", "head", HOSTILE]
    click(opened, "thead th button", 5 - 2)
    assert names(opened) == [HOSTILE, "head", "stem.convolution"]
    click(opened, "thead th button", 6)  # errors: 0.1234, 0.5, none, which is last
    assert names(opened) == first
    click(opened, "thead th button", 6)
    assert names(opened) == [HOSTILE, "stem.convolution", "head"]
    click(opened, "thead th button", 1)
    assert names(opened) == [HOSTILE, "stem.convolution", "head"]  # Hostile, LowRank, Product
    click(opened, "thead th button", 0)
    assert names(opened) == first


def test_the_filter_looks_at_names_and_structures(opened: Any) -> None:
    box = opened.find_element("id", "filter")
    box.send_keys("lowRANK")
    assert names(opened) == ["stem.convolution"]
    assert opened.find_element("id", "shown").text == "1 of 3"
    box.clear()
    box.send_keys("head")
    assert names(opened) == ["head"]


def test_a_click_shows_the_blocks_and_another_hides_them(opened: Any) -> None:
    detail = opened.find_elements("css selector", ".detail")[1]
    assert not detail.is_displayed()
    click(opened, ".layer th button", 1)
    assert detail.is_displayed()
    assert "1 low rank, 1 dense" in detail.text
    assert detail.find_element("css selector", "svg").size["height"] > 100
    click(opened, ".layer td", 6)
    assert not detail.is_displayed()


@pytest.mark.parametrize("width", [1400, 400, 320])
def test_the_page_fits_its_window(opened: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    click(opened, ".layer th button", 0)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert opened.execute_script("return window.innerWidth") == width
