"""A measurement that can show itself."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from weft import checks
from weft.measure import (
    Footprint,
    Latency,
    LayerRow,
    Measurement,
    Metric,
    Timing,
    batch_size,
    check_repeatable,
    environment,
    footprint,
    latencies,
    layer_rows,
    network_cost,
    peak_activations,
    quality,
    quality_name,
)
from weft.report.page import render_comparison, render_page
from weft.storage import read_json, write_text
from weft.structures.base import Cost


@dataclass(frozen=True)
class Report(Measurement):
    """Dense and compressed side by side, as a table, JSON or a page."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table's rows.

        Returns:
            (what, dense, compressed, rate) as text.
        """
        dense, cost = self.dense_cost, self.cost
        rows = [
            (
                self.metric,
                f"{self.dense_value:.4f}",
                f"{self.value:.4f}",
                f"{self.value - self.dense_value:+.4f}",
            )
        ]
        for name, was, now in (
            ("parameters", dense.parameters, cost.parameters),
            ("bytes", dense.bytes, cost.bytes),
            ("multiply-adds", dense.multiply_adds, cost.multiply_adds),
        ):
            rows.append(_counts(name, was, now))
        if self.dense_footprint is not None and self.footprint is not None:
            was, now = self.dense_footprint, self.footprint
            rows[3:3] = [
                _counts("bytes, entropy bound", was.entropy_bound, now.entropy_bound),
                _counts("bytes in memory", was.memory, now.memory),
            ]
        if self.dense_activations is not None and self.activations is not None:
            rows.append(_counts("peak activations, bytes", self.dense_activations, self.activations))
        for latency in self.latencies:
            threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
            rows.append((
                f"latency, batch {latency.batch}, {threads}",
                _milliseconds(latency.dense.median),
                _milliseconds(latency.compressed.median),
                f"{latency.speedup:.2f}x",
            ))
        return rows

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """Reads what `to_json` gave.

        Args:
            data: the measurement as JSON data.

        Returns:
            An equal report.
        """
        latency_rows = [
            Latency(row["batch"], row["threads"], Timing(**row["dense"]), Timing(**row["compressed"]))
            for row in data["latencies"]
        ]
        layers = [
            LayerRow(**{
                **row,
                "shape": tuple(row["shape"]),
                "dense": Cost(**row["dense"]),
                "cost": Cost(**row["cost"]),
            })
            for row in data["layers"]
        ]
        costs = {name: Cost(**data[name]) for name in ("dense_cost", "cost")}
        footprints = {
            name: Footprint(**data[name]) for name in ("dense_footprint", "footprint") if data.get(name)
        }
        return cls(**{**data, **costs, **footprints, "latencies": latency_rows, "layers": layers})

    def save(self, path: str | os.PathLike[str], *, command: str = "", asked: str = "") -> Path:
        """Writes the measurement as JSON, for `weft report`.

        Args:
            path: the file.
            command: the commands that repeat the run, one a line.
            asked: what was asked for, such as the budget and the families.

        Returns:
            The path.
        """
        record = {"weft_run": 1, "command": command, "asked": asked, "measurement": self.to_json()}
        return write_text(path, json.dumps(record, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple["Report", str, str]:
        """Reads what `save` wrote.

        Args:
            path: the file.

        Returns:
            The report, the commands that repeat the run, and what was asked for.
        """
        record = read_json(path, "weft_run", "write it with weft evaluate")
        return cls.from_json(record["measurement"]), record["command"], record.get("asked", "")

    def table(self) -> Table:
        """The table for a terminal.

        Returns:
            A rich table.
        """
        table = Table(title="dense vs compressed", title_justify="left")
        table.add_column("")
        for heading in ("dense", "compressed", "rate"):
            table.add_column(heading, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        rows = [("", "dense", "compressed", "rate"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def write_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "weft report",
        command: str = "",
        asked: str = "",
        log: Iterable[Mapping[str, Any]] = (),
        pareto: Mapping[str, Any] | None = None,
        others: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Path:
        """Writes the report as one self-contained page.

        Args:
            path: the file.
            title: the page's title.
            command: the commands that repeat the run, one a line, shown on the page.
            asked: what was asked for, such as the budget and the families.
            log: entries of the runs' logs, in their order: those of `weft.compress` bring the layers' errors,
                those of `weft.fine_tune` the training curve.
            pareto: the plan's curves of cost and predicted loss, as `plan.pareto.to_json()` gives them.
            others: why a layer's other families were not chosen, as `plan.others` says.

        Returns:
            The path.
        """
        page = render_page(
            self.to_json(),
            self.rows(),
            title=title,
            command=command,
            asked=asked,
            log=log,
            pareto=pareto,
            others=others,
        )
        return write_text(path, page)


def write_comparison(
    runs: Iterable[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    title: str = "weft: runs compared",
) -> Path:
    """Writes several runs side by side as one self-contained page.

    Args:
        runs: files that `Report.save` wrote, at least two; their names tell them apart.
        path: the file.
        title: the page's title.

    Returns:
        The path.
    """
    files = [Path(run) for run in runs]
    loaded = [Report.load(file) for file in files]
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [str(file.with_suffix("")) for file in files]
    return write_text(
        path,
        render_comparison(
            [
                {"name": name, "measurement": report.to_json(), "command": command, "asked": asked}
                for name, (report, command, asked) in zip(names, loaded, strict=True)
            ],
            title=title,
        ),
    )


def _counts(name: str, was: int, now: int) -> tuple[str, str, str, str]:
    return name, f"{was:,}", f"{now:,}", f"{was / now:.2f}x" if now else "-"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def measure(
    small: nn.Module,
    *,
    against: nn.Module,
    data: Iterable[Any],
    metric: Metric | None = None,
    metric_name: str | None = None,
    batches: Sequence[int] = (1, 128),
    thread_counts: Sequence[int] | None = None,
    seconds: float = 1.0,
    shown: bool | None = None,
) -> Report:
    """Measures a compressed network against its dense one: metric, cost, latency, in the same run.

    Args:
        small: the compressed network.
        against: the dense one.
        data: held-out batches of (inputs, labels), not an iterator that is used up after one pass.
        metric: takes a model and the data, larger is better; where None top-1 accuracy, or R² where the
            labels are floating.
        metric_name: its name in tables; the function's own where None.
        batches: batch sizes for the latency.
        thread_counts: torch's thread counts; the current one where None.
        seconds: about how long to time each combination.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

    Returns:
        The report.

    Raises:
        ValueError: the data are empty.

    Examples:
        >>> import torch, weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 3))
        >>> small, _ = weft.compress(model, {"0": LowRank(rank=1)})
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
        >>> report = weft.measure(small, against=model, data=data, batches=[1], seconds=0.01)
        >>> report.cost.parameters, report.dense_cost.parameters
        (14, 27)
    """
    check_repeatable("data", data)
    first = next((batch for batch in data if batch_size(batch)), None)
    if first is None:
        raise ValueError(checks.fault("data", "not empty", "no samples", "pass at least one batch"))
    sample = first[0] if isinstance(first, list | tuple) and len(first) == 2 else first
    if metric is None:

        def evaluate(model: nn.Module) -> float:
            return quality(model, data, shown=shown)

        name = quality_name(first)
    else:

        def evaluate(model: nn.Module) -> float:
            return float(metric(model, data))

        name = getattr(metric, "__name__", "metric")
    report = Report(
        metric=metric_name or name,
        dense_value=evaluate(against),
        value=evaluate(small),
        dense_cost=network_cost(against, sample),
        cost=network_cost(small, sample),
        latencies=latencies(
            against, small, sample, batches=batches, thread_counts=thread_counts, seconds=seconds, shown=shown
        ),
        layers=layer_rows(small, against=against, shown=shown),
        environment=environment(),
        dense_activations=peak_activations(against, sample),
        activations=peak_activations(small, sample),
    )
    # After the timings, when everything that a call unpacks and keeps is there.
    return replace(report, dense_footprint=footprint(against), footprint=footprint(small))
