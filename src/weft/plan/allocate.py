"""Allocation: one candidate for every layer, so that the budget is met and the network loses least.

Every layer offers its error curve; a choice of one candidate each is a multiple-choice knapsack. The loss of
a choice is the sum of the layers' squared relative errors, or, where the survey has output Grams, the
Gauss-Newton prediction of the loss increase, Σ ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖²_F times the vectors per sample.

With a price on cost the layers part: each takes the candidate of least loss + price · cost, a corner of its
curve's convex hull (Everett, Generalized Lagrange multiplier method, Operations Research 11, 1963). The
lowest price that meets the budget is found by bisection; what is left over is spent greedily. With one limit
the result loses at most one step along a hull more than the optimum.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from weft import checks
from weft.numerics.gram import squared_error
from weft.plan.budget import Budget
from weft.plan.error_curves import error_curves
from weft.plan.plan import Plan
from weft.structures import select
from weft.structures.base import Candidate, Cost, Structure
from weft.survey import LayerSurvey, Survey

METHODS = ("lagrangian", "uniform")

# Halvings of the price's logarithm over 40 decades, and of the uniform share: to the last bit of a double.
_PRICE_HALVINGS, _SHARE_HALVINGS = 60, 50
# With several limits: how often their relative prices are adjusted, and by how much.
_PRICE_ROUNDS, _PRICE_STEP = 40, 2.0

Choice = NDArray[np.intp]


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
        method: "lagrangian" loses least for the price; "uniform" takes the same share of every layer.
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
    knapsack = _Knapsack(survey, curves, rest, limits)
    choices = [knapsack.uniform()]
    if method == "lagrangian":
        choices += knapsack.priced()
    choices = [choice for choice in map(knapsack.repair, choices) if knapsack.fits(choice)]
    if method == "lagrangian":
        choices = [knapsack.give_back(choice) for choice in choices]
    if not choices:
        got = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        remedy = "raise one of the limits, or allow more families"
        raise ValueError(checks.fault("budget", "reachable in all its limits together", got, remedy))
    chosen = knapsack.points(min(choices, key=knapsack.loss))
    total = rest
    for point in chosen.values():
        total = total + point.cost
    return Plan(
        structures={name: point.structure for name, point in chosen.items()},
        budget=budget,
        expected=chosen,
        total=total,
    )


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


def _scales(survey: Survey) -> dict[str, float]:
    """What a layer's squared relative error counts."""
    if any(layer.output_gram is None for layer in survey.layers.values()):
        return dict.fromkeys(survey.layers, 1.0)
    return {name: _energy(layer) * layer.applications for name, layer in survey.layers.items()}


def _energy(layer: LayerSurvey) -> float:
    return float(squared_error(layer.weight.double().flatten(1), layer.input_gram, layer.output_gram))


class _Knapsack:
    """The candidates of all layers as arrays; a choice holds one index into them per layer."""

    def __init__(
        self,
        survey: Survey,
        curves: Mapping[str, Sequence[Candidate]],
        rest: Cost,
        limits: Mapping[str, int],
    ) -> None:
        self.names = list(curves)
        self.candidates = [point for curve in curves.values() for point in curve]
        lengths = [len(curve) for curve in curves.values()]
        self.first = np.cumsum([0, *lengths[:-1]])
        self.layer = np.repeat(np.arange(len(lengths)), lengths)
        scales = _scales(survey)
        self.losses = np.array([scales[name] * point.error**2 for name in curves for point in curves[name]])
        self.costs = np.array([[getattr(point.cost, limit) for limit in limits] for point in self.candidates])
        self.dense = np.array([
            [getattr(survey.layers[name].cost, limit) for limit in limits] for name in curves
        ])
        self.limits = np.array(list(limits.values()))
        self.room = self.limits - [getattr(rest, limit) for limit in limits]

    def points(self, choice: Choice) -> dict[str, Candidate]:
        """The chosen candidates by layer name."""
        return {name: self.candidates[index] for name, index in zip(self.names, choice, strict=True)}

    def loss(self, choice: Choice) -> float:
        """The predicted loss of a choice."""
        return float(self.losses[choice].sum())

    def fits(self, choice: Choice) -> bool:
        """Whether a choice meets every limit."""
        return bool((self.costs[choice].sum(0) <= self.room).all())

    def _least(self, values: NDArray[np.floating]) -> Choice:
        """For every layer the first candidate of least value; curves stand cheapest first."""
        least = np.minimum.reduceat(values, self.first)
        hits = np.flatnonzero(values == least[self.layer])
        return hits[np.searchsorted(self.layer[hits], np.arange(len(self.first)))]

    def priced(self) -> list[Choice]:
        """Choices at the lowest price that meets the budget, for several ratios of the limits' prices."""
        found = []
        weights = np.ones(len(self.limits))
        for _ in range(_PRICE_ROUNDS if len(weights) > 1 else 1):
            choice = self._at_lowest_price(weights / self.limits)
            found.append(choice)
            # The limit that is nearest to being broken gains in price, one with slack loses.
            used = self.costs[choice].sum(0) / np.maximum(self.room, 1)
            weights *= np.exp(_PRICE_STEP * np.clip(used - used.max(), -1, 0))
        return found

    def _at_lowest_price(self, prices: NDArray[np.floating]) -> Choice:
        charges = self.costs @ prices
        unpriced = self._least(self.losses)
        if self.fits(unpriced):
            return unpriced
        scale = self.losses.max() or 1.0
        low, high = math.log(scale * 1e-20), math.log(scale * 1e20)
        best = self._least(charges)
        for _ in range(_PRICE_HALVINGS):
            middle = (low + high) / 2
            choice = self._least(self.losses + math.exp(middle) * charges)
            if self.fits(choice):
                high, best = middle, choice
            else:
                low = middle
        return best

    def repair(self, choice: Choice) -> Choice:
        """Brings a choice nearer to limits that it breaks: the exchange that mends most, while one does."""
        choice = choice.copy()
        while not self.fits(choice):
            totals = self.costs[choice].sum(0)
            exchanged = totals + self.costs - self.costs[choice[self.layer]]
            excess = (np.maximum(exchanged - self.room, 0) / self.limits).sum(1)
            index = int(np.argmin(excess))
            if excess[index] >= (np.maximum(totals - self.room, 0) / self.limits).sum():
                break
            choice[self.layer[index]] = index
        return choice

    def give_back(self, choice: Choice) -> Choice:
        """Spends what is left over: the exchange that gains most per cost, as long as one fits."""
        choice = choice.copy()
        charges = (self.costs / self.limits).sum(1)
        while True:
            here = choice[self.layer]
            gains = self.losses[here] - self.losses
            left = self.room - self.costs[choice].sum(0)
            possible = (gains > 0) & (self.costs - self.costs[here] <= left).all(1)
            if not possible.any():
                return choice
            dearer = np.maximum(charges - charges[here], 1e-12)
            index = int(np.argmax(np.where(possible, gains / dearer, -1.0)))
            choice[self.layer[index]] = index

    def uniform(self) -> Choice:
        """The same share of every layer: its most accurate candidate within it; the share by bisection."""
        shares = (self.costs / np.maximum(self.dense, 1)[self.layer]).max(1)
        errors = np.array([point.error for point in self.candidates])

        def at(share: float) -> Choice:
            within = self._least(np.where(shares <= share, errors, np.inf))
            return np.where(shares[within] <= share, within, self._least(shares))

        low, high = 0.0, 1.0
        if self.fits(at(high)):
            return at(high)
        for _ in range(_SHARE_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.fits(at(middle)) else (low, middle)
        return at(low)
