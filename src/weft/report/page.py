"""The pages: one self-contained HTML file for a run, or for several side by side, from measurements' JSON.

What is shown is computed here and in `charts`, and laid out by the templates: `page.html` includes one per
section, `base.html` the style sheet, the script and the charts' library. Nothing on a page comes from
elsewhere, which its content security policy enforces.
"""

import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from weft import checks
from weft.plan.budget import COSTS
from weft.plan.pareto import ALL
from weft.report import charts
from weft.report.picture import KINDS, describe, draw_svg
from weft.structures.base import Rectangle, matrix_shape

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("weft.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# From which multiple of the curve's loss on a plan is said to lie above it.
_ABOVE = 1.05


def render_page(
    measurement: Mapping[str, Any],
    rows: Sequence[tuple[str, str, str, str]],
    *,
    title: str,
    command: str = "",
    asked: str = "",
    log: Iterable[Mapping[str, Any]] = (),
    pareto: Mapping[str, Any] | None = None,
    others: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Renders the page of one run.

    Args:
        measurement: as `Measurement.to_json` gives it.
        rows: the table's rows: what, dense, compressed, rate.
        title: the page's title.
        command: the commands that repeat the run, one a line.
        asked: what was asked for, such as the budget and the families.
        log: entries of the runs' logs, in their order: those of `weft.compress` bring the layers' errors,
            those of a training its curves; others are passed over.
        pareto: the plan's curves of cost and predicted loss, as a plan's JSON has them.
        others: why a layer's other families were not chosen, by layer and family.

    Returns:
        HTML that needs nothing from elsewhere; all names are escaped.
    """
    log = list(log)
    drawn: dict[str, charts.Chart] = {}
    layers = _layers(measurement["layers"], log, pareto, others or {}, drawn)
    whole = None if pareto is None else charts.pareto_chart(pareto)
    if whole is not None:
        drawn["pareto"] = whole
    if layers:
        drawn["costs"] = charts.cost_chart([
            {"name": layer["name"], "structure": layer["structure"], **layer["bytes"]} for layer in layers
        ])
    if measurement["latencies"]:
        drawn["latencies"] = charts.latency_chart(measurement["latencies"])
    training = charts.training_charts(log)
    for number, curve in enumerate(training):
        drawn[f"training-{number}"] = curve["chart"]
    return _render(
        "page.html",
        drawn,
        title=title,
        asked=asked,
        command=command,
        figures=_figures(measurement),
        rows=rows,
        verdicts=[(_pair_name(entry), _verdict(entry)) for entry in measurement["latencies"]],
        layers=layers,
        columns=_columns(layers, pareto),
        families=sorted({layer["family"] for layer in layers}),
        convolutions=any(len(entry["shape"]) > 2 for entry in measurement["layers"]),
        legend=_legend(measurement["layers"]),
        pareto=None if whole is None or pareto is None else _chosen(pareto),
        training=training,
        environment=measurement["environment"],
    )


def _render(template: str, drawn: Mapping[str, charts.Chart], **values: Any) -> str:
    return _ENVIRONMENT.get_template(template).render(
        version=importlib.metadata.version("weft"),
        charts=drawn,
        library=charts.library() if drawn else "",
        **values,
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
        figures.append(_figure(f"time, {_pair_name(entry)}", f"{100 * ratio:.0f} %", _verdict(entry)))
    return figures


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _pair_name(entry: Mapping[str, Any]) -> str:
    return f"batch {entry['batch']}, {charts.threads(entry['threads'])}"


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


# -- layers


def _layers(
    entries: Sequence[Mapping[str, Any]],
    log: Iterable[Mapping[str, Any]],
    pareto: Mapping[str, Any] | None,
    others: Mapping[str, Mapping[str, str]],
    drawn: dict[str, charts.Chart],
) -> list[dict[str, Any]]:
    """The table's layers; their charts are added to those drawn."""
    errors = {entry["layer"]: entry["error"] for entry in log if "layer" in entry and "error" in entry}
    planned: Mapping[str, Any] = {} if pareto is None else pareto.get("layers", {})
    lost = sum(layer["loss"] for layer in planned.values())
    layers = []
    for number, entry in enumerate(entries):
        picture = [Rectangle(**block) for block in entry["picture"]]
        dense, cost, name = entry["dense"], entry["cost"], entry["name"]
        family, _, size = entry["structure"].partition("(")
        plan = planned.get(name)
        own: list[tuple[str, str]] = []
        values = entry.get("singular_values")
        chart = None if values is None else charts.singular_value_chart(values)
        if chart is not None:
            drawn[f"values-{number}"] = chart
            own.append((f"values-{number}", "Singular values of the weight before and after."))
        if plan is not None and pareto is not None:
            chart = charts.layer_error_chart(plan, pareto["cost"], entry["structure"])
            if chart is not None:
                drawn[f"errors-{number}"] = chart
                own.append((
                    f"errors-{number}",
                    "What each family could reach in this layer when it was planned.",
                ))
        error = errors.get(name)
        if error is None and plan is not None:
            error = _planned_error(plan, entry["structure"])
        layers.append({
            "name": name or "(the network itself)",
            "structure": entry["structure"],
            "family": family,
            "size": size.removesuffix(")"),
            "note": _note(entry),
            "shape": " × ".join(map(str, entry["shape"])),
            "bytes": {"dense": dense["bytes"], "now": cost["bytes"]},
            "costs": [
                {
                    "now": _bytes(cost[key]) if key == "bytes" else _compact(cost[key]),
                    "exact": f"{dense[key]:,} → {cost[key]:,}",
                    "value": cost[key],
                    "share": f"{100 * cost[key] / dense[key]:.1f} %" if dense[key] else "",
                }
                for key in COSTS
            ],
            "error": error,
            "distance": entry.get("distance"),
            "sensitivity": None if plan is None else plan["sensitivity"],
            "loss": None if plan is None or not lost else plan["loss"] / lost,
            "others": list(others.get(name, {}).items()),
            "svg": draw_svg(picture, *matrix_shape(entry["shape"])),
            "description": describe(picture),
            "charts": own,
        })
    return layers


def _note(entry: Mapping[str, Any]) -> str:
    """What is said of a structure that saves no multiply-adds; a matrix may still be read faster."""
    if not entry.get("only_storage_shrinks"):
        return ""
    return "only storage shrinks" if len(entry["shape"]) > 2 else "no fewer multiply-adds"


def _planned_error(plan: Mapping[str, Any], structure: str) -> float | None:
    """The error that a plan gives a structure, where its thinned curves have it."""
    points = (point for curve in plan["curves"].values() for point in curve)
    return next((error for _, error, text in points if text == structure), None)


def _columns(layers: Sequence[Mapping[str, Any]], pareto: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The columns behind the costs that have something to tell: key, heading, explanation, format."""
    columns = [
        (
            "error",
            "fit error",
            "the relative error of the fit, in the norm that it minimised, before training",
            ".4f",
        ),
        ("distance", "distance", "‖W − Ŵ‖ / ‖W‖ now, in the plain Frobenius norm, training included", ".4f"),
        ("sensitivity", "sensitivity", "predicted loss of the network per squared relative error", ".3g"),
        ("loss", "share of loss", "of the network's predicted loss", ".1%"),
    ]
    values = {column[0]: {layer[column[0]] for layer in layers} - {None} for column in columns}
    kept = [column for column in columns if values[column[0]]]
    if len(layers) > 1 and len(values["sensitivity"]) == 1:  # nothing is known of it, or nothing to compare
        alike = (
            "of the network's predicted loss, a squared relative error counting the same in every layer: "
            "survey with --fisher, or plan with --sensitivity, to weigh them"
        )
        kept = [
            (key, heading, alike if key == "loss" else told, spec)
            for key, heading, told, spec in kept
            if key != "sensitivity"
        ]
    names = ("key", "heading", "help", "format")
    return [dict(zip(names, column, strict=True)) for column in kept]


def _legend(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The kinds of blocks that occur, each with its name."""
    kinds = {block["kind"] for entry in entries for block in entry["picture"]}
    return [(kind, look.name) for kind, look in KINDS.items() if kind in kinds]


def _chosen(pareto: Mapping[str, Any]) -> dict[str, str]:
    """What the chart's caption says of the plan."""
    now, loss = pareto["chosen"]
    cost = charts.words(pareto["cost"])
    if loss <= 0:
        return {"cost": cost, "chosen": ""}
    told = f"The plan has {100 * now / pareto['dense']:.1f} % of the {cost}."
    least = min((reached for amount, reached in pareto["curves"][ALL] if amount <= now), default=loss)
    if loss > _ABOVE * least:
        told += " It lies above the curve because it has to keep other limits as well, or was made by hand."
    return {"cost": cost, "chosen": told}


def _format(value: float | None, spec: str) -> str:
    """A number for a cell, nothing where there is none."""
    return "" if value is None else format(value, spec)


_ENVIRONMENT.filters["number"] = _format


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


# -- several runs


def render_comparison(runs: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Renders the page of several runs side by side.

    Args:
        runs: "name", "measurement" as `Measurement.to_json` gives it, "command" and "asked".
        title: the page's title.

    Returns:
        HTML that needs nothing from elsewhere; all names are escaped.

    Raises:
        ValueError: there are fewer than two runs, or they were measured by different metrics.
    """
    if len(runs) < 2:
        raise ValueError(checks.fault("runs", "at least 2 to compare", len(runs), "use render_page for one"))
    metrics = sorted({run["measurement"]["metric"] for run in runs})
    if len(metrics) > 1:
        remedy = "compare runs that were measured alike"
        raise ValueError(checks.fault("runs", "of one metric", ", ".join(metrics), remedy))
    drawn = {
        "runs": charts.runs_chart(
            [
                {
                    "name": run["name"],
                    "value": run["measurement"]["value"],
                    "dense_value": run["measurement"]["dense_value"],
                    "shares": _shares(run["measurement"]),
                }
                for run in runs
            ],
            metrics[0],
        )
    }
    return _render(
        "comparison.html",
        drawn,
        title=title,
        runs=[
            {
                "name": run["name"],
                "asked": run["asked"],
                "command": run["command"],
                "environment": run["measurement"]["environment"],
            }
            for run in runs
        ],
        rows=_run_rows([run["measurement"] for run in runs], metrics[0]),
        layers=_layers_beside([run["measurement"] for run in runs]),
        same_dense=len({run["measurement"]["dense_value"] for run in runs}) == 1,
    )


def _shares(measurement: Mapping[str, Any]) -> dict[str, float | None]:
    dense, cost = measurement["dense_cost"], measurement["cost"]
    shares = {
        key: cost[key] / dense[key] if dense[key] else None
        for key in ("bytes", "parameters", "multiply_adds")
    }
    for entry in measurement["latencies"]:
        shares[f"time, {_pair_name(entry)}"] = entry["compressed"]["median"] / entry["dense"]["median"]
    return shares


def _run_rows(measurements: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The table of runs: every quantity that one of them has; the best of a row is marked."""
    values = [measurement["value"] for measurement in measurements]
    rows = [
        {
            "name": metric,
            "cells": [
                {"text": f"{entry['value']:.4f}", "note": f"{entry['value'] - entry['dense_value']:+.4f}"}
                for entry in measurements
            ],
            "best": _best(values, max),
        }
    ]
    shares = [_shares(measurement) for measurement in measurements]
    for name in dict.fromkeys(name for own in shares for name in own):
        own = [share.get(name) for share in shares]
        if any(share is not None for share in own):
            rows.append({
                "name": charts.words(name),
                "cells": [
                    {"text": "-" if share is None else f"{100 * share:.1f} %", "note": _absolute(entry, name)}
                    for share, entry in zip(own, measurements, strict=True)
                ],
                "best": _best([math.inf if share is None else share for share in own], min),
            })
    return rows


def _absolute(measurement: Mapping[str, Any], name: str) -> str:
    if name in measurement["cost"]:
        number = measurement["cost"][name]
        return _bytes(number) if name == "bytes" else _compact(number)
    pairs = {f"time, {_pair_name(entry)}": entry for entry in measurement["latencies"]}
    return charts.duration(pairs[name]["compressed"]["median"]) if name in pairs else ""


def _best(values: Sequence[float], choose: Any) -> list[bool]:
    """Which are the best; none where all are alike."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or len(set(values)) < 2:
        return [False] * len(values)
    return [value == choose(finite) for value in values]


def _layers_beside(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers that a run replaced, with each run's structure; where runs differ most comes first."""
    by_name = [{entry["name"]: entry for entry in measurement["layers"]} for measurement in measurements]
    rows = []
    for name in dict.fromkeys(name for own in by_name for name in own):
        entries = [own.get(name) for own in by_name]
        some = next(entry for entry in entries if entry is not None)
        dense = max(some["dense"]["bytes"], 1)
        shares = [1.0 if entry is None else entry["cost"]["bytes"] / dense for entry in entries]
        rows.append({
            "name": name or "(the network itself)",
            "shape": " × ".join(map(str, some["shape"])),
            "cells": [
                {
                    "structure": "dense" if entry is None else entry["structure"],
                    "share": f"{100 * share:.1f} %",
                    "value": share,
                }
                for entry, share in zip(entries, shares, strict=True)
            ],
            "apart": max(shares) - min(shares),
        })
    return sorted(rows, key=lambda row: -row["apart"])
