"""Advice before any fit: where replacing a layer can save time on this machine, and where it cannot."""

from collections.abc import Sequence
from dataclasses import dataclass

from weft.plan.latency import LatencyTable
from weft.progress import track
from weft.structures.base import Structure
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey

# The share of a layer's parameters at which families are compared.
SHARE = 0.25


@dataclass(frozen=True)
class Advice:
    """What a layer takes, and what the fastest structure of a quarter of its parameters would take.

    Attributes:
        dense_seconds: the dense layer's time per call.
        structure: the fastest structure; None where no family has one so small.
        seconds: its time per call.
    """

    dense_seconds: float
    structure: Structure | None
    seconds: float | None

    @property
    def reason(self) -> str | None:
        """Why the layer should be left dense where time counts; None where a structure is faster."""
        if self.structure is None or self.seconds is None:
            return f"no family has a structure of {SHARE:.0%} of its parameters"
        if self.seconds < self.dense_seconds:
            return None
        return (
            f"{self.structure}, the fastest at {SHARE:.0%} of its parameters, takes "
            f"{self.seconds * 1e3:.3f} ms, the dense layer {self.dense_seconds * 1e3:.3f} ms"
        )


def advise(
    table: LatencyTable,
    survey: Survey,
    families: Sequence[type[Structure]],
    *,
    shown: bool | None = None,
) -> dict[str, Advice]:
    """Times the families' structures of a quarter of the parameters against every dense layer.

    Args:
        table: times of this machine.
        survey: the network's survey.
        families: what to try.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        Advice by layer name.
    """
    found = {}
    for name, layer in track(survey.layers.items(), "timing", total=len(survey.layers), shown=shown):
        timed = {
            structure: table.seconds(layer, structure)
            for structure in (_quarter(family, layer) for family in families)
            if structure is not None
        }
        best = min(timed, key=lambda structure: timed[structure], default=None)
        seconds = None if best is None else timed[best]
        found[name] = Advice(table.seconds(layer, Dense()), best, seconds)
    table.save()
    return found


def _quarter(family: type[Structure], layer: LayerSurvey) -> Structure | None:
    """A family's largest structure within the share; None where it has none or refuses the layer."""
    if family is Dense:
        return None
    most = SHARE * layer.weight.numel()
    best: tuple[int, Structure] | None = None
    for structure in family.candidates(layer.shape):
        count = structure.parameter_count(layer.shape)
        if count is not None and (0 if best is None else best[0]) < count <= most:
            best = (count, structure)
    if best is None or best[1].refusal(layer.shape, layer.geometry) is not None:
        return None
    return best[1]
