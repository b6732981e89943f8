"""The network's Pareto curves: the least predicted loss at every cost, of all families together and of each.

With a price on cost every layer takes the candidate of least loss + price · cost; as the price falls the
choices run along the lower convex hull of what the network can be (Everett 1963).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from weft import checks
from weft.plan.budget import COSTS
from weft.plan.sensitivity import Sensitivity, predicted_sensitivity
from weft.structures.base import Candidate
from weft.structures.dense import Dense
from weft.survey import Survey

ALL = "all"

# A curve is shown by so many points.
_MOST_POINTS = 60
# And a layer's curve of one family by so many.
_MOST_LAYER_POINTS = 16
# At which relative error sensitivities are compared: small, where layers act alone.
_SMALL_ERROR = 0.1


@dataclass(frozen=True)
class LayerCurves:
    """What the planner knew of one layer.

    Attributes:
        dense: what the dense layer costs.
        sensitivity: what a squared relative error costs the network, in the unit of the predicted loss, where
            errors are small.
        loss: what the chosen structure's error costs it.
        curves: by family: (cost, relative error, structure as text), cheapest first.
    """

    dense: int
    sensitivity: float
    loss: float
    curves: dict[str, tuple[tuple[int, float, str], ...]]


@dataclass(frozen=True)
class Pareto:
    """Curves of cost and predicted loss.

    Attributes:
        cost: which cost: "parameters", "bytes" or "multiply_adds".
        dense: what the dense network costs.
        curves: by family, and for all together under "all": (cost, loss), cheapest first.
        chosen: cost and predicted loss of the plan.
        layers: the layers' own curves, by name.
    """

    cost: str
    dense: int
    curves: dict[str, tuple[tuple[int, float], ...]]
    chosen: tuple[int, float]
    layers: dict[str, LayerCurves] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The curves as JSON-ready data.

        Returns:
            A dictionary.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Pareto":
        """Reads what `to_json` gave.

        Args:
            data: the dictionary.

        Returns:
            An equal value.

        Raises:
            ValueError: it is damaged.
        """
        try:
            curves = {
                str(name): tuple((int(cost), float(loss)) for cost, loss in points)
                for name, points in data["curves"].items()
            }
            cost, loss = data["chosen"]
            layers = {
                str(name): LayerCurves(
                    int(entry["dense"]),
                    float(entry["sensitivity"]),
                    float(entry["loss"]),
                    {
                        str(family): tuple(
                            (int(cost), float(error), str(text)) for cost, error, text in points
                        )
                        for family, points in entry["curves"].items()
                    },
                )
                for name, entry in data.get("layers", {}).items()
            }
            return cls(str(data["cost"]), int(data["dense"]), curves, (int(cost), float(loss)), layers)
        except (KeyError, TypeError, AttributeError) as error:
            remedy = "plan again, or leave it out"
            raise ValueError(checks.fault("pareto", "complete", repr(error), remedy)) from error


def pareto(
    survey: Survey,
    curves: Mapping[str, Sequence[Candidate]],
    chosen: Mapping[str, Candidate],
    *,
    cost: str = "bytes",
    sensitivity: Sensitivity | None = None,
) -> Pareto:
    """The curves of all families together and of each alone.

    Args:
        survey: the network's survey.
        curves: the layers' error curves.
        chosen: the plan's candidates by layer; a layer that is not named is dense.
        cost: "parameters", "bytes" or "multiply_adds".
        sensitivity: what the layers' errors cost the network; predicted from the survey where None.

    Returns:
        The curves; every family may leave layers dense.
    """
    checks.one_of("cost", cost, COSTS)
    sensitivity = predicted_sensitivity(survey) if sensitivity is None else sensitivity
    layers = {
        name: [(getattr(point.cost, cost), sensitivity.loss(name, point.error), point) for point in curve]
        for name, curve in curves.items()
    }
    rest = getattr(survey.total, cost) - sum(getattr(survey.layers[name].cost, cost) for name in curves)
    families = sorted({
        type(point.structure).__name__
        for curve in curves.values()
        for point in curve
        if not isinstance(point.structure, Dense)
    })
    found = {}
    for family in (ALL, *families):
        own = [
            [
                (amount, loss)
                for amount, loss, point in points
                if family == ALL
                or isinstance(point.structure, Dense)
                or type(point.structure).__name__ == family
            ]
            for points in layers.values()
        ]
        found[family] = tuple((rest + amount, loss) for amount, loss in _hull_of_sum(own))
    now = {name: chosen.get(name, Candidate(Dense(), survey.layers[name].cost, 0.0)) for name in curves}
    known = {
        name: LayerCurves(
            getattr(survey.layers[name].cost, cost),
            sensitivity.loss(name, _SMALL_ERROR) / _SMALL_ERROR**2,
            sensitivity.loss(name, now[name].error),
            _by_family(curve, cost, now[name]),
        )
        for name, curve in curves.items()
    }
    total = rest + sum(getattr(point.cost, cost) for point in now.values())
    lost = sum(layer.loss for layer in known.values())
    return Pareto(cost, getattr(survey.total, cost), found, (int(total), float(lost)), known)


def _by_family(
    curve: Sequence[Candidate], cost: str, chosen: Candidate
) -> dict[str, tuple[tuple[int, float, str], ...]]:
    """A layer's candidates by family, cheapest first: those undominated in one cost, and what was chosen."""
    points: dict[str, list[tuple[int, float, str]]] = {}
    for point in sorted(curve, key=lambda point: (getattr(point.cost, cost), point.error)):
        if isinstance(point.structure, Dense):
            continue
        own = points.setdefault(type(point.structure).__name__, [])
        if not own or point.error < own[-1][1] or point.structure == chosen.structure:
            own.append((int(getattr(point.cost, cost)), float(point.error), str(point.structure)))
    return {family: _few(own, str(chosen.structure)) for family, own in sorted(points.items())}


def _few(points: Sequence[tuple[int, float, str]], kept: str) -> tuple[tuple[int, float, str], ...]:
    """Points at about equal ratios of their costs, the first, the last and the kept structure among them."""
    if len(points) <= _MOST_LAYER_POINTS:
        return tuple(points)
    logs = np.log([max(cost, 1) for cost, _, _ in points])
    wanted = np.linspace(logs[0], logs[-1], _MOST_LAYER_POINTS)
    picked = {int(np.abs(logs - value).argmin()) for value in wanted} | {0, len(points) - 1}
    picked |= {index for index, point in enumerate(points) if point[2] == kept}
    return tuple(points[index] for index in sorted(picked))


def _hull_of_sum(layers: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, float]]:
    """The lower convex hull of sums of one point per layer: the layers' hulls, their steps by slope."""
    amount = loss = 0.0
    steps: list[tuple[float, float, float]] = []
    for points in layers:
        hull = _hull(points)
        amount, loss = amount + hull[0][0], loss + hull[0][1]
        for (one, before), (other, after) in zip(hull, hull[1:], strict=False):
            steps.append(((after - before) / (other - one), other - one, after - before))
    reached = [(round(amount), loss)]
    for _, dearer, better in sorted(steps):  # the steepest first
        amount, loss = amount + dearer, loss + better
        reached.append((round(amount), max(loss, 0.0)))
    if len(reached) <= _MOST_POINTS:
        return reached
    picked = np.unique(np.linspace(0, len(reached) - 1, _MOST_POINTS).round().astype(int))
    return [reached[index] for index in picked]


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The falling part of the lower convex hull, cheapest first."""
    best: list[tuple[float, float]] = []
    for amount, loss in sorted(points):
        if best and loss >= best[-1][1]:
            continue
        while best and best[-1][0] == amount:
            best.pop()
        while len(best) > 1:
            (first, high), (middle, between) = best[-2:]
            if (between - high) * (amount - first) < (loss - high) * (middle - first):
                break
            best.pop()
        best.append((amount, loss))
    return best
