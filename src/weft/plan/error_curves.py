"""Error curves: for every layer its undominated candidates, each with cost and error.

Families that build on others (quantised factors, sums) come second: they are offered the undominated
candidates of the first ones, a few of each family along its curve, so that nothing hopeless is fitted.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from weft import checks
from weft.plan.budget import COSTS
from weft.plan.constraints import Constraints
from weft.plan.curve_cache import CurveCache, layer_digest
from weft.plan.scouting import (
    MARGIN,
    ROWS_MARGIN,
    USEFUL,
    Party,
    Scouted,
    climb,
    part_of_rows,
    parties,
    promising,
    summary,
    surprises,
)
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


class ErrorCurves(dict[str, list[Candidate]]):
    """Candidates by layer name, with what was not tried.

    Attributes:
        scouted: what scouting left out; empty where everything was tried.
    """

    def __init__(
        self, curves: Mapping[str, list[Candidate]] | None = None, scouted: Iterable[Scouted] = ()
    ) -> None:
        super().__init__(curves or {})
        self.scouted = tuple(scouted)


def error_curves(
    survey: Survey,
    families: Sequence[type[Structure]],
    *,
    constraints: Constraints | None = None,
    costs: Sequence[str] = COSTS,
    scout: bool = True,
    cache: str | os.PathLike[str] | None = None,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
    shown: bool | None = None,
) -> ErrorCurves:
    """The candidates of all families for every layer, the dense weight always among them.

    Args:
        survey: the network's survey.
        families: what to choose from.
        constraints: what stays dense, and families by layer.
        costs: the costs that count, such as those that a budget limits: families that build on others are
            offered what nothing beats in these, and nothing is fitted on account of the others.
        scout: whether layers scout for others of their shape: sizes that are far from the best in these costs
            on two of them are not tried on the rest, nor larger ones after small ones that are hopeless.
            Everything is tried on every layer where not.
        cache: a folder that keeps curves between runs; None for none.
        workers: processes that compute curves, one thread each; 1 computes in this process. A script that
            asks for more needs the usual `if __name__ == "__main__":`.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw a progress bar; where None, on a terminal, and now and then a line elsewhere.

    Returns:
        By layer name: of every family the candidates that no other of its own dominates, cheapest first;
        multiply-adds are per sample of the network. What scouting left out is in its `scouted`.
    """
    checks.integer_between("workers", workers, 1, None)
    for cost in costs:
        checks.one_of("costs", cost, COSTS)
    constraints = Constraints() if constraints is None else constraints
    constraints.check(layer.names for layer in survey.layers.values())
    allowed = {
        name: [family for family in constraints.allowed(layer.names, families) if _takes(family, layer)]
        for name, layer in survey.layers.items()
    }
    work = partial(run, _curve, workers=workers, ray=ray, memory=worker_memory)
    explorer = _Explorer(costs, scout, None if cache is None else CurveCache(cache), work, shown)
    if scout:
        explorer.scout(survey.layers, allowed)
    else:
        explorer.explore(list(survey.layers.values()), allowed)
    curves = {name: _by_family(explorer.found[name]) for name in survey.layers}
    places = {name: place for place, name in enumerate(survey.layers)}

    def place(told: Scouted) -> tuple[int, tuple[str, ...], list[str]]:
        return places[told.layers[0]], told.scouts, list(told.left_out)

    # Workers end in any order.
    return ErrorCurves(curves, sorted(explorer.scouted, key=place))


class _Explorer:
    """What is known of all layers so far, and how more is found."""

    def __init__(
        self,
        costs: Sequence[str],
        climbs: bool,
        kept: CurveCache | None,
        work: Callable[..., Iterator[tuple[int, "_Outcome"]]],
        shown: bool | None,
    ) -> None:
        self.costs, self.climbs, self.kept, self.work, self.shown = costs, climbs, kept, work, shown
        self.found: dict[str, list[Candidate]] = {}
        self.built: dict[str, set[Structure]] = {}  # structures that stand on other families' candidates
        self.scouted: list[Scouted] = []
        # Hashing a layer takes as long as its Gram is large: once for all families.
        self._contents: dict[str, str] = {}

    def scout(
        self, layers: Mapping[str, LayerSurvey], allowed: Mapping[str, Sequence[type[Structure]]]
    ) -> None:
        """Explores a few layers, and of the others what was promising there."""
        groups = parties(layers, allowed)
        followers = {name for party in groups for name in party.followers}
        parts = {}
        for name, layer in layers.items():
            part = part_of_rows(layer) if name not in followers and len(allowed[name]) > 1 else None
            if part is not None:
                parts[name] = replace(part, name=_PART + name)
        whole = [layer for name, layer in layers.items() if name not in followers and name not in parts]
        for_parts = {_PART + name: allowed[name] for name in parts}
        self.explore([*whole, *parts.values()], {**allowed, **for_parts})
        able, builders, passed_over = {}, {}, {}
        for name, part in parts.items():
            points = self.found.pop(_PART + name)
            kept, left = promising([points], self.costs, ROWS_MARGIN, USEFUL)
            able[name] = [family for family in allowed[name] if any(type(one) is family for one in kept)]
            hopeless = {one: ratio for one, ratio in left.items() if type(one) not in able[name]}
            self._tell([name], [name], {}, hopeless)
            # Of the sizes that both have, those that were no good for the part.
            known = {one for family in able[name] for one in family.curve_sizes(part.weight)}
            built = self.built.pop(_PART + name, set())
            passed_over[name] = (known | built) - kept.keys()
            builders[name] = [
                family for family in able[name] if any(type(one) is family for one in kept.keys() & built)
            ]
        self.explore([layers[name] for name in parts], able, builders, passed_over)
        for party in groups:
            self._follow(party, layers, allowed)

    def _follow(
        self,
        party: Party,
        layers: Mapping[str, LayerSurvey],
        allowed: Mapping[str, Sequence[type[Structure]]],
    ) -> None:
        """What followers try: what was promising, and more of families that do better than on the scouts."""
        kept, left = promising([self.found[name] for name in party.scouts], self.costs, MARGIN)
        built = {one for name in party.scouts for one in self.built.get(name, ())}
        pieces = []
        for name in party.followers:
            self._begin(layers[name])
            for family in allowed[name]:
                pieces += _following(layers[name], family, kept, built)
        self.gather(pieces, "following")
        # Where one factorisation gives the whole ladder, nothing of it is left out.
        ladders = {piece.family for piece in pieces if piece.structures is None}
        hopeless = {one: ratio for one, ratio in left.items() if type(one) not in ladders or one in built}
        again, alike = [], dict[frozenset[type[Structure]], list[str]]()
        for name in party.followers:
            better = surprises(self.found[name], kept, self.costs) - ladders
            alike.setdefault(better, []).append(name)
            again += [self._rest(layers[name], family) for family in allowed[name] if family in better]
        for better, names in alike.items():
            out = {one: ratio for one, ratio in hopeless.items() if type(one) not in better}
            tried = {one: 0.0 for one in (*kept, *left) if one not in out}
            self._tell(names, party.scouts, tried, out)
        self.gather([piece for piece in again if piece.structures], "following")

    def _rest(self, layer: LayerSurvey, family: type[Structure]) -> "_Piece":
        """The sizes of a family that were not tried, for a climb where each is a fit of its own."""
        tried = {point.structure for point in self.found[layer.name]}
        ladder = family.curve_sizes(layer.read().weight.detach().cpu())
        return self._climb(_Piece.of(layer, family, [one for one in ladder if one not in tried]))

    def _climb(self, piece: "_Piece") -> "_Piece":
        front = tuple(self.found[piece.layer.name])
        return replace(piece, front=front, costs=tuple(self.costs)) if piece.apart else piece

    def explore(
        self,
        layers: Sequence[LayerSurvey],
        allowed: Mapping[str, Sequence[type[Structure]]],
        builders: Mapping[str, Sequence[type[Structure]]] | None = None,
        passed_over: Mapping[str, Collection[Structure]] | None = None,
    ) -> None:
        """All families of some layers: each by itself, then those that build on others, all or the builders.

        Sizes that are passed over are not fitted where each is a fit of its own, or builds on others.
        """
        builders, passed_over = builders or allowed, passed_over or {}
        pieces = []
        for layer in layers:
            self._begin(layer)
            pieces += [
                _Piece.of(layer, family)
                for family in allowed[layer.name]
                if next(family.candidates(layer.shape), None) is not None
            ]
        self.gather([piece for piece in pieces if not piece.apart], "fitting")
        # What takes a fit per size comes when it is known what the others reach.
        last = [piece.without(passed_over.get(piece.layer.name, ())) for piece in pieces if piece.apart]
        last = [piece for piece in last if piece.structures]
        if self.climbs:
            last = [self._climb(piece) for piece in last]
        self.gather(last, "fitting size by size")
        pieces = []
        for layer in layers:
            known = self.found[layer.name]
            inner = _thinned([point for point in known if not isinstance(point.structure, Dense)], self.costs)
            for family in builders[layer.name]:
                alone = {*family.candidates(layer.shape), *passed_over.get(layer.name, ())}
                built = (
                    [one for one in family.candidates(layer.shape, inner) if one not in alone]
                    if inner
                    else []
                )
                wanted = _promising(built, known, layer, self.costs)
                if wanted:
                    pieces.append(_Piece.of(layer, family, wanted))
                    self.built.setdefault(layer.name, set()).update(wanted)
        self.gather(pieces, "combining")

    def gather(self, pieces: Sequence["_Piece"], description: str) -> None:
        """Curves from the cache, the others from whoever works."""
        open_pieces = []
        for given in pieces:
            piece = replace(given, known=self._load(given))
            outcome = piece.settled()
            if outcome is None:
                open_pieces.append(piece)
            else:
                self._add(piece, outcome)
        small = sum(piece.layer.weight.numel() for piece in open_pieces) <= _SMALL
        done = self.work(open_pieces, alone=ALONE if small else 0.0)
        for number, outcome in track(done, description, total=len(open_pieces), shown=self.shown):
            self._save(open_pieces[number], outcome)
            self._add(open_pieces[number], outcome)

    def _begin(self, layer: LayerSurvey) -> None:
        self.found[layer.name] = [Candidate(Dense(), layer.cost, 0.0)]

    def _add(self, piece: "_Piece", outcome: "_Outcome") -> None:
        layer = piece.layer
        self.found[layer.name] += [layer.per_sample_point(point) for point in outcome.points]
        tried = {point.structure for point in outcome.points}
        left = [one for one in piece.structures or () if one not in tried]
        if left and not layer.name.startswith(_PART):
            kept = dict.fromkeys(tried, 0.0)
            self._tell([layer.name], [layer.name], kept, dict.fromkeys(left, outcome.hopeless))

    def _tell(
        self,
        layers: Sequence[str],
        scouts: Sequence[str],
        kept: Mapping[Structure, float],
        left: Mapping[Structure, float],
    ) -> None:
        told = summary(layers, scouts, kept, left)
        if told is not None:
            self.scouted.append(told)

    # -- between runs: whole curves, or sizes one by one where each is a fit of its own

    def _keys(self, piece: "_Piece") -> list[str]:
        layer = piece.layer
        if layer.name not in self._contents:
            layer = layer.read()
            self._contents[layer.name] = layer_digest(
                layer.weight, layer.input_gram, layer.output_gram, layer.geometry
            )
        content = self._contents[layer.name]
        if piece.apart:
            return [CurveCache.key(content, piece.family, [one]) for one in piece.structures or ()]
        ladder = list(piece.structures or piece.family.candidates(layer.shape))
        return [CurveCache.key(content, piece.family, ladder)]

    def _load(self, piece: "_Piece") -> tuple[Candidate, ...] | None:
        if self.kept is None:
            return None
        curves = [self.kept.load(key) for key in self._keys(piece)]
        if not piece.apart:
            return None if curves[0] is None else tuple(curves[0])
        return tuple(point for curve in curves if curve is not None for point in curve)

    def _save(self, piece: "_Piece", outcome: "_Outcome") -> None:
        if self.kept is None:
            return
        if not piece.apart:
            self.kept.save(self._keys(piece)[0], outcome.points)
            return
        keys = dict(zip(piece.structures or (), self._keys(piece), strict=True))
        for point in outcome.points:
            if point not in (piece.known or ()):
                self.kept.save(keys[point.structure], [point])


# What stands before the name of a layer that is part of another one's rows.
_PART = "part of "


class _Outcome(NamedTuple):
    """What a piece of work gave: candidates, and how far a climb that was broken off was from the front."""

    points: list[Candidate]
    hopeless: float = 0.0


class _NotKnown(LookupError):
    """A size that has to be fitted."""


@dataclass(frozen=True)
class _Piece:
    """One family's curve for one layer, or part of it."""

    layer: LayerSurvey
    family: type[Structure]
    structures: tuple[Structure, ...] | None = None  # some sizes; the whole ladder where None
    apart: bool = False  # whether every size is a fit of its own
    front: tuple[Candidate, ...] | None = None  # for a climb: what the other families reach
    costs: tuple[str, ...] = COSTS  # and the costs that count
    known: tuple[Candidate, ...] | None = None  # what is known before

    @classmethod
    def of(
        cls, layer: LayerSurvey, family: type[Structure], structures: Sequence[Structure] | None = None
    ) -> "_Piece":
        """A family's whole ladder, or some sizes."""
        weighted = layer.input_gram is not None or layer.output_gram is not None
        apart = family.curve_work(weighted=weighted) == "apart"
        if structures is None and apart:
            structures = family.curve_sizes(layer.read().weight.detach().cpu())
        return cls(layer, family, None if structures is None else tuple(structures), apart)

    def without(self, passed_over: Collection[Structure]) -> "_Piece":
        """The same but for some sizes."""
        return replace(self, structures=tuple(one for one in self.structures or () if one not in passed_over))

    def settled(self) -> _Outcome | None:
        """The outcome where all of it is known."""
        if self.known is None or not self.apart:
            return None if self.known is None else _Outcome(list(self.known))

        def fit(structure: Structure) -> Candidate:
            raise _NotKnown(str(structure))

        try:
            return self.one_by_one(fit)
        except _NotKnown:
            return None

    def one_by_one(self, fit: Callable[[Structure], Candidate]) -> _Outcome:
        """Size after size; a climb ends where the rest is hopeless."""
        own = {point.structure: point for point in self.known or ()}

        def point(structure: Structure) -> Candidate:
            if structure not in own:
                own[structure] = fit(structure)
            return self.layer.per_sample_point(own[structure])

        sizes, hopeless = self.structures or (), 0.0
        if self.front is None:
            reached = [point(one) for one in sizes]
        else:
            reached, hopeless = climb(sizes, point, self.front, self.costs)
        return _Outcome([own[one.structure] for one in reached], hopeless)


def _curve(piece: _Piece) -> _Outcome:
    layer = piece.layer.read()
    try:
        weight = layer.weight.detach().cpu()
        options: dict[str, Any] = {
            "input_gram": layer.input_gram,
            "output_gram": layer.output_gram,
            "geometry": layer.geometry,
        }
        if piece.apart:
            return piece.one_by_one(lambda one: piece.family.points([one], weight, **options)[0])
        if piece.structures is None:
            return _Outcome(piece.family.error_curve(weight, **options))
        return _Outcome(piece.family.points(piece.structures, weight, **options))
    finally:
        layer.release()


def _following(
    layer: LayerSurvey,
    family: type[Structure],
    kept: Mapping[Structure, float],
    built: Collection[Structure],
) -> list[_Piece]:
    """What a family tries on a layer that others of its shape have scouted for."""
    own = [one for one in kept if type(one) is family]
    weighted = layer.input_gram is not None or layer.output_gram is not None
    if not own or family.curve_work(weighted=weighted) != "whole":
        return [_Piece.of(layer, family, own)] if own else []
    # One factorisation gives all sizes of the ladder; those that build on other families come on top.
    on_others = [one for one in own if one in built]
    whole = [_Piece.of(layer, family)] if len(on_others) < len(own) else []
    return [*whole, *([_Piece.of(layer, family, on_others)] if on_others else [])]


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
