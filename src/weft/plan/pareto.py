"""The network's Pareto curves: the least predicted loss at every cost, of all families together and of each.

With a price on cost every layer takes the candidate of least loss + price · cost; as the price falls the
choices run along the lower convex hull of what the network can be (Everett 1963).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weft import checks
from weft.plan.sensitivity import Sensitivity, predicted_sensitivity
from weft.structures.base import Candidate
from weft.structures.dense import Dense
from weft.survey import Survey

ALL = "all"
COSTS = ("parameters", "bytes", "multiply_adds")

# A curve is shown by so many points.
_MOST_POINTS = 60


@dataclass(frozen=True)
class Pareto:
    """Curves of cost and predicted loss.

    Attributes:
        cost: which cost: "parameters", "bytes" or "multiply_adds".
        dense: what the dense network costs.
        curves: by family, and for all together under "all": (cost, loss), cheapest first.
        chosen: cost and predicted loss of the plan.
    """

    cost: str
    dense: int
    curves: dict[str, tuple[tuple[int, float], ...]]
    chosen: tuple[int, float]

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
            return cls(str(data["cost"]), int(data["dense"]), curves, (int(cost), float(loss)))
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
    now = [chosen.get(name, Candidate(Dense(), survey.layers[name].cost, 0.0)) for name in curves]
    total = rest + sum(getattr(point.cost, cost) for point in now)
    lost = sum(sensitivity.loss(name, point.error) for name, point in zip(curves, now, strict=True))
    return Pareto(cost, getattr(survey.total, cost), found, (int(total), float(lost)))


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
