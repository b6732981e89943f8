"""The page and the pictures: structure, escaping, independence of anything outside, and a real browser."""

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import plotly.graph_objects
import pytest
import torch

from tests.browser import chromium, resize, show, wait
from weft.measure import Latency, LayerRow, Timing
from weft.report import charts
from weft.report.page import render_comparison, render_page
from weft.report.picture import KINDS, describe, draw_svg, write_picture
from weft.report.report import Report, write_comparison
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
        distance=0.25,
        singular_values={
            "place": [1, 2, 4, 8],
            "dense": [4.0, 2.0, 1.0, 0.5],
            "structured": [4.0, 2.0, 1e-9, 0.0],
        },
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
    "layers": {
        "stem.convolution": {
            "dense": 216,
            "sensitivity": 2.5,
            "loss": 0.15,
            "curves": {
                "LowRank": [[70, 0.4, "LowRank(rank=2)"], [105, 0.12, "LowRank(rank=3)"]],
                HOSTILE: [[50, 0.5, HOSTILE]],
            },
        },
        "head": {"dense": 640, "sensitivity": 1.0, "loss": 0.05, "curves": {}},
    },
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
        self.scripts: dict[str, str] = {}
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
        if self.open and self.open[-1] == "script":
            name = (
                next(attributes for tag, attributes in reversed(self.elements) if tag == "script").get("id")
                or ""
            )
            self.scripts[name] = self.scripts.get(name, "") + data
        elif data.strip():
            texts = self.texts.setdefault(self.open[-1] if self.open else "", [])
            if self.elements and self.elements[-1][0] == "wbr":  # where a name may break is part of no name
                texts[-1] += data.strip()
            else:
                texts.append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self) -> dict[str, dict[str, Any]]:
        """The charts' specifications."""
        return json.loads(self.scripts["charts"]) if "charts" in self.scripts else {}


@pytest.fixture(name="source", scope="module")
def _source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    written = REPORT.write_html(
        path,
        title=f"A title {HOSTILE}",
        command="weft plan\nweft demo --out 'a <b>'",
        asked="bytes=0.25 & more",
        log=LOG,
        pareto=PARETO,
        others={"head": {"Tucker": f"dearer than {HOSTILE}"}},
    )
    assert written == path
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_section(source: str) -> None:
    page = Page(source)
    assert page.texts["h2"] == [
        "What each family can reach",
        "Layers",
        "Latencies",
        "Training",
        "To repeat it",
    ]
    assert f"A title {HOSTILE}" in page.texts["h1"]
    assert page.texts["code"] == ["weft plan\nweft demo --out 'a <b>'"]
    assert "bytes=0.25 & more" in page.texts["p"]
    assert "a <fast> one" in page.texts["dd"]
    assert f"dearer than {HOSTILE}" in page.texts["dd"]
    for row in REPORT.rows():
        assert row[0] in page.texts["th"]
        assert set(row[1:]) <= set(page.texts["td"])


def test_names_are_escaped_everywhere(source: str) -> None:
    page = Page(source)
    assert HOSTILE not in source
    assert set(page.scripts) == {"charts", "library", ""}  # the page's own
    assert HOSTILE in page.texts["span"]
    assert "Hostile" in page.texts["td"]
    assert HOSTILE in page.texts["title"] or HOSTILE in page.texts["text"]  # the block's label
    # Plotly reads tags in texts: none of the names may hold one.
    texts = [
        trace[key]
        for chart in page.charts().values()
        for trace in chart["data"]
        for key in ("name", "text")
        if key in trace
    ]
    flat = [text for entry in texts for text in ([entry] if isinstance(entry, str) else entry)]
    assert any("alert" in text for text in flat)
    assert not [text for text in flat if "<" in text.replace("<br>", "")]


def test_nothing_is_fetched_from_elsewhere(source: str) -> None:
    page = Page(source)
    assert not re.findall(r"(?:https?:|file:|ftp:)?//[\w.]", source.replace(page.scripts["library"], ""))
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
    assert "unsafe-eval" not in str(policy["content"])


def test_the_page_stays_below_two_and_a_half_megabytes(source: str) -> None:
    assert len(source) < 2_500_000
    without = Report("accuracy", 0.0, 0.0, Cost(), Cost(), [], [], {})
    assert len(render_page(without.to_json(), without.rows(), title="no chart, no library")) < 30_000


def test_every_chart_is_one_that_plotly_knows_and_the_page_shows(source: str) -> None:
    page = Page(source)
    drawn = page.charts()
    assert set(drawn) == {"pareto", "costs", "latencies", "training-0", "values-0", "errors-0"}
    assert {element["data-chart"] for _, element in page.elements if "data-chart" in element} == set(drawn)
    style = page.texts["style"][0]
    for chart in drawn.values():
        text = json.dumps(chart)
        for variable in re.findall(r"var\((--[\w-]+)\)", text):
            assert style.count(f"{variable}:") == 2, variable  # light and dark
        plotly.graph_objects.Figure(
            json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", text))
        )  # else ValueError


def test_latencies_say_only_what_the_spread_supports(source: str) -> None:
    notes = Page(source).texts["span"]
    assert "2.00 times as fast" in notes
    assert "no clear difference: within the spread" in notes
    assert "slower: 1.50 times the dense time" in notes


def test_bars_are_shares_of_the_dense_median_with_their_spread(source: str) -> None:
    dense, compressed = Page(source).charts()["latencies"]["data"]
    assert dense["x"] == [1.0, 1.0, 1.0]
    assert compressed["x"] == pytest.approx([0.5, 8.5 / 8, 1.5])
    assert compressed["error_x"]["array"] == pytest.approx([0.125, 1 / 8, 0.1])
    assert compressed["error_x"]["arrayminus"] == pytest.approx([0.05, 1 / 8, 0.1])
    assert compressed["text"] == ["200 µs", "8.5 ms", "15 ms"]


def test_errors_come_from_the_log_and_else_from_the_plan(source: str) -> None:
    cells = Page(source).texts["td"]
    assert "0.1234" in cells
    assert "0.5000" in cells
    assert "fit error" in source
    bare = {"layers": [], **PARETO}
    planned = render_page(REPORT.to_json(), REPORT.rows(), title="without a log", pareto=bare)
    assert "0.1200" in Page(planned).texts["td"]
    assert "fit error" not in render_page(REPORT.to_json(), REPORT.rows(), title="without either")


def test_a_layer_tells_its_distance_its_sensitivity_and_its_share_of_the_loss(source: str) -> None:
    cells = Page(source).texts["td"]
    assert {"0.2500", "2.5", "75.0%", "25.0%"} <= set(cells)


def test_singular_values_are_drawn_down_to_rounding(source: str) -> None:
    dense, structured = Page(source).charts()["values-0"]["data"]
    assert list(zip(dense["x"], dense["y"], strict=True)) == [(1, 4.0), (2, 2.0), (4, 1.0), (8, 0.5)]
    assert list(zip(structured["x"], structured["y"], strict=True)) == [(1, 4.0), (2, 2.0)]


def test_a_layers_curves_show_what_was_chosen(source: str) -> None:
    low_rank, hostile, chosen = Page(source).charts()["errors-0"]["data"]
    assert low_rank["x"] == pytest.approx([70 / 216, 105 / 216])
    assert hostile["y"] == [0.5]
    assert (chosen["x"], chosen["y"]) == ([low_rank["x"][1]], [0.12])


def test_long_training_is_drawn_with_few_points(source: str) -> None:
    chart = Page(source).charts()["training-0"]
    upper, lower, middle = chart["data"]
    assert 100 <= len(middle["x"]) <= 400
    assert 1 <= middle["x"][0] < 5
    assert 895 < middle["x"][-1] <= 900
    assert middle["y"] == sorted(middle["y"], reverse=True)
    for low, mean, high in zip(lower["y"], middle["y"], upper["y"], strict=True):
        assert low <= mean <= high
    assert chart["layout"]["yaxis"]["type"] == "log"


def test_every_familys_curve_is_drawn_with_the_plans_point_on_it(source: str) -> None:
    traces = {trace["name"]: trace for trace in Page(source).charts()["pareto"]["data"]}
    escaped = "&lt;script&gt;alert(&#x27;a&amp;b&#x27;)&lt;/script&gt;&quot;&#x27;"
    assert list(traces) == [escaped, "LowRank", "all families together", "the plan"]  # Nothing never loses
    best, plan = traces["all families together"], traces["the plan"]
    assert (best["x"], best["y"]) == ([0.1, 0.3, 0.6], [2.0, 0.2, 0.02])
    assert (plan["x"], plan["y"]) == ([best["x"][1]], [best["y"][1]])
    assert "30.0 % of the multiply-adds" in source
    assert "above the curve" not in source


def test_a_plan_above_the_curve_says_why(tmp_path: Path) -> None:
    above = {"cost": "bytes", "dense": 10, "curves": {"all": [[2, 1.0], [5, 0.2]]}, "chosen": [5, 0.6]}
    page = Page(REPORT.write_html(tmp_path / "page.html", pareto=above).read_text(encoding="utf-8"))
    (told,) = [text for text in page.texts["figcaption"] if "The plan has" in text]
    assert "The plan has 50.0 % of the bytes. It lies above the curve because" in told


def test_the_sensitivity_is_shown_where_layers_differ_in_it(tmp_path: Path) -> None:
    layers = {
        "stem.convolution": {"dense": 216, "sensitivity": 1.0, "loss": 0.15, "curves": {}},
        "head": {"dense": 640, "sensitivity": 1.0, "loss": 0.05, "curves": {}},
    }
    plan = {"cost": "bytes", "dense": 10, "curves": {"all": [[5, 1.0]]}, "chosen": [5, 1.0], "layers": layers}
    texts = REPORT.write_html(tmp_path / "page.html", pareto=plan).read_text(encoding="utf-8")
    assert "<em>Sensitivity</em>" not in texts
    assert "survey with --fisher" in texts
    layers["head"]["sensitivity"] = 2.0
    texts = REPORT.write_html(tmp_path / "page.html", pareto=plan).read_text(encoding="utf-8")
    assert "<em>Sensitivity</em>" in texts
    assert "survey with --fisher" not in texts


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
    page = Page(REPORT.write_html(tmp_path / "page.html", log=log).read_text(encoding="utf-8"))
    assert page.texts["h3"] == ["Loss", "Metric", "Size"]
    assert page.charts()["training-1"]["data"][0]["y"] == [0.5, 0.9]
    assert "2 epochs: 0.5 at the first, 0.9 on average over the last twentieth." in page.texts["figcaption"]
    same = [{**entry, "size": 100} for entry in log if "loss" in entry]
    page = Page(REPORT.write_html(tmp_path / "page.html", log=same).read_text(encoding="utf-8"))
    assert page.texts["h3"] == ["Loss"]


def test_a_page_without_layers_latencies_and_log_is_whole(tmp_path: Path) -> None:
    bare = Report("accuracy", 0.0, float("nan"), Cost(), Cost(), [], [], {})
    page = Page(bare.write_html(tmp_path / "bare.html").read_text(encoding="utf-8"))
    assert page.texts["h2"] == ["Layers", "To repeat it"]
    assert any("No layer is structured" in text for text in page.texts["p"])
    assert set(page.scripts) == {""}


@pytest.mark.parametrize(
    ("losses", "drawn"), [([], 0), ([1.0], 0), ([1.0, 1.0], 1), ([0.0, 1e-9], 1), ([-1.0, 5.0, 2.0], 1)]
)
def test_any_curve_can_be_drawn(losses: list[float], drawn: int) -> None:
    assert (
        len(charts.training_charts([{"step": step, "loss": loss} for step, loss in enumerate(losses)]))
        == drawn
    )


# -- several runs


OTHER = Report(
    metric="accuracy",
    dense_value=0.9172,
    value=0.9012,
    dense_cost=Cost(6000, 24_000, 50_000),
    cost=Cost(1000, 4000, 10_000),
    latencies=LATENCIES[:1],
    layers=[LAYERS[0], LayerRow("tail", f"Hostile({HOSTILE})", (4, 4), Cost(16, 64, 16), Cost(8, 32, 8), [])],
    environment={"processor": "another"},
)


@pytest.fixture(name="compared", scope="module")
def _compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    REPORT.save(folder / "one.json", command="weft one", asked="half of it")
    OTHER.save(folder / f"{HOSTILE.replace('/', '')}.json", command="weft two", asked=HOSTILE)
    return write_comparison(
        [folder / "one.json", folder / f"{HOSTILE.replace('/', '')}.json"], folder / "page.html"
    )


def test_runs_are_compared_in_one_table_one_chart_and_by_layer(compared: Path) -> None:
    page = Page(compared.read_text(encoding="utf-8"))
    assert {"0.9104", "0.9012", "33.3 %", "16.7 %"} <= set(page.texts["td"])
    assert {"half of it", HOSTILE} <= set(page.texts["p"])
    assert {"weft one", "weft two"} <= set(page.texts["code"])
    (chart,) = page.charts().values()
    assert [trace["y"] for trace in chart["data"]] == [[0.9104], [0.9012], [0.9172]]
    assert [trace["x"] for trace in chart["data"]] == [[8000 / 24000], [4000 / 24000], [1.0]]
    plotly.graph_objects.Figure(json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(chart))))
    assert sorted(page.texts["option"]) == list(chart["layout"]["meta"]["costs"])
    assert page.texts["option"] == [
        "bytes",
        "parameters",
        "multiply-adds",
        "time, batch 1, 1 thread",
    ]  # what both have
    # Half of the tail's bytes, 62.5 % of the hostile layer's, 60.9 % of the head's; the stem is the same.
    apart = [cell for cell in page.texts["td"] if cell.endswith("points")]
    assert apart == ["62.5 points", "60.9 points", "50.0 points", "0.0 points"]
    assert page.texts["span"].count("dense") == 3
    assert "LowRank(rank=3)" in page.texts["span"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs must be at least 2"):
        render_comparison([], title="none")
    other = Report("loss", 0.0, 0.0, Cost(), Cost(), [], [], {})
    files = [REPORT.save(tmp_path / "a.json"), other.save(tmp_path / "b.json")]
    with pytest.raises(ValueError, match="of one metric, got accuracy, loss"):
        write_comparison(files, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        REPORT.save(tmp_path / name / "run.json")
    written = write_comparison(
        [tmp_path / "a" / "run.json", tmp_path / "b" / "run.json"], tmp_path / "page.html"
    )
    names = Page(written.read_text(encoding="utf-8")).texts["h3"]
    assert [Path(name).parts[-2:] for name in names] == [("a", "run"), ("b", "run")]


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
    fits = ElementTree.fromstring(draw_svg([Rectangle(0, 0, 10, 10, "coded", "12")], 10, 10))
    assert [text.text for text in fits.iter("text")] == ["12"]
    assert not list(fits.iter("title"))
    small = ElementTree.fromstring(draw_svg([Rectangle(0, 0, 1, 1, "low_rank", "12")], 500, 500))
    assert not list(small.iter("text"))
    assert [title.text for title in small.iter("title")] == ["12"]


def frames(root: ElementTree.Element) -> list[tuple[float, ...]]:
    """Left edge, width and height of every factor's frame."""
    outlines = [element.get("d", "") for element in root.iter("path") if element.get("class") == "frame"]
    sizes = [re.match(r"M([\d.]+) [\d.]+h([\d.]+)v([\d.]+)", outline) for outline in outlines]
    return [tuple(map(float, size.groups())) for size in sizes if size]


def test_factors_stand_side_by_side() -> None:
    blocks = [Rectangle(0, 0, 20, 5, factor=1), Rectangle(0, 0, 5, 40, "sparse", factor=2)]
    root = ElementTree.fromstring(draw_svg(blocks, 20, 40))
    (left, width, _), (right, _, _) = frames(root)
    assert right > left + width
    assert [text.text for text in root.iter("text")] == ["×"]


def test_a_matrix_that_is_one_low_rank_block_is_drawn_as_its_factors_to_scale() -> None:
    member = LowRank(rank=60).initialise((500, 800))
    svg = draw_svg(member.picture(), 500, 800)
    (_, across, high), (_, wide, down) = frames(ElementTree.fromstring(svg))
    assert across / high == pytest.approx(60 / 500, rel=0.01)
    assert down / wide == pytest.approx(60 / 800, rel=0.01)
    assert high / wide == pytest.approx(500 / 800, rel=0.01)
    found = areas(svg)
    assert found["low_rank"] == pytest.approx(across * high + wide * down, rel=0.01)
    assert 'aria-label="1 low rank (rank 60)"' in svg


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
    light, dark = Page(source).texts["style"][0].split("prefers-color-scheme: dark")
    for kind in KINDS:
        assert f".block-{kind}" in (dark if theme == "dark" else light + dark.split("\n}\n", 1)[1])


def test_a_picture_file_is_an_image_with_a_legend(tmp_path: Path) -> None:
    member = LowRank(rank=2).fit(torch.randn(12, 20))
    root = ElementTree.parse(write_picture(member, tmp_path / "layer.svg")).getroot()
    assert root.tag == f"{SVG}svg"
    assert [text.text for text in root.iter(f"{SVG}text")] == ["2", "×", "2", "1 low rank (rank 2)"]
    assert [file.name for file in tmp_path.iterdir()] == ["layer.svg"]


def test_a_picture_file_can_be_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'weft[plot]'")
    from matplotlib.image import imread  # noqa: PLC0415

    pixels = imread(write_picture(LowRank(rank=2).fit(torch.randn(12, 20)), tmp_path / "layer.png"))
    green = tuple(int(KINDS["low_rank"].fill[place : place + 2], 16) for place in (1, 3, 5))
    share = ((255 * pixels[..., :3]).round() == green).all(-1).mean()
    assert share > 0.1
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
def _browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(name="opened")
def _opened(browser: Any, source: str, tmp_path: Path) -> Any:
    path = tmp_path / "report.html"
    path.write_text(source, encoding="utf-8")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    show(browser, path)
    return browser


def names(browser: Any) -> list[str]:
    """The layers that are shown, in their order."""
    all_names = "[...document.querySelectorAll('.layer th span')]"
    return browser.execute_script(f"return {all_names}.filter(x => x.offsetParent).map(x => x.innerText)")


def click(browser: Any, selector: str, number: int = 0) -> None:
    element = browser.find_elements("css selector", selector)[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def requests_of(browser: Any) -> list[str]:
    """What the page asked the network for, itself left out."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"] == browser.current_url
    ]
    assert browser.current_url in asked  # the log does tell
    return [url for url in asked if url not in {browser.current_url, "data:,"}]


def test_the_browser_reports_no_error_and_asks_the_network_for_nothing(opened: Any) -> None:
    click(opened, ".layer th button", 0)
    wait(lambda: len(opened.find_elements("css selector", ".detail .main-svg")) > 0)
    assert opened.get_log("browser") == []
    assert requests_of(opened) == []


def test_a_comparison_loads_without_errors_and_requests(browser: Any, compared: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    show(browser, compared)
    assert browser.get_log("browser") == []
    assert requests_of(browser) == []
    assert names(browser) == [HOSTILE, "head", "tail", "stem.convolution"]
    click(browser, "thead th button", 0)
    assert names(browser) == sorted([HOSTILE, "head", "tail", "stem.convolution"])
    browser.find_element("css selector", ".filter").send_keys("LowRank")
    assert names(browser) == ["stem.convolution"]
    places = "return document.querySelector('[data-chart=runs]').data.map(trace => trace.x[0])"
    assert browser.execute_script(places) == pytest.approx([8 / 24, 4 / 24, 1.0])
    browser.find_element("css selector", ".cost").send_keys("time")
    assert browser.execute_script(places) == pytest.approx([0.5, 0.5, 1.0])


def test_every_chart_is_drawn(opened: Any) -> None:
    seen = (
        "return [...document.querySelectorAll('.plot')].filter(x => x.offsetParent).map(x => x.dataset.chart)"
    )
    done = "return [...document.querySelectorAll('.js-plotly-plot')].map(x => x.dataset.chart)"
    assert opened.execute_script(done) == opened.execute_script(seen)
    assert opened.execute_script(done) == ["pareto", "costs", "latencies", "training-0"]
    lines = "return document.querySelectorAll('[data-chart=pareto] .scatterlayer .trace').length"
    assert opened.execute_script(lines) == 4


def test_pointing_at_a_chart_tells_values(opened: Any) -> None:
    hover = (
        "const place = document.querySelector('[data-chart=pareto]');"
        "Plotly.Fx.hover(place, [{curveNumber: 2, pointNumber: 1}]);"
        "return [...place.querySelectorAll('.hovertext')].map(x => x.textContent).join(' ')"
    )
    told = opened.execute_script(hover)
    assert "30.0% of the multiply-adds" in told
    assert "predicted loss 0.2" in told


def test_headings_sort_in_both_directions(opened: Any) -> None:
    first = ["stem.convolution", HOSTILE, "head"]
    assert names(opened) == first
    click(opened, "thead th button", 3)  # parameters: 105, 1536, 200
    assert names(opened) == ["stem.convolution", "head", HOSTILE]
    click(opened, "thead th button", 3)
    assert names(opened) == [HOSTILE, "head", "stem.convolution"]
    click(opened, "thead th button", 6)  # errors: 0.1234, 0.5, none, which is last
    assert names(opened) == first
    click(opened, "thead th button", 6)
    assert names(opened) == [HOSTILE, "stem.convolution", "head"]
    click(opened, "thead th button", 8)  # sensitivities: 2.5, none, 1
    assert names(opened) == ["head", "stem.convolution", HOSTILE]
    click(opened, "thead th button", 1)
    assert names(opened) == [HOSTILE, "stem.convolution", "head"]  # Hostile, LowRank, Product
    click(opened, "thead th button", 0)
    assert names(opened) == first


def test_the_filters_look_at_names_structures_and_families(opened: Any) -> None:
    box = opened.find_element("css selector", ".filter")
    box.send_keys("lowRANK")
    assert names(opened) == ["stem.convolution"]
    assert opened.find_element("css selector", ".shown").text == "1 of 3"
    box.clear()
    box.send_keys("head")
    assert names(opened) == ["head"]
    box.clear()
    box.send_keys(" ")
    family = opened.find_element("css selector", ".family")
    assert [option.text for option in family.find_elements("css selector", "option")] == [
        "all",
        "Hostile",
        "LowRank",
        "Product",
    ]
    family.send_keys("Product")
    assert names(opened) == ["head"]


def test_a_click_shows_blocks_and_curves_and_another_hides_them(opened: Any) -> None:
    first, second, _ = opened.find_elements("css selector", ".detail")
    assert not first.is_displayed()
    click(opened, ".layer th button", 0)
    assert first.is_displayed()
    drawn = [
        plot.get_attribute("data-chart") for plot in first.find_elements("css selector", ".js-plotly-plot")
    ]
    assert drawn == ["values-0", "errors-0"]
    click(opened, ".layer th button", 1)
    assert "1 low rank, 1 dense" in second.text
    assert second.find_element("css selector", "svg.picture").size["height"] > 100
    click(opened, ".layer td", 11)  # a cell of the second row
    assert not second.is_displayed()


def test_a_click_on_a_layers_bar_opens_the_layer(opened: Any) -> None:
    opened.execute_script(
        "document.querySelector('[data-chart=costs]').emit('plotly_click', {points: [{customdata: 2}]})"
    )
    third = opened.find_elements("css selector", ".detail")[2]
    assert third.is_displayed()
    assert HOSTILE in third.text  # why another family was not chosen


@pytest.mark.parametrize("kind", ["run", "comparison"])
@pytest.mark.parametrize("width", [1400, 400, 320])
def test_the_page_fits_its_window(opened: Any, compared: Path, kind: str, width: int) -> None:
    page = compared if kind == "comparison" else Path(unquote(urlsplit(opened.current_url).path))
    show(opened, page, width)
    if kind == "run":
        click(opened, ".layer th button", 0)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert opened.execute_script("return window.innerWidth") == width
    plots = "return [...document.querySelectorAll('.main-svg')].map(x => x.getBoundingClientRect().right)"
    assert max(opened.execute_script(plots)) <= width


def test_charts_take_the_colours_of_the_scheme_also_when_it_changes(opened: Any) -> None:
    ink = "return getComputedStyle(document.querySelector('[data-chart=pareto] .xtitle')).fill"
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = opened.execute_script(ink), opened.execute_script(ground)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    wait(lambda: opened.execute_script(ink) != light[0])
    dark = opened.execute_script(ink), opened.execute_script(ground)
    assert light == ("rgb(92, 91, 85)", "rgb(255, 255, 255)")
    assert dark == ("rgb(168, 168, 159)", "rgb(21, 22, 20)")


def test_a_chart_that_was_hidden_meanwhile_fits_and_has_the_new_colours(opened: Any) -> None:
    for _ in range(2):  # opened and closed
        click(opened, ".layer th button", 0)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    resize(opened, 400, 900)
    click(opened, ".layer th button", 0)
    ink = "return getComputedStyle(document.querySelector('[data-chart=values-0] .xtitle')).fill"
    wait(lambda: opened.execute_script(ink) == "rgb(168, 168, 159)")
    right = "return document.querySelector('[data-chart=values-0] .main-svg').getBoundingClientRect().right"
    wait(lambda: opened.execute_script(right) <= 400)
