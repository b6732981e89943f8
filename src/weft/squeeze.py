"""The whole path in one call."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from weft.measure import check_repeatable, inputs, quality
from weft.plan.allocate import allocate
from weft.plan.budget import Budget
from weft.plan.latency import LatencyTable
from weft.plan.memory import MemoryTable
from weft.report.report import Report, measure
from weft.schemes.direct import compress
from weft.schemes.fine_tune import fine_tune
from weft.schemes.search import search
from weft.structures.base import Structure
from weft.survey import survey


def squeeze(
    model: nn.Module,
    data: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    families: str | Iterable[str | type[Structure]] = "LowRank",
    epochs: int = 0,
    learning_rate: float = 1e-3,
    shown: bool | None = None,
    **budget: Any,
) -> tuple[nn.Module, Report]:
    """Surveys, plans, compresses, fine-tunes if asked, and measures.

    Args:
        model: the dense network; it is not changed.
        data: (inputs, labels) batches that can be iterated several times (else a TypeError): calibration,
            training, what a budget that keeps is searched on, and, without `held_out`, the reported metric.
        held_out: (inputs, labels) batches for the report.
        families: "all", names, or classes. Low rank gives its whole error curve from one factorisation; other
            families fit size by size, which takes far longer; see `scout` of `weft.allocate`.
        epochs: passes of fine-tuning over `data` with the dense network as teacher; 0 for none.
        learning_rate: of the fine-tuning.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).
        **budget: the limits of `weft.Budget`, such as `bytes=0.25` or `keep=0.99`; one on latency is that of
            single samples with the current number of threads.

    Returns:
        The compressed network and its report.

    Raises:
        TypeError: a budget's name is unknown.

    Examples:
        >>> import torch, weft
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> data = [(torch.randn(64, 32), torch.randint(4, (64,)))]
        >>> small, report = weft.squeeze(model, data, families="LowRank", parameters=0.5)
        >>> report.cost.parameters <= 0.5 * report.dense_cost.parameters
        True
    """
    unknown = sorted(set(budget) - {field.name for field in fields(Budget)})
    if unknown:
        raise TypeError(f"squeeze() got an unexpected keyword argument {unknown[0]!r}")
    limits = Budget(**budget)
    for argument, batches in (("data", data), ("held_out", held_out)):
        if batches is not None:
            check_repeatable(argument, batches)
    found = survey(model, inputs(data), shown=shown)
    sample = next(iter(inputs(data)))
    tables: dict[str, Any] = {}
    if limits.latency is not None or limits.latency_seconds is not None:
        tables["latency"] = LatencyTable(model, found, sample)
    if limits.peak_memory is not None:
        tables["memory"] = MemoryTable(model, found, sample)
    if limits.keep is None:
        plan = allocate(found, families, limits, shown=shown, **tables)
        small, _ = compress(model, plan, found, batches=inputs(data), shown=shown)
    else:

        def evaluate(network: nn.Module) -> float:
            return quality(network, data, shown=False)

        small = search(
            model, found, families, limits, evaluate=evaluate, batches=inputs(data), shown=shown, **tables
        ).model
    if epochs:
        small, _ = fine_tune(
            small, data, teacher=model, epochs=epochs, learning_rate=learning_rate, shown=shown
        )
    return small, measure(small, against=model, data=data if held_out is None else held_out, shown=shown)
