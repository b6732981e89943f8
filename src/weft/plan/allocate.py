"""Allocation: one candidate for every layer, so that the budget is met and the network loses least.

Every layer offers its error curve; a choice of one candidate each is a multiple-choice knapsack. The loss of
a choice is the sum of the layers' squared relative errors, or, where the survey has output Grams, the
Gauss-Newton prediction of the loss increase, Σ ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖²_F times the vectors per sample.

With a price on cost the layers part: each takes the candidate of least loss + price · cost, a corner of its
curve's convex hull (Everett, Generalized Lagrange multiplier method, Operations Research 11, 1963). The
lowest price that meets the budget is found by bisection; what is left over is spent greedily. With one limit
the result loses at most one step along a hull more than the optimum; dynamic programming over the limit in
units (exact where the units are those of the costs themselves) then closes what gap is left.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from weft import checks
from weft.numerics.gram import full_precision
from weft.plan.budget import COSTS, Budget
from weft.plan.constraints import Constraints
from weft.plan.error_curves import ErrorCurves, error_curves, undominated
from weft.plan.latency import LatencyTable
from weft.plan.memory import MemoryTable
from weft.plan.pareto import pareto
from weft.plan.plan import Plan
from weft.plan.scouting import Scouted
from weft.plan.sensitivity import Sensitivity, predicted_sensitivity
from weft.structures import select
from weft.structures.base import Candidate, Cost, Structure
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey

METHODS = ("lagrangian", "uniform")

# Halvings of the price's logarithm over 40 decades, and of the uniform share: to the last bit of a double.
_PRICE_HALVINGS, _SHARE_HALVINGS = 60, 50
# With several limits: how often their relative prices are adjusted, and by how much.
_PRICE_ROUNDS, _PRICE_STEP = 40, 2.0
# Units into which dynamic programming divides the limit at most, and the additions that it may cost.
_MOST_UNITS, _MOST_ADDITIONS = 20_000, 2 * 10**9

Choice = NDArray[np.intp]


def allocate(
    survey: Survey,
    families: str | Iterable[str | type[Structure]],
    budget: Budget,
    *,
    method: str = "lagrangian",
    curves: Mapping[str, Sequence[Candidate]] | None = None,
    sensitivity: Sensitivity | None = None,
    latency: LatencyTable | None = None,
    memory: MemoryTable | None = None,
    constraints: Constraints | None = None,
    scout: bool = True,
    cache: str | os.PathLike[str] | None = None,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
    shown: bool | None = None,
) -> Plan:
    """Chooses a structure for every layer under a budget.

    Args:
        survey: the network's survey.
        families: "all", names, or classes; leaving a layer dense is always a choice.
        budget: what the whole network may cost.
        method: "lagrangian" loses least for the price; "uniform" takes the same share of every layer.
        curves: error curves that are already known; computed where None.
        sensitivity: what the layers' errors cost the network, such as `measure_sensitivity(...)` gives; where
            None, predicted from the survey alone.
        latency: times of this machine, for a budget that limits them.
        memory: bytes in memory, for a budget that limits their peak.
        constraints: what stays dense, and families by layer.
        scout: whether some layers scout for others of their shape, see `error_curves`; never under a limit on
            time.
        cache: a folder that keeps error curves between runs; None for none.
        workers: processes that compute error curves, one thread each.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        The plan, with predicted costs and errors.

    Raises:
        ValueError: nothing can meet the budget (the message says the smallest possible), a family or the
            method is unknown, or the budget needs something that is not given: a survey with batches, a
            latency or memory table, a search over held-out data.
        TypeError: the budget is no Budget, or a family neither a name nor a class.

    Examples:
        >>> import torch, weft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> plan = weft.allocate(weft.survey(model), ["LowRank"], weft.Budget(parameters=0.5))
        >>> plan.total.parameters <= 0.5 * weft.survey(model).total.parameters
        True
    """
    checks.one_of("method", method, METHODS)
    chosen_families = select(families)
    if not isinstance(budget, Budget):
        remedy = "e.g. weft.Budget(bytes=0.25)"
        raise TypeError(checks.fault("budget", "a Budget", repr(budget), remedy))
    if budget.keep is not None:
        remedy = "call weft.search, which measures every step on held-out data"
        raise ValueError(checks.fault("budget keep", "left to a search", budget.keep, remedy))
    limits = budget.limits(
        survey.total,
        None if latency is None else latency.dense_seconds,
        None if memory is None else memory.dense_bytes,
    )
    if curves is None:
        with full_precision():
            curves = error_curves(
                survey,
                chosen_families,
                constraints=constraints,
                costs=budget.costs(),
                scout=scout and not budget.timed,
                cache=cache,
                workers=workers,
                ray=ray,
                worker_memory=worker_memory,
                shown=shown,
            )
    if memory is None or "peak_memory" not in limits:
        knapsacks = [_Knapsack(survey, curves, limits, sensitivity, latency)]
    else:
        knapsacks = _under_activation_bounds(survey, curves, limits, sensitivity, latency, memory)
    if not any(knapsack.reachable for knapsack in knapsacks):
        min(knapsacks, key=lambda knapsack: knapsack.excess).check_reachable()
    solved = [(knapsack, _solve(knapsack, method)) for knapsack in knapsacks if knapsack.reachable]
    found = [(knapsack, choice) for knapsack, choice in solved if choice is not None]
    if not found:
        got = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        remedy = "raise one of the limits, or allow more families"
        raise ValueError(checks.fault("budget", "reachable in all its limits together", got, remedy))
    knapsack, best = min(found, key=lambda pair: pair[0].loss(pair[1]))
    chosen = knapsack.points(best)
    scouted = curves.scouted if isinstance(curves, ErrorCurves) else ()
    total = _rest(survey)
    for point in chosen.values():
        total = total + point.cost
    return Plan(
        structures={name: point.structure for name, point in chosen.items()},
        budget=budget,
        expected=chosen,
        total=total,
        seconds=knapsack.seconds(best),
        peak_memory=knapsack.peak_memory(best),
        others={
            name: {}
            if isinstance(point.structure, Dense)
            else {**_not_tried(name, scouted), **_others(curves[name], point, limits)}
            for name, point in chosen.items()
        },
        pareto=pareto(
            survey,
            curves,
            chosen,
            cost=next((name for name in limits if name in COSTS), "bytes"),
            sensitivity=sensitivity,
        ),
        scouted=scouted,
    )


def _solve(knapsack: "_Knapsack", method: str) -> Choice | None:
    """The best choice found that meets every limit; None where there is none."""
    choices = [knapsack.uniform()]
    if method == "lagrangian":
        choices += knapsack.priced()
    choices = [choice for choice in map(knapsack.repair, choices) if knapsack.fits(choice)]
    if method == "lagrangian":
        choices = [knapsack.give_back(choice) for choice in choices]
        exact = knapsack.exact()
        if exact is not None:
            choices.append(knapsack.give_back(exact))
    return min(choices, key=knapsack.loss, default=None)


def _under_activation_bounds(
    survey: Survey,
    curves: Mapping[str, Sequence[Candidate]],
    limits: Mapping[str, float],
    sensitivity: Sensitivity | None,
    latency: LatencyTable | None,
    memory: MemoryTable,
) -> "list[_Knapsack]":
    """One problem per bound on the activations: weights may take what the bound leaves of the peak."""
    kept = {name: undominated(curve) for name, curve in curves.items()}
    memory.prepare((survey.layers[name], point.structure) for name, curve in kept.items() for point in curve)
    structures = {name: [point.structure for point in curve] for name, curve in kept.items()}
    return [
        _Knapsack(
            survey,
            {
                name: [point for point in curve if memory.live(survey.layers[name], point.structure) <= bound]
                for name, curve in kept.items()
            },
            limits,
            sensitivity,
            latency,
            memory,
            bound,
        )
        for bound in memory.thresholds(survey.layers, structures)
    ]


def _not_tried(layer: str, scouted: Iterable[Scouted]) -> dict[str, str]:
    """Why families were not even tried on a layer."""
    return {
        family: f"not tried: {left.ratio:.2g} times the error of others at no more cost, where it was"
        for found in scouted
        if layer in found.layers
        for family, left in found.left_out.items()
        if left.sizes == left.of
    }


def _others(curve: Sequence[Candidate], chosen: Candidate, limits: Mapping[str, float]) -> dict[str, str]:
    """Why the families that a layer could have had were not chosen."""
    names = [name for name in limits if name in COSTS]
    by_family: dict[str, list[Candidate]] = {}
    for point in curve:
        if type(point.structure) not in {type(chosen.structure), Dense}:
            by_family.setdefault(type(point.structure).__name__, []).append(point)
    reasons = {}
    for family, points in sorted(by_family.items()):
        within = [
            point
            for point in points
            if all(getattr(point.cost, name) <= getattr(chosen.cost, name) for name in names)
        ]
        if within:
            best = min(within, key=lambda point: point.error)
            reasons[family] = f"error {best.error:.4f} at no more cost, {best.structure}"
        else:
            least = min(points, key=lambda point: [getattr(point.cost, name) for name in names])
            costs = ", ".join(f"{getattr(least.cost, name):,} {name}" for name in names)
            reasons[family] = f"at least {costs}" if names else "slower"
    return reasons


def _rest(survey: Survey) -> Cost:
    """What the network costs apart from the surveyed weights."""
    rest = survey.total
    for layer in survey.layers.values():
        rest = rest - layer.cost
    return rest


class _Knapsack:
    """The candidates of all layers as arrays; a choice holds one index into them per layer."""

    def __init__(
        self,
        survey: Survey,
        curves: Mapping[str, Sequence[Candidate]],
        limits: Mapping[str, float],
        sensitivity: Sensitivity | None,
        latency: LatencyTable | None,
        memory: MemoryTable | None = None,
        activations: int = 0,
    ) -> None:
        self.activations = activations
        self.names = list(curves)
        self.latency = latency
        self.limit_names = list(limits)
        timed = latency if "latency" in limits else None
        # Where time counts, a candidate that costs more of everything else may still be the fastest.
        kept = curves.values() if timed is not None else [undominated(curve) for curve in curves.values()]
        kept = [list(curve) for curve in kept]
        if timed is not None:
            timed.prepare(
                (survey.layers[name], point.structure)
                for name, curve in zip(self.names, kept, strict=True)
                for point in curve
            )
        self.candidates = [point for curve in kept for point in curve]
        lengths = [len(curve) for curve in kept]
        self.first = np.cumsum([0, *lengths[:-1]])
        self.layer = np.repeat(np.arange(len(lengths)), lengths)
        sensitivity = predicted_sensitivity(survey) if sensitivity is None else sensitivity
        self.losses = np.array([
            sensitivity.loss(name, point.error)
            for name, curve in zip(self.names, kept, strict=True)
            for point in curve
        ])

        def amount(limit: str, layer: LayerSurvey, point: Candidate) -> float:
            if limit == "latency" and timed is not None:
                return timed.seconds(layer, point.structure)
            if limit == "peak_memory" and memory is not None:
                return memory.resident(layer, point.structure)
            return getattr(point.cost, limit)

        def amounts(name: str, point: Candidate) -> list[float]:
            return [amount(limit, survey.layers[name], point) for limit in limits]

        self.costs = np.array([
            amounts(name, point) for name, curve in zip(self.names, kept, strict=True) for point in curve
        ])
        self.dense = np.array([
            amounts(name, Candidate(Dense(), survey.layers[name].cost, 0.0)) for name in self.names
        ])
        self.limits = np.array(list(limits.values()))
        rest = _rest(survey)

        def taken(limit: str) -> float:
            """What is spent whatever is chosen."""
            if limit == "latency" and timed is not None:
                return timed.rest_seconds
            if limit == "peak_memory" and memory is not None:
                return memory.rest_bytes + activations
            return getattr(rest, limit)

        self.room = self.limits - [taken(limit) for limit in limits]

    @property
    def excess(self) -> float:
        """By how much of a limit the cheapest candidates still break one, at the most."""
        least = np.minimum.reduceat(self.costs, self.first, axis=0).sum(0)
        # A limit that rounds to nothing has no shares: broken by how much, then.
        return float(((least - self.room) / np.where(self.limits > 0, self.limits, 1)).max())

    @property
    def reachable(self) -> bool:
        """Whether every limit, by itself, can be met."""
        return self.excess <= 0

    def check_reachable(self) -> None:
        """Checks that every limit, by itself, can be met; a ValueError that says the smallest possible."""
        least = np.minimum.reduceat(self.costs, self.first, axis=0).sum(0) + self.limits - self.room
        fixed = self.limits - self.room
        for name, needed, limit, rest in zip(self.limit_names, least, self.limits, fixed, strict=True):
            if needed > limit:
                shown = f"{needed:.3g} s" if name == "latency" else f"{needed:.0f}"
                got = f"{limit:.3g} s" if name == "latency" else f"{limit:.0f}"
                expected = f"at least {shown}, the smallest possible with these families"
                if name in COSTS and rest > 0:
                    expected += f" ({rest:.0f} of it in what stays dense in any case)"
                remedy = "raise it, or allow more families"
                raise ValueError(checks.fault(f"budget {name}", expected, got, remedy))

    def seconds(self, choice: Choice) -> float | None:
        """The predicted time per call; None without a limit on it."""
        if "latency" not in self.limit_names:
            return None
        column = self.limit_names.index("latency")
        return float(self.costs[choice, column].sum() + self.limits[column] - self.room[column])

    def peak_memory(self, choice: Choice) -> int | None:
        """The predicted peak of weights and activations; None without a limit on it."""
        if "peak_memory" not in self.limit_names:
            return None
        column = self.limit_names.index("peak_memory")
        return round(float(self.costs[choice, column].sum() + self.limits[column] - self.room[column]))

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

    def exact(self) -> Choice | None:
        """The best choice by dynamic programming.

        Costs are counted in whole units, rounded up, so that what fits in units fits. Units are the costs'
        greatest common divisor where the limit is not too many of them; then the choice is optimal.

        Returns:
            The choice; None with several limits, where it would take too long, or where nothing fits.
        """
        if len(self.limits) > 1:
            return None
        costs, room = self.costs[:, 0], float(self.room[0])
        least = np.minimum.reduceat(costs, self.first)
        above, room = costs - least[self.layer], room - float(least.sum())
        if room < 0:
            return None
        unit = room / _MOST_UNITS
        if np.issubdtype(self.costs.dtype, np.integer):
            unit = max(unit, float(np.gcd.reduce(above.astype(np.int64))))
        size = 1 + int(room // unit) if unit > 0 else 1
        if size * len(costs) > _MOST_ADDITIONS:
            return None
        steps = np.ceil(above / unit - 1e-9).astype(np.int64) if unit > 0 else np.zeros(len(costs), np.int64)
        best = np.zeros(size)
        taken = []  # per layer and amount spent so far: which candidate
        bounds = [*self.first, len(costs)]
        for begin, end in itertools.pairwise(bounds):
            value = np.full(size, np.inf)
            which = np.full(size, -1, dtype=np.int32)
            for index in range(begin, end):
                step = steps[index]
                if step >= size:
                    continue
                offered = best[: size - step] + self.losses[index]
                better = offered < value[step:]
                value[step:][better] = offered[better]
                which[step:][better] = index
            best = value
            taken.append(which)
        spent = int(np.argmin(best))
        choice = np.empty(len(taken), dtype=np.intp)
        for position in reversed(range(len(taken))):
            choice[position] = taken[position][spent]
            spent -= int(steps[choice[position]])
        return choice if self.fits(choice) else None

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
