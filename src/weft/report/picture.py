"""A structured matrix drawn as blocks: low-rank ones green with their rank written in, dense ones red.

A matrix that is a single low-rank block would be all of one colour: it is drawn as its two factors, to scale.
A picture is laid out once, as boxes and texts on a plane; SVG and PNG draw the same layout.
"""

import html
import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from weft import checks
from weft.storage import write_beside, write_text
from weft.structures.base import Rectangle, StructuredMatrix


@dataclass(frozen=True)
class Kind:
    """How blocks of one kind look.

    Attributes:
        name: for the legend.
        fill: the block's colour.
        ink: the colour of what is written into it.
    """

    name: str
    fill: str
    ink: str


# On a page that is dark the style sheet replaces these colours, by the class "block-..." of every block.
KINDS = {
    "low_rank": Kind("low rank", "#8fd3a8", "#0c3d22"),
    "dense": Kind("dense", "#d9625c", "#3b0705"),
    "sparse": Kind("sparse", "#8db4e8", "#0b2a52"),
    "coded": Kind("coded", "#cfaef0", "#331158"),
    "zero": Kind("zero", "#f0efec", "#45443f"),
}
_LINE = "#ffffff"
_FRAME = "#6b6a65"
_TEXT = "#2a2a28"

_HIGHEST = 440.0  # the highest factor
_WIDEST = 680.0  # all factors together
_LONGEST = 3.0  # one matrix alone: its longer side over its shorter one; longer ones are drawn out of scale
_THINNEST = 10.0  # one of several factors, drawn out of scale where it would be thinner
_GAP = 26.0  # between factors
_MARGIN = 1.0
_LARGEST_TEXT, _SMALLEST_TEXT = 22.0, 6.5  # the page shows pictures at half their size
_GLYPH = 0.62  # a digit's width in units of the text's size, with some air
_LINED = 5.0  # from this side on a block has an outline


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str = ""


@dataclass(frozen=True)
class _Text:
    x: float
    y: float  # of its middle
    size: float
    text: str
    kind: str = ""  # of the block that it is written into
    anchor: Literal["middle", "start"] = "middle"


@dataclass
class _Layout:
    width: float
    height: float
    boxes: list[_Box] = field(default_factory=list)
    frames: list[_Box] = field(default_factory=list)
    texts: list[_Text] = field(default_factory=list)
    unwritten: list[_Box] = field(default_factory=list)  # with a label that does not fit


def draw_svg(picture: Sequence[Rectangle], rows: int, columns: int, *, standalone: bool = False) -> str:
    """Draws a picture as SVG; the factors of a product stand side by side.

    Args:
        picture: the blocks, as `StructuredMatrix.picture` gives them.
        rows: the matrix's number of rows.
        columns: its number of columns.
        standalone: whether to write an SVG file with a legend, rather than an element for a page.

    Returns:
        One `<svg>` element; labels are escaped, and those that do not fit appear on pointing at their block.

    Examples:
        >>> svg = draw_svg([Rectangle(0, 0, 4, 4, "low_rank", "2"), Rectangle(0, 4, 4, 4)], 4, 8)
        >>> svg.count('class="block-'), ">2</text>" in svg
        (2, True)
    """
    layout = _lay_out(picture, rows, columns)
    if standalone:
        _add_legend(layout, picture)
    size = f"{_number(layout.width)} {_number(layout.height)}"
    width, height = size.split()
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    parts = [
        f'<svg{namespace} class="picture" viewBox="0 0 {size}" width="{width}" height="{height}" role="img"'
        f' font-family="system-ui, sans-serif" aria-label="{html.escape(describe(picture))}">'
    ]
    if standalone:
        parts.append(f'<path fill="#fff" d="M0 0h{width}v{height}H0z"/>')
    parts += _svg_blocks(layout)
    for frame in layout.frames:
        parts.append(f'<path class="frame" fill="none" stroke="{_FRAME}" d="{_outline(frame)}"/>')
    parts += [_svg_text(text) for text in layout.texts]
    return "".join([*parts, "</svg>"])


def describe(picture: Iterable[Rectangle]) -> str:
    """Says in words what a picture shows.

    Args:
        picture: the blocks.

    Returns:
        The number of blocks by kind, with the range of their labels where these are numbers.

    Examples:
        >>> describe([Rectangle(0, 0, 4, 4, "low_rank", "2"), Rectangle(0, 4, 4, 4, "low_rank", "3")])
        '2 low rank (rank 2 to 3)'
    """
    labels: dict[str, list[str]] = {}
    for block in picture:
        labels.setdefault(block.kind, []).append(block.label)
    parts = []
    for kind in KINDS:
        if kind in labels:
            numbers = sorted(int(label) for label in labels[kind] if label.isdecimal())
            word = "rank " if kind == "low_rank" else ""
            span = f" ({word}{numbers[0]})" if numbers else ""
            if len(set(numbers)) > 1:
                span = f" ({word}{numbers[0]} to {numbers[-1]})"
            parts.append(f"{len(labels[kind]):,} {KINDS[kind].name}{span}")
    return ", ".join(parts)


def write_picture(matrix: StructuredMatrix, path: str | os.PathLike[str]) -> Path:
    """Writes the picture of a matrix as an image file with a legend.

    Args:
        matrix: the structured matrix.
        path: a file `*.svg`, or `*.png`, which needs matplotlib.

    Returns:
        The path.

    Raises:
        ValueError: the file's ending is neither.
    """
    picture = matrix.picture()
    match Path(path).suffix.lower():
        case ".svg":
            return write_text(path, draw_svg(picture, matrix.outputs, matrix.inputs, standalone=True) + "\n")
        case ".png":
            layout = _lay_out(picture, matrix.outputs, matrix.inputs)
            _add_legend(layout, picture)
            return write_beside(path, lambda beside: _write_png(layout, beside))
        case ending:
            remedy = "name the file *.svg or *.png"
            raise ValueError(checks.fault("path", "a .svg or .png file", ending or "no ending", remedy))


# -- layout


def _in_factors(picture: Sequence[Rectangle], rows: int, columns: int) -> Sequence[Rectangle]:
    """The picture; of a matrix that is one low-rank block that of its factors."""
    if len(picture) != 1 or picture[0].kind != "low_rank" or not picture[0].label.isdecimal():
        return picture
    (block,), rank = picture, int(picture[0].label)
    if (block.rows, block.columns) != (rows, columns) or not 0 < rank <= min(rows, columns):
        return picture
    return [replace(block, columns=rank, factor=1), replace(block, rows=rank, factor=2)]


def _lay_out(picture: Sequence[Rectangle], rows: int, columns: int) -> _Layout:
    picture = _in_factors(picture, rows, columns)
    factors: dict[int, list[Rectangle]] = {}
    for block in sorted(picture, key=lambda block: block.factor):
        factors.setdefault(block.factor, []).append(block)
    extents = [(rows, columns)] if set(factors) <= {0} else [_extent(blocks) for blocks in factors.values()]
    gaps = _GAP * (len(extents) - 1)
    highest, widest = max(extent[0] for extent in extents), sum(extent[1] for extent in extents)
    scale = min(_HIGHEST / highest, (_WIDEST - gaps) / widest)
    sizes = [(height * scale, width * scale) for height, width in extents]
    thinnest = _THINNEST if len(sizes) > 1 else max(sizes[0]) / _LONGEST
    sizes = [(max(thinnest, height), max(thinnest, width)) for height, width in sizes]
    height = max(size[0] for size in sizes)
    layout = _Layout(sum(size[1] for size in sizes) + gaps + 2 * _MARGIN, height + 2 * _MARGIN)
    x = _MARGIN
    for number, (blocks, extent, size) in enumerate(
        zip(factors.values() or [[]], extents, sizes, strict=True)
    ):
        if number:
            layout.texts.append(_Text(x - _GAP / 2, layout.height / 2, _LARGEST_TEXT, "×"))
        y = (layout.height - size[0]) / 2
        layout.frames.append(_Box(x, y, size[1], size[0], "frame"))
        down, across = size[0] / extent[0], size[1] / extent[1]
        for block in blocks:
            place = x + block.column * across, y + block.row * down
            box = _Box(*place, block.columns * across, block.rows * down, block.kind, block.label)
            layout.boxes.append(box)
            _add_label(layout, box)
        x += size[1] + _GAP
    return layout


def _extent(blocks: Sequence[Rectangle]) -> tuple[int, int]:
    return max(block.row + block.rows for block in blocks), max(
        block.column + block.columns for block in blocks
    )


def _add_label(layout: _Layout, box: _Box) -> None:
    if not box.label:
        return
    size = min(_LARGEST_TEXT, 0.75 * box.height, 0.9 * box.width / (_GLYPH * len(box.label)))
    if size < _SMALLEST_TEXT:
        layout.unwritten.append(box)
    else:
        middle = box.x + box.width / 2, box.y + box.height / 2
        layout.texts.append(_Text(*middle, size, box.label, box.kind))


def _add_legend(layout: _Layout, picture: Sequence[Rectangle]) -> None:
    """Puts a legend of the kinds that occur below the drawing, one per line."""
    x, y = _MARGIN, layout.height + 14
    for kind in [kind for kind in KINDS if any(block.kind == kind for block in picture)]:
        text = describe([block for block in picture if block.kind == kind])
        layout.boxes.append(_Box(x, y, 14, 14, kind))
        layout.texts.append(_Text(x + 22, y + 7, 12, text, anchor="start"))
        layout.width = max(layout.width, x + 22 + 12 * _GLYPH * len(text))
        y += 20
    layout.height = y


# -- SVG


def _svg_blocks(layout: _Layout) -> list[str]:
    """One path per kind, so that thousands of blocks stay small; blocks with a hidden label on their own."""
    paths: dict[tuple[str, bool], list[str]] = {}
    parts = []
    hidden = {id(box) for box in layout.unwritten}
    for box in layout.boxes:
        if id(box) in hidden:
            continue
        lined = min(box.width, box.height) >= _LINED
        paths.setdefault((box.kind, lined), []).append(_outline(box))
    for (kind, lined), outlines in paths.items():
        parts.append(f'<path {_svg_colours(kind, lined)} d="{"".join(outlines)}"/>')
    for box in layout.unwritten:
        place = f'x="{_number(box.x)}" y="{_number(box.y)}"'
        size = f'width="{_number(box.width)}" height="{_number(box.height)}"'
        colours = _svg_colours(box.kind, min(box.width, box.height) >= _LINED)
        parts.append(f"<rect {colours} {place} {size}><title>{html.escape(box.label)}</title></rect>")
    return parts


def _svg_colours(kind: str, lined: bool) -> str:
    line = f' stroke="{_LINE}" stroke-width="0.75"' if lined else ""
    return f'class="block-{kind}" fill="{KINDS[kind].fill}"{line}'


def _svg_text(text: _Text) -> str:
    ink = KINDS[text.kind].ink if text.kind else _TEXT
    style = f'class="ink-{text.kind or "page"}" fill="{ink}" font-size="{_number(text.size)}"'
    place = (
        f'x="{_number(text.x)}" y="{_number(text.y)}" text-anchor="{text.anchor}" dominant-baseline="central"'
    )
    return f"<text {style} {place}>{html.escape(text.text)}</text>"


def _outline(box: _Box) -> str:
    x, y, width, height = map(_number, (box.x, box.y, box.width, box.height))
    return f"M{x} {y}h{width}v{height}h-{width}z"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# -- PNG


def _write_png(layout: _Layout, path: Path) -> None:
    try:
        figures = importlib.import_module("matplotlib.figure")
        patches = importlib.import_module("matplotlib.patches")
        collections = importlib.import_module("matplotlib.collections")
    except ModuleNotFoundError as error:
        got = f"no module named {error.name}"
        remedy = "run: pip install 'weft[plot]', or write a .svg file"
        raise ImportError(
            checks.fault("package matplotlib", "installed for PNG files", got, remedy)
        ) from error
    points = 72 / 96  # per pixel
    figure = figures.Figure(figsize=((layout.width + 16) / 96, (layout.height + 16) / 96), dpi=192)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-8, layout.width + 8), ylim=(layout.height + 8, -8))  # y grows downwards
    axes.axis("off")
    for boxes, edge in ((layout.boxes, _LINE), (layout.frames, _FRAME)):
        axes.add_collection(
            collections.PatchCollection(
                [patches.Rectangle((box.x, box.y), box.width, box.height) for box in boxes],
                facecolors=[KINDS[box.kind].fill if box.kind in KINDS else "none" for box in boxes],
                edgecolors=edge,
                linewidths=[0.75 * points if min(box.width, box.height) >= _LINED else 0.0 for box in boxes],
            )
        )
    for text in layout.texts:
        axes.text(
            text.x,
            text.y,
            text.text,
            color=KINDS[text.kind].ink if text.kind else _TEXT,
            fontsize=text.size * points,
            ha="center" if text.anchor == "middle" else "left",
            va="center_baseline" if text.anchor == "start" else "center",
            parse_math=False,  # a label is a text, whatever dollar signs are in it
        )
    figure.savefig(path, format="png")
