"""Direct compression: every layer of a plan fitted to its weight."""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weft import checks
from weft.layers.replace import replace_layer
from weft.measure import Batch, check_repeatable
from weft.plan.plan import check_plan
from weft.progress import track
from weft.schemes.corrections import bias_correction, correct_batch_norm, restart_batch_norm
from weft.schemes.result import Result
from weft.schemes.sequential import Target, bias_shift, execution_order, sequential_target
from weft.structures.base import Structure, relative_error
from weft.structures.dense import Dense
from weft.survey import LayerSurvey, Survey, find_layers
from weft.survey import survey as survey_model


def compress(
    model: nn.Module,
    plan: Mapping[str, Structure],
    survey: Survey | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    correct_biases: bool = True,
    sequential: bool = False,
    generator: torch.Generator | None = None,
    shown: bool | None = None,
) -> Result:
    """Replaces layers by structured ones, each fitted to its weight in the survey's metric.

    Args:
        model: the dense network; it is not changed.
        plan: structures by layer name, from `weft.allocate` or made by hand; layers not named stay dense.
        survey: the network's survey; without one, fits are in the Frobenius norm.
        batches: calibration data without labels; batch-norm statistics are then corrected.
        correct_biases: whether existing biases take up the change of the mean output, (W − Ŵ) E[x].
        sequential: whether layers are fitted one after the other in the order in which they run, each to the
            inputs that the compressed ones before it give (weft.schemes.sequential); needs batches that can
            be iterated more than once, two passes for every layer.
        generator: the source of randomness of fits that need it; fixed seeds where None.
        shown: whether to draw progress bars; where None, only on a terminal.

    Returns:
        The compressed network, in the modes and with the frozen weights of the dense one, and one log entry
        per layer: structure, cost, relative error (in the survey's metric), seconds.

    Raises:
        ValueError: the plan names a layer that the model does not have, that the survey knows in another
            shape, or that a structure cannot take.

    Examples:
        >>> import weft
        >>> from weft.structures.low_rank import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> small, log = compress(model, {"0": LowRank(rank=2)})
        >>> small[0].matrix.structure, log[0]["parameters"]
        (LowRank(rank=2, method='svd'), 32)
    """
    survey = survey_model(model) if survey is None else survey
    check_plan(plan, survey)
    own, _ = find_layers(model)
    for name in plan:
        expected = f"of shape {survey.layers[name].shape}, as surveyed"
        if name not in own or own[name].shape != survey.layers[name].shape:
            got = own[name].shape if name in own else "none in the model"
            raise ValueError(checks.fault(f"layer {name}", expected, got, "survey this model itself"))
    small = copy.deepcopy(model)
    log: list[dict[str, Any]] = []
    calls: dict[str, int] = {}
    wanted = [name for name, structure in plan.items() if not isinstance(structure, Dense)]
    if sequential:
        if batches is None:
            remedy = "pass calibration data, or leave sequential off"
            raise ValueError(checks.fault("batches", "given with sequential", None, remedy))
        check_repeatable("batches", batches)
        calls = execution_order(model, [own[name] for name in wanted], next(iter(batches)))
        wanted = list(calls)
    for name in track(wanted, "compressing", shown=shown):
        # The model may have been trained on since the survey: it is its own weights that are fitted.
        layer = replace(survey.layers[name], weight=own[name].weight, names=own[name].names)
        target = None
        if sequential and batches is not None:
            if log:
                restart_batch_norm(small, model)
                correct_batch_norm(small, model, batches, shown=False)
            target = sequential_target(model, small, layer, batches, calls=calls[name])
        small, entry = _replace(small, layer, plan[name], target, correct_biases, generator)
        log.append(entry)
    if batches is not None and log:
        if sequential:  # corrected along the way, for the layers that came after
            restart_batch_norm(small, model)
        correct_batch_norm(small, model, batches, shown=shown)
    return Result(small, log)


def _replace(
    model: nn.Module,
    layer: LayerSurvey,
    structure: Structure,
    target: Target | None,
    correct_biases: bool,
    generator: torch.Generator | None,
) -> tuple[nn.Module, dict[str, Any]]:
    start = time.perf_counter()
    inner, outer = layer.input_gram, layer.output_gram
    if target is None:
        matrix = structure.fit(layer.weight, input_gram=inner, output_gram=outer, generator=generator)
    else:
        matrix = structure.fit(
            target.weight, input_gram=target.input_gram, output_gram=outer, generator=generator
        )
    dense = matrix.to_dense()
    error = relative_error(layer.weight, dense, input_gram=inner, output_gram=outer)
    for gram in (inner, outer):
        if gram is not None:
            gram.release()
    model = replace_layer(model, layer.names, matrix)
    shift = None
    if correct_biases:
        shift = bias_correction(layer, matrix) if target is None else bias_shift(layer, dense, target)
    if shift is not None:
        with torch.no_grad():
            for bias in {id(found): found for found in _biases(model, layer.names)}.values():
                bias += shift.to(bias)
    cost = layer.per_sample(matrix.cost(layer.geometry))
    return model, {
        "layer": layer.name,
        "structure": matrix.structure.to_json(),
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "multiply_adds": cost.multiply_adds,
        "error": error,
        "only_storage_shrinks": matrix.only_storage_shrinks(layer.geometry),
        "seconds": time.perf_counter() - start,
    }


def _biases(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return [layer.bias for layer in layers if layer.bias is not None]
