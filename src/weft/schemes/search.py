"""Search: the smallest network that keeps a share of a metric, every step measured on held-out data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from weft import checks
from weft.measure import Batch, check_repeatable
from weft.plan.allocate import allocate
from weft.plan.budget import Budget
from weft.plan.constraints import Constraints
from weft.plan.error_curves import error_curves
from weft.plan.latency import LatencyTable
from weft.plan.memory import MemoryTable
from weft.plan.plan import Plan
from weft.plan.sensitivity import Sensitivity
from weft.progress import track
from weft.schemes.direct import compress
from weft.structures import select
from weft.structures.base import Candidate, Structure
from weft.survey import Survey

MINIMISED = ("bytes", "parameters", "multiply_adds", "latency")


class SearchResult(NamedTuple):
    """The network that a search found.

    Attributes:
        model: the compressed network; the dense one itself where nothing smaller keeps the metric.
        plan: its plan.
        value: its metric on the search's data.
        dense_value: the dense network's.
        log: one dictionary per step: share, value, whether it was enough.
    """

    model: nn.Module
    plan: Plan
    value: float
    dense_value: float
    log: list[dict[str, Any]]


def search(
    model: nn.Module,
    survey: Survey,
    families: str | Iterable[str | type[Structure]],
    budget: Budget,
    *,
    evaluate: Callable[[nn.Module], float],
    batches: Iterable[Batch] | None = None,
    minimise: str = "bytes",
    margin: float = 0.5,
    steps: int = 7,
    sequential: bool = False,
    curves: Mapping[str, Sequence[Candidate]] | None = None,
    sensitivity: Sensitivity | None = None,
    latency: LatencyTable | None = None,
    memory: MemoryTable | None = None,
    constraints: Constraints | None = None,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
    shown: bool | None = None,
) -> SearchResult:
    """Finds the smallest network that keeps a share of the dense network's metric.

    Halves the interval of shares of the minimised cost: plan, compress, evaluate. What is chosen for its
    value on some data does a little worse on other data, so the search itself is stricter than the promise,
    by `margin`.

    Args:
        model: the dense network; it is not changed.
        survey: its survey.
        families: "all", names, or classes.
        budget: `keep`, and any other limits, which hold as well.
        evaluate: gives a network's metric on held-out data; larger is better, and the dense network's is
            above 0.
        batches: calibration data without labels, for the corrections of `compress`.
        minimise: what is made small: "bytes", "parameters", "multiply_adds" or "latency".
        margin: the part of the allowed loss that the search leaves unused; 0 for none.
        steps: halvings of the interval.
        sequential: whether layers are fitted in sequence; see `compress`.
        curves: error curves that are already known.
        sensitivity: what the layers' errors cost the network.
        latency: times of this machine, where time is limited or minimised.
        memory: bytes in memory, where their peak is limited.
        constraints: what stays dense, and families by layer.
        workers: processes that compute curves and fit, one thread each.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

    Returns:
        The network, its plan and the steps.

    Raises:
        ValueError: the budget has no `keep`, the dense network's metric is not above 0, or the other limits
            cannot be met together with it.

    Examples:
        >>> import torch, weft
        >>> from weft.measure import accuracy
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = torch.randn(200, 16)
        >>> held_out = [(x, model(x).argmax(-1))]
        >>> found = search(
        ...     model, weft.survey(model, [x]), "LowRank", Budget(keep=0.9),
        ...     evaluate=lambda network: accuracy(network, held_out), batches=[x],
        ... )
        >>> found.value >= 0.9 * found.dense_value
        True
    """
    checks.one_of("minimise", minimise, MINIMISED)
    checks.share("margin", margin, zero_allowed=True)
    checks.integer_between("steps", steps, 1, None)
    if budget.keep is None:
        remedy = "e.g. Budget(keep=0.99), or call weft.allocate"
        raise ValueError(checks.fault("budget keep", "given", None, remedy))
    if batches is not None:
        check_repeatable("batches", batches)
    dense_value = evaluate(model)
    if not dense_value > 0:
        remedy = "give a metric that is larger where the network is better, and above 0"
        raise ValueError(checks.fault("metric of the dense network", "above 0", dense_value, remedy))
    wanted = dense_value * (1 - (1 - budget.keep) * (1 - margin))
    chosen = select(families)
    pool: dict[str, Any] = {"workers": workers, "ray": ray, "worker_memory": worker_memory}
    if curves is None:
        curves = error_curves(survey, chosen, constraints=constraints, shown=shown, **pool)
    others = {name: limit for name, limit in budget.given().items() if name != "keep"}
    log: list[dict[str, Any]] = []

    def attempt(share: float | None) -> tuple[Plan, nn.Module] | None:
        limits = dict(others)
        if share is not None:
            given = limits.get(minimise, 1.0)
            absolute = not isinstance(given, float) and given != 1
            most = given / getattr(survey.total, minimise) if absolute else given
            limits[minimise] = min(share, most)
        try:
            plan = allocate(
                survey,
                chosen,
                Budget(**limits),
                curves=curves,
                sensitivity=sensitivity,
                latency=latency,
                memory=memory,
                shown=False,
            )
        except ValueError:
            if share is None:
                raise
            return None  # nothing is as small
        own = {} if sequential else pool  # one layer after the other
        small = compress(
            model, plan, survey, batches=batches, sequential=sequential, shown=False, **own
        ).model
        return plan, small

    best: tuple[Plan, nn.Module, float] | None = None
    if others:  # without them the dense network itself keeps everything
        tried = attempt(None)
        if tried is not None:
            value = evaluate(tried[1])
            log.append({"share": None, "value": value, "enough": value >= wanted})
            if value < wanted:
                expected = f"such that {wanted:.4f} of the metric can be kept"
                remedy = "raise the limits, allow more families, or train (weft.fine_tune)"
                raise ValueError(checks.fault("budget", expected, f"{value:.4f} within the limits", remedy))
            best = (*tried, value)
    low, high = 0.0, 1.0
    for _ in track(range(steps), "searching", total=steps, shown=shown):
        share = (low + high) / 2
        tried = attempt(share)
        value = None if tried is None else evaluate(tried[1])
        enough = value is not None and value >= wanted
        log.append({"share": share, "value": value, "enough": enough})
        if tried is not None and value is not None and enough:
            high, best = share, (*tried, value)
        else:
            low = share
    if best is None:
        dense = Plan({}, budget, {}, survey.total)
        return SearchResult(model, dense, dense_value, dense_value, log)
    plan, small, value = best
    return SearchResult(small, replace(plan, budget=budget), value, dense_value, log)
