"""Error curves: for every layer its undominated candidates, each with cost and error.

Families that build on others (quantised factors, sums) come second: they are offered the undominated
candidates of the first ones, a few of each family along its curve, so that nothing hopeless is fitted.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from weft import checks
from weft.plan.budget import COSTS
from weft.plan.constraints import Constraints
from weft.plan.curve_cache import CurveCache, layer_digest
from weft.plan.workers import run
from weft.progress import track
from weft.structures.base import Candidate, Structure
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey

# How many candidates of every other family a wrapper is offered per layer, and the relative error from which
# on nothing is worth building on.
MOST_INNER, MOST_INNER_ERROR = 8, 0.7
# Starting processes takes longer than all curves of a small network: so many seconds of work come first where
# the layers of all open curves have at most so many numbers together.
ALONE, _SMALL = 4.0, 2**24


def error_curves(
    survey: Survey,
    families: Sequence[type[Structure]],
    *,
    constraints: Constraints | None = None,
    costs: Sequence[str] = COSTS,
    cache: str | os.PathLike[str] | None = None,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
    shown: bool | None = None,
) -> dict[str, list[Candidate]]:
    """The candidates of all families for every layer, the dense weight always among them.

    Args:
        survey: the network's survey.
        families: what to choose from.
        constraints: what stays dense, and families by layer.
        costs: the costs that count, such as those that a budget limits: families that build on others are
            offered what nothing beats in these, and nothing is fitted on account of the others.
        cache: a folder that keeps curves between runs; None for none.
        workers: processes that compute curves, one thread each; 1 computes in this process. A script that
            asks for more needs the usual `if __name__ == "__main__":`.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw a progress bar; where None, only on a terminal.

    Returns:
        By layer name: of every family the candidates that no other of its own dominates, cheapest first;
        multiply-adds are per sample of the network.
    """
    checks.integer_between("workers", workers, 1, None)
    for cost in costs:
        checks.one_of("costs", cost, COSTS)
    constraints = Constraints() if constraints is None else constraints
    constraints.check(layer.names for layer in survey.layers.values())
    kept = None if cache is None else CurveCache(cache)
    allowed = {
        name: [family for family in constraints.allowed(layer.names, families) if _takes(family, layer)]
        for name, layer in survey.layers.items()
    }
    found = {name: [Candidate(Dense(), layer.cost, 0.0)] for name, layer in survey.layers.items()}

    contents: dict[str, str] = {}  # hashing a layer takes as long as its Gram is large: once for all families

    def key_of(piece: "_Piece") -> str:
        layer = piece.layer
        if layer.name not in contents:
            layer = layer.read()
            contents[layer.name] = layer_digest(
                layer.weight, layer.input_gram, layer.output_gram, layer.geometry
            )
        ladder = list(piece.structures or piece.family.candidates(layer.shape))
        return CurveCache.key(contents[layer.name], piece.family, ladder)

    def gather(pieces: list["_Piece"], description: str) -> None:
        keys = [None if kept is None else key_of(piece) for piece in pieces]
        open_pieces = []
        for piece, key in zip(pieces, keys, strict=True):
            curve = None if kept is None or key is None else kept.load(key)
            if curve is None:
                open_pieces.append((piece, key))
            else:
                piece.add(curve, found)
        made = [piece for piece, _ in open_pieces]
        small = sum(piece.layer.weight.numel() for piece in made) <= _SMALL
        alone = ALONE if small else 0.0
        done = run(_curve, made, workers=workers, ray=ray, memory=worker_memory, alone=alone)
        for number, points in track(done, description, total=len(made), shown=shown):
            piece, key = open_pieces[number]
            if kept is not None and key is not None:
                kept.save(key, points)
            piece.add(points, found)

    gather(
        [
            _Piece(survey.layers[name], family)
            for name, own in allowed.items()
            for family in own
            if next(family.candidates(survey.layers[name].shape), None) is not None
        ],
        "fitting",
    )
    second = []
    for name, own in allowed.items():
        layer = survey.layers[name]
        inner = _thinned([point for point in found[name] if not isinstance(point.structure, Dense)], costs)
        for family in own:
            alone = set(family.candidates(layer.shape))
            built = (
                [one for one in family.candidates(layer.shape, inner) if one not in alone] if inner else []
            )
            promising = _promising(built, found[name], layer, costs)
            if promising:
                second.append(_Piece(layer, family, promising))
    gather(second, "combining")
    return {name: _by_family(points) for name, points in found.items()}


@dataclass(frozen=True)
class _Piece:
    """One family's curve for one layer."""

    layer: LayerSurvey
    family: type[Structure]
    structures: tuple[Structure, ...] | None = None  # some sizes; the whole ladder where None

    def add(self, points: Iterable[Candidate], found: dict[str, list[Candidate]]) -> None:
        layer = self.layer
        found[layer.name] += [
            Candidate(point.structure, layer.per_sample(point.cost), point.error) for point in points
        ]


def _curve(piece: _Piece) -> list[Candidate]:
    layer = piece.layer.read()
    try:
        weight = layer.weight.detach().cpu()
        inner, outer, geometry = layer.input_gram, layer.output_gram, layer.geometry
        if piece.structures is None:
            return piece.family.error_curve(weight, input_gram=inner, output_gram=outer, geometry=geometry)
        return piece.family.points(
            piece.structures, weight, input_gram=inner, output_gram=outer, geometry=geometry
        )
    finally:
        layer.release()


def _takes(family: type[Structure], layer: LayerSurvey) -> bool:
    if family is Dense:
        return False
    probe = next(iter(family.candidates(layer.shape, (Dense(),))), None)
    # One that builds on several others has no candidate yet.
    return probe is None or probe.refusal(layer.shape, layer.geometry) is None


def _promising(
    structures: Iterable[Structure], known: Sequence[Candidate], layer: LayerSurvey, costs: Sequence[str]
) -> tuple[Structure, ...]:
    """The structures that could still be undominated, the costs known and the error no less than a bound."""
    errors = {point.structure: point.error for point in known}
    front = undominated(known, costs)
    kept = []
    for structure in structures:
        if structure.refusal(layer.shape, layer.geometry) is not None:
            continue
        bound = errors.get(structure.approximated, 0.0) if structure.approximated is not None else 0.0
        try:
            cost = structure.predicted_cost(layer.shape, layer.weight.element_size(), layer.geometry)
        except ValueError:  # known only from a fit
            kept.append(structure)
            continue
        point = Candidate(structure, layer.per_sample(cost), bound)
        if point in undominated([*front, point], costs):
            kept.append(structure)
    return tuple(kept)


def _thinned(candidates: Sequence[Candidate], costs: Sequence[str]) -> tuple[Structure, ...]:
    """Of every family a few of the candidates that no other one beats in what counts, evenly by bytes."""
    useful = [point for point in candidates if point.error < MOST_INNER_ERROR]
    front: dict[type[Structure], list[Structure]] = {}
    for point in sorted(undominated(useful, costs), key=lambda point: (point.cost.bytes, point.error)):
        front.setdefault(type(point.structure), []).append(point.structure)
    found: list[Structure] = []
    for own in front.values():
        picked = np.linspace(0, len(own) - 1, min(len(own), MOST_INNER)).round().astype(int)
        found += [own[index] for index in picked]
    return tuple(found)


def _by_family(candidates: Iterable[Candidate]) -> list[Candidate]:
    families: dict[type[Structure], list[Candidate]] = {}
    for point in candidates:
        families.setdefault(type(point.structure), []).append(point)
    return sorted((point for own in families.values() for point in undominated(own)), key=_costs)


def undominated(candidates: Iterable[Candidate], costs: Sequence[str] = COSTS) -> list[Candidate]:
    """Drops every candidate that another one beats or equals in all costs and in error.

    Args:
        candidates: in any order.
        costs: the costs that count.

    Returns:
        The others, by parameters, then bytes, then multiply-adds.
    """
    ordered = sorted(candidates, key=lambda point: (point.error, *_costs(point, costs)))
    kept: list[Candidate] = []
    for point in ordered:  # whoever could dominate it has no larger error, so stands before it
        own = _costs(point, costs)
        if not any(
            all(theirs <= mine for theirs, mine in zip(_costs(other, costs), own, strict=True))
            for other in kept
        ):
            kept.append(point)
    return sorted(kept, key=_costs)


def _costs(point: Candidate, costs: Sequence[str] = COSTS) -> tuple[int, ...]:
    return tuple(getattr(point.cost, name) for name in costs)
