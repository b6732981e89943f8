"""Scouting: what to try on a layer, known from layers of the same shape, or from part of its own rows.

Layers of one shape have the same ladder of sizes at nearly the same costs, and a family that needs twice the
error of another one at its cost on two of them is seldom the best on a third. So two layers of a shape, those
whose spectra differ most, try everything; on the others only those sizes are fitted that were within a margin
of the best on one of the two, and more of a family where these turn out far better than on the scouts. A
matrix of many more rows than columns, such as a table of tokens, has an evenly drawn part of its rows as its
scout, which chooses families. And where every size is a fit of its own, a layer that tries everything climbs
the ladder only until sizes are hopeless.

Nothing here depends on how long anything took: the same survey gives the same curves.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from weft import checks
from weft.plan.budget import COSTS
from weft.structures.base import Candidate, DiagonalGram, Structure
from weft.survey import LayerSurvey

# So many layers of a shape scout for the others, where there are at least so many.
SCOUTS, LEAST_LAYERS = 2, 4
# A size is tried further where its error is at most so many times the least of others at no more cost. On
# blocks of 64x64 of twelve of a sentence encoder's matrices, by bytes: of the sizes that nothing beats on one
# of them 2.4 % are beyond 1.0 on two others, 0.6 % beyond 1.1, 0.4 % beyond 1.25 (all of a family whose curve
# comes whole) and 0.03 % beyond 2, while 20, 25, 27 and 33 % of all sizes are tried.
MARGIN = 1.25
# The same for families, of which part of the rows decides: costs that do not grow with rows weigh less there.
ROWS_MARGIN = 1.5
# A matrix of more than so many times as many rows as columns is scouted by so many rows a column.
TALL, ROWS_PER_COLUMN = 16, 4
# A size whose ratio is so many times that on the scouts tells of a layer of another kind, where its error is
# one that a network can bear.
SURPRISE, USEFUL = 0.8, 0.7
# So many sizes in a row must be hopeless before a climb looks whether larger ones are too.
HOPELESS = 2


@dataclass(frozen=True)
class LeftOut:
    """Sizes of one family that were not tried.

    Attributes:
        sizes: how many.
        of: how many the family has.
        ratio: how many times the error of others at no more cost the best of them had on the scouts (where
            sizes were never fitted, those beside them).
    """

    sizes: int
    of: int
    ratio: float


@dataclass(frozen=True)
class Scouted:
    """What was left out on some layers, and what that is known from.

    Attributes:
        layers: where it was left out.
        scouts: the layers that tried it; the layer itself where part of its rows or its own smaller sizes
            did.
        left_out: by family's name.
    """

    layers: tuple[str, ...]
    scouts: tuple[str, ...]
    left_out: dict[str, LeftOut]

    def __hash__(self) -> int:
        return hash((self.layers, self.scouts))

    def __str__(self) -> str:
        none = [name for name, left in self.left_out.items() if left.sizes == left.of]
        some = [
            f"{left.sizes} of {left.of} sizes of {name}"
            for name, left in self.left_out.items()
            if left.sizes < left.of
        ]
        known = "by part of it" if self.layers == self.scouts else f"by {' and '.join(self.scouts)}"
        shown = self.layers[0] if len(self.layers) == 1 else f"{len(self.layers)} like {self.layers[0]}"
        return f"{shown}, {known}: not tried {', '.join([*none, *some])}"

    def to_json(self) -> dict[str, Any]:
        """The value as JSON-ready data.

        Returns:
            A dictionary.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Scouted":
        """Reads what `to_json` gave.

        Args:
            data: the dictionary.

        Returns:
            An equal value.

        Raises:
            ValueError: it is damaged.
        """
        try:
            left_out = {str(name): LeftOut(**left) for name, left in data["left_out"].items()}
            return cls(tuple(data["layers"]), tuple(data["scouts"]), left_out)
        except (KeyError, TypeError, AttributeError) as error:
            remedy = "plan again, or leave it out"
            raise ValueError(checks.fault("scouted", "complete", repr(error), remedy)) from error


# ------------------------------------------------------------------------------------------------------------
# Who scouts for whom


@dataclass(frozen=True)
class Party:
    """Layers that are alike, and those of them that scout for the others.

    Attributes:
        scouts: names of layers that try everything.
        followers: names of those that try what was promising on a scout.
    """

    scouts: tuple[str, ...]
    followers: tuple[str, ...]


def parties(
    layers: Mapping[str, LayerSurvey], allowed: Mapping[str, Sequence[type[Structure]]]
) -> list[Party]:
    """Layers of the same shape, geometry and families, where there are enough of them.

    Args:
        layers: by name.
        allowed: the families that every layer may have; layers that may have none are passed over.

    Returns:
        One party per shape with enough layers.
    """
    alike: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        if allowed[name]:
            kind = (layer.shape, layer.weight.dtype, layer.geometry, layer.lookup, tuple(allowed[name]))
            alike.setdefault(kind, []).append(name)
    found = []
    for names in alike.values():
        if len(names) < LEAST_LAYERS:
            continue
        spread = sorted(names, key=lambda name: _participation(layers[name]))
        picked = np.linspace(0, len(names) - 1, SCOUTS).round().astype(int)
        scouts = tuple(spread[index] for index in picked)
        found.append(Party(scouts, tuple(name for name in names if name not in scouts)))
    return found


def _participation(layer: LayerSurvey) -> float:
    """(Σλ)²/Σλ² of the eigenvalues λ of WĜWᵀ: how many directions matter, from two products."""
    weight = layer.read().weight.detach().cpu().float().flatten(1)
    weighed = weight if layer.input_gram is None else layer.input_gram.matmul(weight)
    small = weighed @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weighed
    square = float((small * small.T).sum(dtype=torch.float64))
    return float(small.trace()) ** 2 / square if square > 0 else 0.0


def part_of_rows(layer: LayerSurvey) -> LayerSurvey | None:
    """An evenly drawn part of a tall matrix's rows, as a layer of its own; None where it is not that tall.

    Args:
        layer: with its weight.

    Returns:
        The layer, under the same name.
    """
    rows, columns = layer.shape[0], layer.weight[0].numel()
    if layer.geometry is not None or layer.weight.ndim != 2 or rows <= TALL * columns:
        return None
    kept = torch.linspace(0, rows - 1, ROWS_PER_COLUMN * columns, dtype=torch.float64).round().long()
    outer = layer.output_gram
    if isinstance(outer, DiagonalGram):  # rows that matter are drawn like all others
        outer = outer.restrict(kept.to(outer.moment.device))
    elif outer is not None:
        outer = outer.restrict(kept)
    weight = layer.read().weight.detach()[kept.to(layer.weight.device)]
    return replace(layer, weight=weight, output_gram=outer, stored=None, mean_output=None)


# ------------------------------------------------------------------------------------------------------------
# What is promising


def ratios(points: Sequence[Candidate], costs: Sequence[str] = COSTS) -> list[float]:
    """Every candidate's error in units of the least error of others at no more cost.

    Args:
        points: a layer's candidates, of all families.
        costs: the costs that count.

    Returns:
        One number per candidate; 0 where no other one costs as little.
    """
    amounts = np.array([[getattr(point.cost, name) for name in costs] for point in points], dtype=float)
    errors = np.array([point.error for point in points])
    found = []
    for index, own in enumerate(amounts):
        within = (amounts <= own).all(1)
        within[index] = False
        least = errors[within].min(initial=np.inf)
        found.append(_ratio(float(errors[index]), float(least)))
    return found


def _ratio(error: float, least: float) -> float:
    if least == np.inf or error <= 0:
        return 0.0
    return error / least if least > 0 else np.inf


def promising(
    scouts: Iterable[Sequence[Candidate]], costs: Sequence[str], margin: float, useful: float = math.inf
) -> tuple[dict[Structure, float], dict[Structure, float]]:
    """The structures that were within the margin on a scout, and the others.

    Args:
        scouts: every scout's candidates.
        costs: the costs that count.
        margin: see `MARGIN`.
        useful: the error from which on nothing is promising.

    Returns:
        Both with their least ratio; that of what is of no use is at least above the margin.
    """
    least: dict[Structure, float] = {}
    for points in scouts:
        for point, ratio in zip(points, ratios(points, costs), strict=True):
            own = ratio if point.error < useful else max(ratio, math.nextafter(margin, math.inf))
            least[point.structure] = min(own, least.get(point.structure, np.inf))
    return (
        {structure: ratio for structure, ratio in least.items() if ratio <= margin},
        {structure: ratio for structure, ratio in least.items() if ratio > margin},
    )


def surprises(
    points: Sequence[Candidate], expected: Mapping[Structure, float], costs: Sequence[str]
) -> frozenset[type[Structure]]:
    """The families that do much better on a layer than its scouts let expect.

    Args:
        points: the layer's candidates.
        expected: the ratios on the scouts.
        costs: the costs that count.

    Returns:
        Those of which a size that is of use is ahead of others by more than on the scouts.
    """
    return frozenset(
        type(point.structure)
        for point, ratio in zip(points, ratios(points, costs), strict=True)
        if point.error < USEFUL and 0 < ratio < min(1, SURPRISE * expected.get(point.structure, 0))
    )


def climb(
    sizes: Sequence[Structure],
    fit: Callable[[Structure], Candidate],
    front: Sequence[Candidate],
    costs: Sequence[str],
    margin: float = MARGIN,
) -> tuple[list[Candidate], float]:
    """Fits sizes, cheapest first, until they are hopeless against what other families reach.

    After some hopeless sizes in a row one from the middle of the rest is tried; where it is hopeless too the
    rest is left.

    Args:
        sizes: cheapest first.
        fit: gives a size's cost and error.
        front: the other families' candidates.
        costs: the costs that count.
        margin: see `MARGIN`.

    Returns:
        The candidates in the sizes' order, and the least ratio of the hopeless sizes in a row; 0 where none
        was left.
    """
    done: dict[int, Candidate] = {}

    def ratio(index: int) -> float:
        if index not in done:
            done[index] = fit(sizes[index])
        return ratios([done[index], *front], costs)[0]

    row: list[float] = []
    for index in range(len(sizes)):
        now = ratio(index)
        row = [*row, now] if now > margin else []
        left = [other for other in range(index + 1, len(sizes)) if other not in done]
        if len(row) < HOPELESS or not left:
            continue
        middle = ratio(left[len(left) // 2])
        if middle > margin:
            return [done[place] for place in sorted(done)], min(*row, middle)
        row = []
        for other in left:
            ratio(other)
        break
    return [done[place] for place in sorted(done)], 0.0


def summary(
    layers: Sequence[str],
    scouts: Sequence[str],
    kept: Mapping[Structure, float],
    left: Mapping[Structure, float],
) -> Scouted | None:
    """What was left out, by family.

    Args:
        layers: where.
        scouts: what it is known from.
        kept: the structures that were tried.
        left: those that were not, with their ratios.

    Returns:
        The value; None where nothing was left out.
    """
    counts: dict[str, LeftOut] = {}
    for name in sorted({type(structure).__name__ for structure in left}):
        out = [ratio for structure, ratio in left.items() if type(structure).__name__ == name]
        rest = sum(type(structure).__name__ == name for structure in kept)
        counts[name] = LeftOut(len(out), len(out) + rest, round(min(out), 3))
    return Scouted(tuple(layers), tuple(scouts), counts) if counts else None
