"""The page: one self-contained HTML file, rendered from a measurement's JSON.

What is shown is computed here and drawn by the templates, one per section: `templates/page.html` includes
them in their order, together with the style sheet and the script. Nothing on the page comes from elsewhere,
which its content security policy enforces.
"""

import importlib.metadata
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from weft.report.picture import KINDS, describe, draw_svg
from weft.structures.base import Rectangle, matrix_shape

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("weft.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Of the plan's curves: losses below this share of the largest are not drawn; labelled shares; colours.
_LEAST_LOSS = 1e-5
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_COLOURS = 8
_POINTS = 400  # of a training curve; more steps are averaged in groups
_LOG_SCALE_FROM = 30.0  # the ratio of largest and smallest loss


def render_page(
    measurement: Mapping[str, Any],
    rows: Sequence[tuple[str, str, str, str]],
    *,
    title: str,
    command: str = "",
    asked: str = "",
    log: Iterable[Mapping[str, Any]] = (),
    pareto: Mapping[str, Any] | None = None,
) -> str:
    """Renders the page.

    Args:
        measurement: as `Measurement.to_json` gives it.
        rows: the table's rows: what, dense, compressed, rate.
        title: the page's title.
        command: the command that repeats the run.
        asked: what was asked for, such as the budget and the families.
        log: entries of the runs' logs, in their order: those of `weft.compress` bring the layers' errors,
            those of a training its curves; others are passed over.
        pareto: the plan's curves of cost and predicted loss, as a plan's JSON has them.

    Returns:
        HTML that needs nothing from elsewhere; all names are escaped.
    """
    log = list(log)
    layers = _layers(measurement["layers"], log)
    return _ENVIRONMENT.get_template("page.html").render(
        title=title,
        asked=asked,
        command=command,
        version=importlib.metadata.version("weft"),
        figures=_figures(measurement),
        rows=rows,
        latencies=[_latency(entry) for entry in measurement["latencies"]],
        layers=layers,
        errors_known=any(layer["error"] is not None for layer in layers),
        convolutions=any(len(entry["shape"]) > 2 for entry in measurement["layers"]),
        legend=_legend(measurement["layers"]),
        pareto=None if pareto is None else _pareto(pareto),
        training=_training(log),
        environment=measurement["environment"],
    )


# -- the figures on top


def _figures(measurement: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that sum the run up: name, value, and what it compares with."""
    was, now = measurement["dense_value"], measurement["value"]
    figures = [_figure(measurement["metric"], f"{now:.4f}", f"{now - was:+.4f} from {was:.4f}")]
    dense, cost = measurement["dense_cost"], measurement["cost"]
    for name, key, write in (
        ("bytes stored", "bytes", _bytes),
        ("multiply-adds", "multiply_adds", _compact),
    ):
        if dense[key]:
            value = f"{100 * cost[key] / dense[key]:.1f} %"
            figures.append(_figure(name, value, f"{write(cost[key])} of {write(dense[key])}"))
    was, now = measurement.get("dense_footprint"), measurement.get("footprint")
    if was and now:
        for name, key in (("bytes at the entropy bound", "entropy_bound"), ("bytes in memory", "memory")):
            share = f"{100 * now[key] / max(was['stored'], 1):.1f} %"
            figures.append(_figure(name, share, f"{_bytes(now[key])}; dense {_bytes(was['stored'])} stored"))
    for entry in measurement["latencies"]:
        ratio = entry["compressed"]["median"] / entry["dense"]["median"]
        name = f"time, batch {entry['batch']}, {_threads(entry['threads'])}"
        figures.append(_figure(name, f"{100 * ratio:.0f} %", _verdict(entry)))
    return figures


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _verdict(entry: Mapping[str, Any]) -> str:
    """What the timing supports: a difference only where each median lies outside the other's spread."""
    dense, compressed = entry["dense"], entry["compressed"]
    speedup = dense["median"] / compressed["median"]
    if _inside(dense["median"], compressed) or _inside(compressed["median"], dense):
        return "no clear difference: within the spread"
    return (
        f"{speedup:.2f} times as fast" if speedup > 1 else f"slower: {1 / speedup:.2f} times the dense time"
    )


def _inside(median: float, other: Mapping[str, float]) -> bool:
    return other["low"] <= median <= other["high"]


# -- latencies


def _latency(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One pair of bars, in per cent of its own scale."""
    end = 1.04 * max(entry[name]["high"] for name in ("dense", "compressed"))
    bars = []
    for name in ("dense", "compressed"):
        timing = entry[name]
        unit, factor = _unit(entry["dense"]["median"])
        low, median, high = (timing[key] * factor for key in ("low", "median", "high"))
        bars.append({
            "name": name,
            "median": f"{median:.3g} {unit}",
            "spread": f"{low:.3g} to {high:.3g}",
            "calls": timing["calls"],
            **{key: round(100 * timing[key] / end, 2) for key in ("low", "high")},
            "length": round(100 * timing["median"] / end, 2),
        })
    return {
        "name": f"Batch {entry['batch']}, {_threads(entry['threads'])}",
        "verdict": _verdict(entry),
        "bars": bars,
    }


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _unit(seconds: float) -> tuple[str, float]:
    return ("µs", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)


# -- layers


def _layers(entries: Iterable[Mapping[str, Any]], log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    errors = {entry["layer"]: entry["error"] for entry in log if "layer" in entry and "error" in entry}
    layers = []
    for entry in entries:
        picture = [Rectangle(**block) for block in entry["picture"]]
        dense, cost = entry["dense"], entry["cost"]
        layers.append({
            "name": entry["name"] or "(the network itself)",
            "structure": entry["structure"],
            "note": "only storage shrinks" if entry.get("only_storage_shrinks") else "",
            "shape": " × ".join(map(str, entry["shape"])),
            "entries": math.prod(entry["shape"]),
            "costs": [
                {
                    "dense": write(dense[key]),
                    "now": write(cost[key]),
                    "value": cost[key],
                    "share": f"{100 * cost[key] / dense[key]:.1f} %" if dense[key] else "",
                }
                for key, write in (("parameters", _whole), ("bytes", _bytes), ("multiply_adds", _whole))
            ],
            "error": entry.get("error", errors.get(entry["name"])),
            "svg": draw_svg(picture, *matrix_shape(entry["shape"])),
            "description": describe(picture),
        })
    return layers


def _legend(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The kinds of blocks that occur, each with its name."""
    kinds = {block["kind"] for entry in entries for block in entry["picture"]}
    return [(kind, look.name) for kind, look in KINDS.items() if kind in kinds]


def _whole(number: int) -> str:
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number} B" if number < 1000 else f"{_compact(number)}B"


def _compact(number: int) -> str:
    """Three digits and a decimal prefix.

    Args:
        number: at least 0.

    Returns:
        The text, to be followed by a unit.

    Examples:
        >>> _compact(999), _compact(12_345), _compact(999_999)
        ('999', '12.3 k', '1 M')
    """
    if number < 1000:
        return str(number)
    power = 0
    value = float(f"{number:.3g}")  # rounded first, so that 999,999 is 1 M and not 1000 k
    while value >= 1000 and power < 5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {' kMGTP'[power]}"


# -- the plan's curves


def _pareto(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Curves in per cent of the plot's width and height, y downwards; None where there is nothing to draw.

    Both scales are logarithmic. A loss of zero has no place there: the dense network is left out.

    Args:
        data: as a plan's JSON has it.

    Returns:
        Lines, ticks and the plan's point.
    """
    dense = data["dense"]
    curves = {
        name: [(cost / dense, loss) for cost, loss in points if loss > 0 and cost > 0]
        for name, points in data["curves"].items()
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    chosen = (data["chosen"][0] / dense, data["chosen"][1])
    everything = [point for points in curves.values() for point in points]
    if chosen[1] > 0:
        everything.append(chosen)
    high = max(loss for _, loss in everything)
    low = max(min(loss for _, loss in everything), high * _LEAST_LOSS)
    left, right = min(cost for cost, _ in everything), max(max(cost for cost, _ in everything), 1.0)

    def place(cost: float, loss: float) -> tuple[float, float]:
        across = math.log(cost / left) / math.log(right / left) if right > left else 0.5
        down = math.log(high / max(loss, low)) / math.log(high / low) if high > low else 0.5
        return round(100 * across, 2), round(100 * down, 2)

    lines = []
    # That of all families comes last, above the others.
    for index, name in enumerate(sorted(curves, key=lambda name: (name == "all", name))):
        points = [place(*point) for point in curves[name] if point[1] >= low]
        lines.append({
            "name": "all families together" if name == "all" else name,
            "kind": "all" if name == "all" else f"family{index % _COLOURS}",
            "points": " ".join(f"{x},{y}" for x, y in points),
        })
    return {
        "cost": data["cost"].replace("_", "-"),
        "lines": lines,
        "chosen": place(*chosen) if chosen[1] > 0 else None,
        "chosen_text": f"{100 * chosen[0]:.1f} % of the {data['cost'].replace('_', '-')}",
        "ticks": [(place(left, loss)[1], f"{loss:.3g}") for loss in _ticks(low, high, logarithmic=True)],
        "shares": [
            (place(share, high)[0], f"{100 * share:g} %")
            for share in _SHARES
            if left * 0.999 <= share <= right * 1.001
        ],
    }


# -- training


def _training(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a training: its loss, its metric where it was validated, its size where that changes."""
    steps = [entry for entry in log if "layer" not in entry]
    curves = []
    for name, key in (("Loss", "loss"), ("Metric", "metric"), ("Size in bytes", "size")):
        values = [entry[key] for entry in steps if key in entry and math.isfinite(entry[key])]
        if key == "size" and len(set(values)) < 2:
            continue
        curve = _curve(values)
        if curve is not None:
            unit = "epochs" if key == "metric" else "steps"
            curves.append({"name": name, "unit": unit, **curve})
    return curves


def _curve(values: Sequence[float]) -> dict[str, Any] | None:
    """The curve in per cent of the plot's width and height, y downwards; None for fewer than two values."""
    if len(values) < 2:
        return None
    group = math.ceil(len(values) / _POINTS)
    groups = [values[start : start + group] for start in range(0, len(values), group)]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > _LOG_SCALE_FROM

    def height(value: float) -> float:
        if high <= low:
            return 50.0
        if logarithmic:
            return round(100 * math.log(high / value) / math.log(high / low), 2)
        return round(100 * (high - value) / (high - low), 2)

    across = [round(100 * index / (len(groups) - 1), 2) for index in range(len(groups))]
    upper = [f"{x},{height(max(part))}" for x, part in zip(across, groups, strict=True)]
    lower = [f"{x},{height(min(part))}" for x, part in zip(across, groups, strict=True)]
    middle = [f"{x},{height(statistics.fmean(part))}" for x, part in zip(across, groups, strict=True)]
    return {
        "steps": len(values),
        "group": group,
        "logarithmic": logarithmic,
        "line": " ".join(middle),
        "band": " ".join([*upper, *reversed(lower)]) if group > 1 else "",
        "ticks": [(height(value), f"{value:.3g}") for value in _ticks(low, high, logarithmic=logarithmic)],
        "first": f"{values[0]:.4g}",
        "last": f"{statistics.fmean(values[-max(1, len(values) // 20) :]):.4g}",
    }


def _ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Round values within a range.

    Args:
        low: its lower end.
        high: its upper end.
        logarithmic: whether to give powers of ten.

    Returns:
        Up to six values, or the powers of ten in the range.

    Examples:
        >>> _ticks(0.13, 0.71, logarithmic=False)
        [0.2, 0.4, 0.6]
        >>> _ticks(0.02, 30.0, logarithmic=True)
        [0.1, 1.0, 10.0]
    """
    if high <= low:
        return [low]
    if logarithmic:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [float(f"1e{power}") for power in powers]
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
