"""The page's charts: what Plotly draws, computed from a measurement's JSON.

A chart is Plotly's own JSON, `{"data": [...], "layout": {...}}`. Its colours are names of the style sheet's
variables, such as "var(--text)", which the page's script replaces by the values of the current scheme. Plotly
reads a few tags in texts, so every name that comes from outside is escaped.
"""

import base64
import gzip
import html
import importlib.resources
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

Chart = dict[str, Any]

# Losses below this share of the largest are not drawn, nor singular values below this share of the first.
_LEAST_LOSS, _LEAST_VALUE = 1e-5, 1e-5
_POINTS = 150  # of a training curve; more steps are averaged in groups
_LOG_SCALE_FROM = 30.0  # the ratio of largest and smallest loss
_COLOURS = 8  # of the style sheet: --series-0 ...
_DASHES = ("solid", "dash", "dot", "dashdot")
_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@cache
def library() -> str:
    """Plotly's JavaScript, compressed: text for a page, which its script unpacks.

    Returns:
        The library from the Python package plotly by gzip, in base64.
    """
    script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), 9, mtime=0)).decode("ascii")


def pareto_chart(data: Mapping[str, Any]) -> Chart | None:
    """The least loss at every cost, by family, and the plan's own point.

    Args:
        data: as a plan's JSON has it.

    Returns:
        The chart; None where there is nothing to draw. Both scales are logarithmic: what loses nothing, such
        as the dense network, has no place there.
    """
    dense, cost = data["dense"], words(data["cost"])
    curves = {
        name: [(amount / dense, loss) for amount, loss in points if loss > 0 and amount > 0]
        for name, points in data["curves"].items()
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    share, loss = data["chosen"][0] / dense, data["chosen"][1]
    highest = max(loss for points in curves.values() for _, loss in points)
    hover = f"%{{x:.1%}} of the {cost}<br>predicted loss %{{y:.3g}}"
    traces = []
    # That of all families comes last, above the others.
    for index, name in enumerate(sorted(curves, key=lambda name: (name == "all", name))):
        points = [point for point in curves[name] if point[1] >= highest * _LEAST_LOSS]
        together = name == "all"
        line = {"color": "var(--accent)", "width": 4} if together else _series(index)
        traces.append({
            **_lines([point[0] for point in points], [point[1] for point in points], line),
            "mode": "lines+markers" if len(points) < 3 else "lines",
            "name": "all families together" if together else html.escape(name),
            "hovertemplate": hover,
        })
    if loss > 0:
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "x": [share],
            "y": [loss],
            "name": "the plan",
            "marker": {"size": 15, "symbol": "circle-open", "color": "var(--text)", "line": {"width": 3.5}},
            "hovertemplate": hover,
        })
    shares = [point[0] for points in curves.values() for point in points]
    return _chart(
        traces,
        xaxis=_share_axis(f"share of the dense {cost}", [share, *shares]),
        yaxis=_axis("predicted loss", type="log", exponentformat="power", dtick=_decades(traces)),
        height=400,
    )


def layer_error_chart(curves: Mapping[str, Any], cost: str, structure: str) -> Chart | None:
    """A layer's error curves by family, with what was chosen.

    Args:
        curves: of the layer, as a plan's JSON has them.
        cost: which cost they are in.
        structure: the chosen structure as text.

    Returns:
        The chart; None without a curve.
    """
    dense = max(curves["dense"], 1)
    traces, shares = [], []
    chosen: tuple[float, float] | None = None
    for index, (family, points) in enumerate(curves["curves"].items()):
        points = [(amount / dense, error, text) for amount, error, text in points if error > 0 and amount > 0]
        if not points:
            continue
        shares += [share for share, _, _ in points]
        chosen = next(((share, error) for share, error, text in points if text == structure), chosen)
        traces.append({
            **_lines([point[0] for point in points], [point[1] for point in points], _series(index)),
            "mode": "lines+markers",
            "marker": {"size": 5},
            "name": html.escape(family),
            "text": [html.escape(point[2]) for point in points],
            "hovertemplate": "%{text}<br>%{x:.1%} of the " + words(cost) + "<br>error %{y:.3g}",
        })
    if not traces:
        return None
    if chosen is not None:
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "x": [chosen[0]],
            "y": [chosen[1]],
            "name": "chosen",
            "marker": {"size": 13, "symbol": "circle-open", "color": "var(--text)", "line": {"width": 3}},
            "hoverinfo": "skip",
        })
    return _chart(
        traces,
        xaxis=_share_axis(f"share of the layer's {words(cost)}", shares),
        yaxis=_axis("relative error", rangemode="tozero"),
        height=300,
    )


def singular_value_chart(values: Mapping[str, Sequence[float]]) -> Chart | None:
    """Singular values of the dense weight and of what stands in for it.

    Args:
        values: "place", "dense" and "structured".

    Returns:
        The chart; None for a weight of zeros.
    """
    largest = max([*values["dense"], *values["structured"]], default=0.0)
    if not largest > 0:
        return None
    traces = []
    for name, colour, dash in (
        ("dense", "var(--dense)", "solid"),
        ("structured", "var(--compressed)", "dash"),
    ):
        points = [
            (place, value)
            for place, value in zip(values["place"], values[name], strict=True)
            if value > _LEAST_VALUE * largest
        ]
        traces.append({
            **_lines([point[0] for point in points], [point[1] for point in points]),
            "line": {"color": colour, "width": 3, "dash": dash},
            "name": name,
            "hovertemplate": "%{y:.4g}",
        })
    return _chart(
        traces,
        xaxis=_axis("place", type="log", dtick=1 if values["place"][-1] >= 10 else "D1"),
        yaxis=_axis("singular value", type="log", exponentformat="power", dtick=_decades(traces)),
        height=300,
        hovermode="x unified",
    )


def cost_chart(layers: Sequence[Mapping[str, Any]]) -> Chart:
    """Every layer's bytes before and after, in the network's order.

    Args:
        layers: name, structure, dense and structured bytes.

    Returns:
        The chart; a bar's `customdata` is the layer's number.
    """
    traces = []
    texts = [
        f"{html.escape(layer['name'])}<br>{html.escape(layer['structure'])}"
        f"<br>{layer['dense']:,} → {layer['now']:,} bytes"
        for layer in layers
    ]
    for name, key, colour in (
        ("dense", "dense", "var(--dense-soft)"),
        ("structured", "now", "var(--compressed)"),
    ):
        traces.append({
            "type": "bar",
            "name": name,
            "x": list(range(1, len(layers) + 1)),
            "y": [layer[key] for layer in layers],
            "marker": {"color": colour},
            "customdata": list(range(len(layers))),
            "text": texts,
            "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
        })
    return _chart(
        traces,
        xaxis=_axis("layer", showgrid=False, dtick=1 if len(layers) <= 12 else None, tick0=1),
        yaxis=_axis("bytes", exponentformat="SI"),
        height=260,
        barmode="overlay",
        bargap=0.25 if len(layers) > 12 else 0.6,
    )


def latency_chart(entries: Sequence[Mapping[str, Any]]) -> Chart:
    """Times of both networks, each pair in shares of the dense median, with the spread of the calls.

    Args:
        entries: latencies as a measurement's JSON has them.

    Returns:
        The chart.
    """
    names = [f"batch {entry['batch']}<br>{threads(entry['threads'])}" for entry in entries]
    traces = []
    for name, colour in (("dense", "var(--dense)"), ("compressed", "var(--compressed)")):
        medians = [entry["dense"]["median"] for entry in entries]
        own = [entry[name] for entry in entries]
        pairs = list(zip(own, medians, strict=True))
        traces.append({
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [timing["median"] / unit for timing, unit in pairs],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [(timing["high"] - timing["median"]) / unit for timing, unit in pairs],
                "arrayminus": [(timing["median"] - timing["low"]) / unit for timing, unit in pairs],
                "color": "var(--text)",
                "thickness": 1.5,
                "width": 5,
            },
            "marker": {"color": colour},
            "text": [duration(timing["median"]) for timing in own],
            "textposition": "inside",
            "insidetextanchor": "start",
            "textfont": {"color": "var(--on-bar)"},
            "customdata": [
                f"{duration(timing['low'])} to {duration(timing['high'])}<br>{timing['calls']:,} calls"
                for timing in own
            ],
            "hovertemplate": "median %{text}<br>middle 80 %: %{customdata}",
        })
    return _chart(
        traces,
        xaxis=_axis("share of the dense median", tickformat=".0%", rangemode="tozero"),
        yaxis=_axis(None, autorange="reversed", showgrid=False),
        height=110 + 74 * len(entries),
        barmode="group",
        bargap=0.3,
    )


def training_charts(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a training: its loss, its metric where it was validated, its size where that changes.

    Args:
        log: entries of a run's log; those of layers are passed over.

    Returns:
        Name, chart and a caption for every curve.
    """
    steps = [entry for entry in log if "layer" not in entry]
    charts = []
    for name, key, unit in (
        ("Loss", "loss", "step"),
        ("Metric", "metric", "epoch"),
        ("Size", "size", "step"),
    ):
        values = [entry[key] for entry in steps if key in entry and math.isfinite(entry[key])]
        if len(values) < 2 or (key == "size" and len(set(values)) < 2):
            continue
        last = statistics.fmean(values[-max(1, len(values) // 20) :])
        group = math.ceil(len(values) / _POINTS)
        charts.append({
            "name": name,
            "chart": _training_chart(values, group, "bytes" if key == "size" else key, unit),
            "caption": f"{len(values):,} {unit}s: {values[0]:.4g} at the first, {last:.4g} on average over "
            f"the last twentieth."
            + (f" The line averages {group} {unit}s each, the band holds all of them." if group > 1 else ""),
        })
    return charts


def _training_chart(values: Sequence[float], group: int, quantity: str, unit: str) -> Chart:
    parts = [values[start : start + group] for start in range(0, len(values), group)]
    across = [
        1 + start + (len(part) - 1) / 2
        for start, part in zip(range(0, len(values), group), parts, strict=True)
    ]
    traces = []
    if group > 1:
        edge = {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        traces.append({**_lines(across, [max(part) for part in parts]), **edge})
        band = {"fill": "tonexty", "fillcolor": "var(--band)"}
        traces.append({**_lines(across, [min(part) for part in parts]), **edge, **band})
    traces.append({
        **_lines(
            across, [statistics.fmean(part) for part in parts], {"color": "var(--compressed)", "width": 2.5}
        ),
        "name": quantity,
        "hovertemplate": "%{y:.4g}<extra></extra>",
    })
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > _LOG_SCALE_FROM
    scale = {"type": "log", "exponentformat": "power", "dtick": _decades(traces)} if logarithmic else {}
    if quantity == "bytes":
        scale |= {"exponentformat": "SI"}
    return _chart(
        traces,
        xaxis=_axis(unit, tickformat=",d", **({"dtick": 1} if len(values) <= 12 else {})),
        yaxis=_axis(quantity, **scale),
        height=280,
        hovermode="x unified",
        showlegend=False,
    )


def runs_chart(runs: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    """Several runs: the metric by each kind of cost, among which the page's menu chooses.

    Args:
        runs: name, value, dense_value, and shares: cost -> share of the dense network's, None where unknown.
        metric: its name.

    Returns:
        The chart, drawn by the first cost; `layout.meta.costs` holds the places of all traces by each.
    """
    costs = [name for name in runs[0]["shares"] if all(run["shares"].get(name) for run in runs)]
    traces = []
    for index, run in enumerate(runs):
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "x": [run["shares"][costs[0]]],
            "y": [run["value"]],
            "name": html.escape(run["name"]),
            "marker": {
                "size": 15,
                "color": f"var(--series-{index % _COLOURS})",
                "symbol": ("circle", "square", "diamond", "cross", "triangle-up")[index % 5],
            },
            "hovertemplate": "%{x:.1%} of dense<br>" + html.escape(metric) + " %{y:.4f}",
        })
    dense = sorted({run["dense_value"] for run in runs if math.isfinite(run["dense_value"])})
    traces.append({
        "type": "scatter",
        "mode": "markers",
        "x": [1.0] * len(dense),
        "y": dense,
        "name": "dense",
        "marker": {"size": 13, "symbol": "star", "color": "var(--dense)"},
        "hovertemplate": "dense<br>" + html.escape(metric) + " %{y:.4f}<extra></extra>",
    })
    beside = {name: [*([run["shares"][name]] for run in runs), [1.0] * len(dense)] for name in costs}
    return _chart(
        traces,
        xaxis=_axis("share of the dense network", tickformat=".0%", rangemode="tozero"),
        yaxis=_axis(html.escape(metric)),
        height=420,
        meta={"costs": {words(name): places for name, places in beside.items()}},
    )


# -- parts


def words(cost: str) -> str:
    """A cost's name as text: multiply_adds -> multiply-adds.

    Args:
        cost: the name of a field.

    Returns:
        The text.
    """
    return cost.replace("multiply_adds", "multiply-adds").replace("_", " ")


def threads(count: int) -> str:
    """A number of threads in words.

    Args:
        count: at least 1.

    Returns:
        The words.
    """
    return "1 thread" if count == 1 else f"{count} threads"


def duration(seconds: float) -> str:
    """A time with three digits and a fitting unit.

    Args:
        seconds: the time.

    Returns:
        The text.

    Examples:
        >>> duration(0.000012), duration(0.0123), duration(2.5)
        ('12 µs', '12.3 ms', '2.5 s')
    """
    unit, factor = ("µs", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    return f"{seconds * factor:.3g} {unit}"


def _lines(x: Sequence[float], y: Sequence[float], line: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": dict(line or {})}


def _series(index: int) -> dict[str, Any]:
    dash = _DASHES[index // _COLOURS % len(_DASHES)]
    return {"color": f"var(--series-{index % _COLOURS})", "width": 2, "dash": dash}


def _axis(title: str | None, **options: Any) -> dict[str, Any]:
    axis = {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "minor": {"ticks": ""},
        **options,
    }
    return {key: value for key, value in axis.items() if value is not None}


def _share_axis(title: str, shares: Sequence[float]) -> dict[str, Any]:
    ticks = [share for share in _SHARES if 0.999 * min(shares) <= share <= 1.001 * max(*shares, 0.0)]
    if len(ticks) < 2:
        return _axis(title, type="log", tickformat=".1%", nticks=5)
    return _axis(title, type="log", tickvals=ticks, ticktext=[f"{100 * share:g} %" for share in ticks])


def _decades(traces: Sequence[Mapping[str, Any]]) -> Any:
    """The distance of ticks on a logarithmic axis: decades where there are some, else Plotly's choice."""
    values = [value for trace in traces for value in trace["y"] if value > 0]
    if not values or max(values) < 30 * min(values):
        return None
    return max(1, math.ceil(math.log10(max(values) / min(values)) / 6))


def _chart(traces: list[dict[str, Any]], **layout: Any) -> Chart:
    return {
        "data": traces,
        "layout": {
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--muted)"},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "font": {"color": "var(--text)"},
            },
            "hoverlabel": {
                "bgcolor": "var(--surface)",
                "bordercolor": "var(--line)",
                "font": {"color": "var(--text)"},
                "align": "left",
                "namelength": -1,
            },
            "hovermode": "closest",
            **layout,
        },
    }
