"""Allocation: one candidate for every layer, so that the budget is met and the network loses least.

Every layer offers its error curve; a choice of one candidate each is a multiple-choice knapsack. The loss of
a choice is the sum of the layers' squared relative errors, or, where the survey has output Grams, the
Gauss-Newton prediction of the loss increase, Σ ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖²_F times the vectors per sample.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

from weft import checks
from weft.numerics.gram import squared_error
from weft.plan.budget import Budget
from weft.plan.error_curves import error_curves
from weft.plan.plan import Plan
from weft.structures import select
from weft.structures.base import Candidate, Cost, Structure
from weft.survey import LayerSurvey, Survey

METHODS = ("lagrangian", "uniform")


def allocate(
    survey: Survey,
    families: str | Iterable[str | type[Structure]],
    budget: Budget,
    *,
    method: str = "lagrangian",
    curves: Mapping[str, Sequence[Candidate]] | None = None,
    shown: bool | None = None,
) -> Plan:
    """Chooses a structure for every layer under a budget.

    Args:
        survey: the network's survey.
        families: "all", names, or classes; leaving a layer dense is always a choice.
        budget: what the whole network may cost.
        method: "lagrangian" walks down the layers' convex hulls, cheapest loss first, and gives back what is
            left over; "uniform" takes the same share of every layer.
        curves: error curves that are already known; computed where None.
        shown: whether to draw a progress bar; where None, only on a terminal.

    Returns:
        The plan, with predicted costs and errors.

    Raises:
        ValueError: nothing can meet the budget (the message says the smallest possible), a family or the
            method is unknown, or the budget needs a survey with batches.

    Examples:
        >>> import torch, weft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> plan = weft.allocate(weft.survey(model), ["LowRank"], weft.Budget(parameters=0.5))
        >>> plan.total.parameters <= 0.5 * weft.survey(model).total.parameters
        True
    """
    checks.one_of("method", method, METHODS)
    chosen_families = select(families)
    limits = budget.limits(survey.total)
    if curves is None:
        curves = error_curves(survey, chosen_families, shown=shown)
    rest = survey.total
    for layer in survey.layers.values():
        rest = rest - layer.cost
    _check_reachable(rest, limits, curves)
    if method == "uniform":
        chosen = _uniform(survey, curves, rest, limits)
    else:
        chosen = _walk_down(curves, _scales(survey), rest, limits)
    return Plan(
        structures={name: point.structure for name, point in chosen.items()},
        budget=budget,
        expected=chosen,
        total=_total(rest, chosen),
    )


def _scales(survey: Survey) -> dict[str, float]:
    """What a layer's squared relative error counts."""
    if any(layer.output_gram is None for layer in survey.layers.values()):
        return dict.fromkeys(survey.layers, 1.0)
    return {name: _energy(layer) * layer.applications for name, layer in survey.layers.items()}


def _energy(layer: LayerSurvey) -> float:
    return float(squared_error(layer.weight.double().flatten(1), layer.input_gram, layer.output_gram))


def _total(rest: Cost, chosen: Mapping[str, Candidate]) -> Cost:
    total = rest
    for point in chosen.values():
        total = total + point.cost
    return total


def _violated(total: Cost, limits: Mapping[str, int]) -> list[str]:
    return [name for name, limit in limits.items() if getattr(total, name) > limit]


def _check_reachable(
    rest: Cost, limits: Mapping[str, int], curves: Mapping[str, Sequence[Candidate]]
) -> None:
    for name, limit in limits.items():
        least = getattr(rest, name) + sum(
            min(getattr(point.cost, name) for point in curve) for curve in curves.values()
        )
        if least > limit:
            expected = f"at least {least}, the smallest possible with these families"
            remedy = "raise it, or allow more families"
            raise ValueError(checks.fault(f"budget {name}", expected, limit, remedy))


def _price(cost: Cost, prices: Mapping[str, float]) -> float:
    return sum(price * getattr(cost, name) for name, price in prices.items())


def _walk_down(
    curves: Mapping[str, Sequence[Candidate]],
    scales: Mapping[str, float],
    rest: Cost,
    limits: Mapping[str, int],
) -> dict[str, Candidate]:
    """From the most accurate choice down the convex hulls, always the move that loses least per cost saved.

    Costs are priced in units of their limits, and only while a limit is broken, so that several limits share
    one walk.
    """
    chosen = {name: min(curve, key=lambda point: (point.error, point.cost)) for name, curve in curves.items()}

    def loss(name: str, point: Candidate) -> float:
        return scales[name] * point.error**2

    while broken := _violated(_total(rest, chosen), limits):
        prices = {name: 1 / limits[name] for name in broken}

        def next_move(
            name: str, prices: Mapping[str, float] = prices
        ) -> tuple[float, int, str, Candidate] | None:
            here = chosen[name]
            price = _price(here.cost, prices)
            moves = [
                (
                    (loss(name, point) - loss(name, here)) / (price - _price(point.cost, prices)),
                    index,
                    name,
                    point,
                )
                for index, point in enumerate(curves[name])
                if _price(point.cost, prices) < price
            ]
            return min(moves, default=None, key=lambda move: move[:2])

        heap = [move for name in curves if (move := next_move(name)) is not None]
        heapq.heapify(heap)
        total = _total(rest, chosen)
        while heap and _violated(total, limits) == broken:
            _, _, name, point = heapq.heappop(heap)
            total = total - chosen[name].cost + point.cost
            chosen[name] = point
            if (move := next_move(name)) is not None:
                heapq.heappush(heap, move)
        if not heap and _violated(total, limits) == broken:
            # Prices of one limit can drive up another: the limits cannot be met by this walk.
            got = ", ".join(f"{name} {getattr(total, name)} > {limits[name]}" for name in broken)
            remedy = "raise one of the limits, or allow more families"
            raise ValueError(checks.fault("budget", "reachable in all its limits together", got, remedy))
    return _give_back(curves, chosen, loss, rest, limits)


def _give_back(
    curves: Mapping[str, Sequence[Candidate]],
    chosen: dict[str, Candidate],
    loss: object,
    rest: Cost,
    limits: Mapping[str, int],
) -> dict[str, Candidate]:
    """Spends what the last move of the walk left over: the move that gains most per cost, as long as one fits."""
    prices = {name: 1 / limit for name, limit in limits.items()}
    total = _total(rest, chosen)
    while True:
        best: tuple[float, str, Candidate] | None = None
        for name, curve in curves.items():
            here = chosen[name]
            for point in curve:
                gain = loss(name, here) - loss(name, point)  # type: ignore[operator]
                if gain <= 0 or _violated(total - here.cost + point.cost, limits):
                    continue
                dearer = max(_price(point.cost, prices) - _price(here.cost, prices), 1e-12)
                if best is None or gain / dearer > best[0]:
                    best = (gain / dearer, name, point)
        if best is None:
            return chosen
        _, name, point = best
        total = total - chosen[name].cost + point.cost
        chosen[name] = point


def _uniform(
    survey: Survey, curves: Mapping[str, Sequence[Candidate]], rest: Cost, limits: Mapping[str, int]
) -> dict[str, Candidate]:
    """The same share of every layer: for each the most accurate candidate within it; the share by bisection."""

    def at(share: float) -> dict[str, Candidate]:
        chosen = {}
        for name, curve in curves.items():
            dense = survey.layers[name].cost
            within = [
                point
                for point in curve
                if all(getattr(point.cost, key) <= share * getattr(dense, key) for key in limits)
            ]
            if within:
                chosen[name] = min(within, key=lambda point: point.error)
            else:
                chosen[name] = min(curve, key=lambda point: _price(point.cost, dict.fromkeys(limits, 1.0)))
        return chosen

    low, high = 0.0, 1.0
    if not _violated(_total(rest, at(high)), limits):
        return at(high)
    for _ in range(40):
        middle = (low + high) / 2
        if _violated(_total(rest, at(middle)), limits):
            high = middle
        else:
            low = middle
    chosen = at(low)
    if broken := _violated(_total(rest, chosen), limits):
        got = ", ".join(f"{name} {getattr(_total(rest, chosen), name)} > {limits[name]}" for name in broken)
        raise ValueError(
            checks.fault("budget", "reachable in all its limits together", got, "raise one of them")
        )
    return chosen
