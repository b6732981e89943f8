"""Error curves: for every layer its undominated candidates, each with cost and error."""

from collections.abc import Iterable, Sequence

from weft.progress import track
from weft.structures.base import Candidate, Structure
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey


def error_curves(
    survey: Survey, families: Sequence[type[Structure]], *, shown: bool | None = None
) -> dict[str, list[Candidate]]:
    """The candidates of all families for every layer, the dense weight always among them.

    Args:
        survey: the network's survey.
        families: what to choose from.
        shown: whether to draw a progress bar; where None, only on a terminal.

    Returns:
        By layer name: undominated candidates, cheapest first; multiply-adds are per sample of the network.
    """
    return {
        name: layer_candidates(layer, families)
        for name, layer in track(survey.layers.items(), "fitting", total=len(survey.layers), shown=shown)
    }


def layer_candidates(layer: LayerSurvey, families: Sequence[type[Structure]]) -> list[Candidate]:
    """The undominated candidates of one layer.

    Args:
        layer: the layer.
        families: what to choose from.

    Returns:
        Candidates, cheapest first, the dense weight last.
    """
    found = [Candidate(Dense(), layer.cost, 0.0)]
    for family in families:
        if family is Dense:
            continue
        sizes = family.candidates(layer.shape)
        probe = next(iter(sizes), None)
        if probe is None or probe.refusal(layer.shape, layer.geometry) is not None:
            continue
        curve = family.error_curve(
            layer.weight, input_gram=layer.input_gram, output_gram=layer.output_gram, geometry=layer.geometry
        )
        for gram in (layer.input_gram, layer.output_gram):
            if gram is not None:
                gram.release()
        found += [Candidate(point.structure, layer.per_sample(point.cost), point.error) for point in curve]
    return undominated(found)


def undominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Drops every candidate that another one beats or equals in all costs and in error.

    Args:
        candidates: in any order.

    Returns:
        The others, by parameters, then bytes, then multiply-adds.
    """
    ordered = sorted(candidates, key=lambda point: (point.error, *_costs(point)))
    kept: list[Candidate] = []
    for point in ordered:  # whoever could dominate it has no larger error, so stands before it
        own = _costs(point)
        if not any(
            all(theirs <= mine for theirs, mine in zip(_costs(other), own, strict=True)) for other in kept
        ):
            kept.append(point)
    return sorted(kept, key=_costs)


def _costs(point: Candidate) -> tuple[int, int, int]:
    return point.cost.parameters, point.cost.bytes, point.cost.multiply_adds
