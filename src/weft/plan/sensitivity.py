"""Sensitivity: how much a layer's error costs the network, measured by substituting one layer at a time."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from weft import checks
from weft.layers.replace import as_torch_has_it
from weft.measure import Batch, class_scores, device_of, evaluating, logits_of, to_device
from weft.numerics.gram import squared_error
from weft.plan.error_curves import undominated
from weft.progress import track
from weft.structures.base import Candidate
from weft.survey import LayerSurvey, Survey

Divergence = Callable[[Tensor, Tensor], Tensor]
_LEAST = 1e-30

# The squared relative errors at which a layer is tried: a layer's cost is no fixed multiple of its error over
# the whole range, and small errors act alone.
_PROBED_ERRORS = (0.02, 0.1, 0.4)


@dataclass(frozen=True)
class Sensitivity:
    """What the layers' errors cost the network.

    Attributes:
        probes: by layer name: squared relative errors, increasing, each with what it costs the network. A
            layer with one probe costs in proportion to its squared error.
        predicted: what the survey alone predicts for the same errors, up to a common factor; empty for a
            sensitivity that is itself predicted.
    """

    probes: dict[str, tuple[tuple[float, float], ...]]
    predicted: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def loss(self, name: str, error: float) -> float:
        """What an error costs: between probes by a power law, outside them in proportion to the square.

        Args:
            name: the layer.
            error: its relative error.

        Returns:
            The cost in the probes' unit.

        Raises:
            ValueError: the layer was not probed.
        """
        probes = self.probes.get(name)
        if not probes:
            remedy = "measure it on this model"
            raise ValueError(checks.fault("sensitivity", f"known for layer {name}", "none", remedy))
        square = error**2
        first, last = probes[0], probes[-1]
        if square <= first[0]:
            return first[1] * square / first[0]
        if square >= last[0]:
            return last[1] * square / last[0]
        xs, ys = zip(*probes, strict=True)
        logs = np.log(np.maximum(ys, _LEAST))
        return float(np.exp(np.interp(np.log(square), np.log(xs), logs)))

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured costs; NaN where nothing was measured."""
        expected = [value for values in self.predicted.values() for value in values]
        measured = [cost for name in self.predicted for _, cost in self.probes[name]]
        return rank_correlation(expected, measured)


def predicted_sensitivity(survey: Survey) -> Sensitivity:
    """What the layers' errors cost as the survey alone predicts it.

    Args:
        survey: the network's survey.

    Returns:
        With a survey that saw gradients (`loss` or `teacher`) the predicted increase of the loss
        (Gauss-Newton), else the squared relative errors themselves.
    """
    # A lookup's output Gram is how often its rows are asked for: what the gradients said is its input Gram.
    if any(
        (layer.input_gram if layer.lookup else layer.output_gram) is None for layer in survey.layers.values()
    ):
        return Sensitivity({name: ((1.0, 1.0),) for name in survey.layers})
    return Sensitivity({
        name: ((1.0, _energy(layer) * layer.applications),) for name, layer in survey.layers.items()
    })


def _energy(layer: LayerSurvey) -> float:
    return float(squared_error(layer.weight.double().flatten(1), layer.input_gram, layer.output_gram))


def squared_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """The squared distance of outputs, relative to the spread of the dense network's over the batch.

    Args:
        output: the changed network's, shape (batch, ...).
        reference: the dense network's.

    Returns:
        A scalar.
    """
    spread = (reference - reference.mean(0, keepdim=True)).square().sum()
    return (output - reference).square().sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def kullback_leibler_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """The divergence of the softmax of two networks' scores: the loss of a classifier that copies the other.

    Args:
        output: the changed network's scores, shape (..., classes), or (batch, classes, *space) with two axes
            of space or more.
        reference: the dense network's.

    Returns:
        A scalar, the mean over all score vectors.
    """
    ours, theirs = (class_scores(scores).log_softmax(-1) for scores in (output, reference))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


DIVERGENCES: dict[str, Divergence] = {
    "squared": squared_divergence,
    "kullback_leibler": kullback_leibler_divergence,
}


def measure_sensitivity(
    model: nn.Module,
    survey: Survey,
    curves: Mapping[str, Sequence[Candidate]],
    batches: Iterable[Batch],
    *,
    divergence: Literal["squared", "kullback_leibler"] | Divergence = "squared",
    shown: bool | None = None,
) -> Sensitivity:
    """Substitutes one layer at a time and measures what that does to the network's output.

    Args:
        model: the dense network; run in evaluation mode, not changed.
        survey: its survey.
        curves: error curves; of each a few candidates are fitted and tried.
        batches: calibration data without labels, a few hundred samples; gone through once per layer.
        divergence: "squared", the distance of the outputs relative to their spread; "kullback_leibler", that
            of classifiers; or a function of the changed output and the dense network's.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        What the tried errors cost, for `allocate`.

    Raises:
        ValueError: there are no batches, or an output is not finite.
    """
    if isinstance(divergence, str):
        checks.one_of("divergence", divergence, tuple(DIVERGENCES))
        divergence = DIVERGENCES[divergence]
    given = [to_device(batch, device_of(model)) for batch in batches]
    if not given:
        raise ValueError(checks.fault("batches", "not empty", "none", "pass calibration data"))
    expected = predicted_sensitivity(survey)
    probes: dict[str, tuple[tuple[float, float], ...]] = {}
    predicted: dict[str, tuple[float, ...]] = {}
    with evaluating(model), torch.no_grad():
        reference = [_output(model, {}, batch) for batch in given]
        for name in track(curves, "substituting", total=len(curves), shown=shown):
            layer = survey.layers[name]
            found = []
            for point in _probes(curves[name]):
                member = point.structure.fit(
                    layer.weight, input_gram=layer.input_gram, output_gram=layer.output_gram
                )
                # Tied layers follow: functional_call replaces a shared parameter wherever it stands.
                weight = as_torch_has_it(member.to_dense().to(layer.weight), layer.geometry)
                changed = {f"{name}.weight".lstrip("."): weight}
                distances = [
                    float(divergence(_output(model, changed, batch), base))
                    for batch, base in zip(given, reference, strict=True)
                ]
                cost = sum(distances) / len(distances)
                if not math.isfinite(cost):
                    remedy = "check the calibration data and the model"
                    got = f"{cost} with {point.structure} in layer {name}"
                    raise ValueError(checks.fault("divergence", "finite", got, remedy))
                found.append((point.error**2, max(cost, 0.0)))
            probes[name] = _rising(found) or ((1.0, 0.0),)
            predicted[name] = tuple(expected.loss(name, math.sqrt(square)) for square, _ in probes[name])
    return Sensitivity(probes, predicted)


def _rising(found: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Probes by increasing error, none cheaper than one of a smaller error: what is, is noise."""
    highest = 0.0
    kept = []
    for square, cost in sorted(found):
        highest = max(highest, cost)
        kept.append((square, highest))
    return tuple(kept)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank.

    Args:
        first: numbers.
        second: as many.

    Returns:
        Between -1 and 1; NaN where there are fewer than two or one side is constant.

    Examples:
        >>> rank_correlation([1, 2, 3], [10, 30, 20])
        0.5
    """

    def ranks(values: Sequence[float]) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=float)
        _, places, counts = np.unique(array, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[places]

    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return round(float(np.corrcoef(ranks(first), ranks(second))[0, 1]), 12)


def _probes(curve: Sequence[Candidate]) -> list[Candidate]:
    """The candidates nearest to the probed errors, by the logarithm."""
    lossy = [point for point in undominated(curve) if point.error > 1e-6]
    if not lossy:
        return []
    return list(
        dict.fromkeys(
            min(lossy, key=lambda point: abs(math.log(point.error**2 / wanted))) for wanted in _PROBED_ERRORS
        )
    )


def _output(model: nn.Module, changed: Mapping[str, Tensor], batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return logits_of(functional_call(model, dict(changed), (batch,)))
    if isinstance(batch, Mapping):
        return logits_of(functional_call(model, dict(changed), (), dict(batch)))
    return logits_of(functional_call(model, dict(changed), tuple(batch)))
