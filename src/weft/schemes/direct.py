"""Direct compression: every layer of a plan fitted to its weight."""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weft import checks
from weft.layers.replace import replace_layer
from weft.measure import Batch, check_repeatable
from weft.plan.plan import check_plan
from weft.plan.workers import run
from weft.progress import track
from weft.schemes.corrections import bias_correction, correct_batch_norm, restart_batch_norm
from weft.schemes.result import Result
from weft.schemes.sequential import Target, bias_shift, execution_order, sequential_target
from weft.structures.base import Structure, StructuredMatrix, relative_error
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
    starts: Mapping[str, StructuredMatrix] | None = None,
    generator: torch.Generator | None = None,
    workers: int = 1,
    ray: str | None = None,
    worker_memory: int | None = None,
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
        starts: members of an earlier compression by layer name, of the plan's families, to start from.
        generator: the source of randomness of fits that need it, one seed for each layer; fixed seeds where
            None.
        workers: processes that fit, one thread each; 1 fits in this process, as sequential fits always do.
        ray: "local" or the address of a Ray cluster, in place of the processes.
        worker_memory: bytes that each of them may take; where None, the machine's shared out evenly.
        shown: whether to draw progress bars; where None, on a terminal (lines elsewhere).

    Returns:
        The compressed network, in the modes and with the frozen weights of the dense one, and one log entry
        per layer: structure, cost, relative error (in the survey's metric), seconds.

    Raises:
        ValueError: the plan names a layer that the model does not have, that the survey knows in another
            shape, or that a structure cannot take; or workers are asked for sequential fits.

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
    # The model may have been trained on since the survey: it is its own weights that are fitted.
    pieces = {
        name: Piece(
            replace(survey.layers[name], weight=own[name].weight, names=own[name].names),
            plan[name],
            seed=None if generator is None else int(torch.randint(2**62, (), generator=generator)),
            start=None if starts is None else starts.get(name),
        )
        for name in wanted
    }
    if sequential and batches is not None:
        if workers > 1 or ray is not None:
            remedy = "leave it out: a sequential fit needs the layers before it"
            raise ValueError(checks.fault("workers or ray", "left out with sequential", workers, remedy))
        for name in track(wanted, "compressing", shown=shown):
            if log:
                restart_batch_norm(small, model)
                correct_batch_norm(small, model, batches, shown=False)
            target = sequential_target(model, small, pieces[name].layer, batches, calls=calls[name])
            piece = replace(pieces[name], target=target)
            small = _put(small, piece, fit_piece(piece), log, correct_biases)
    else:
        made = [pieces[name] for name in wanted]
        fits = run(fit_piece, made, workers=workers, ray=ray, memory=worker_memory)
        for number, fit in track(fits, "compressing", total=len(made), shown=shown):
            small = _put(small, pieces[wanted[number]], fit, log, correct_biases)
        log.sort(key=lambda entry: wanted.index(entry["layer"]))
    if batches is not None and log:
        if sequential:  # corrected along the way, for the layers that came after
            restart_batch_norm(small, model)
        correct_batch_norm(small, model, batches, shown=shown)
    return Result(small, log)


@dataclass(frozen=True)
class Piece:
    """A layer to be fitted.

    Attributes:
        layer: its survey.
        structure: what it shall be.
        seed: of the fit's randomness; the family's own where None.
        start: a member to start from.
        target: what it is fitted to, where not to its weight.
    """

    layer: LayerSurvey
    structure: Structure
    seed: int | None = None
    start: StructuredMatrix | None = None
    target: Target | None = None


@dataclass(frozen=True)
class LayerFit:
    """What a fit gives, whoever did it.

    Attributes:
        matrix: the member.
        error: its relative error, in the survey's metric.
        seconds: how long it took.
    """

    matrix: StructuredMatrix
    error: float
    seconds: float


def fit_piece(piece: Piece) -> LayerFit:
    """Fits one layer, in whatever process.

    Args:
        piece: what is asked.

    Returns:
        The fit.
    """
    start = time.perf_counter()
    layer, target = piece.layer.read(), piece.target
    inner, outer = layer.input_gram, layer.output_gram
    matrix = piece.structure.fit(
        layer.weight if target is None else target.weight,
        input_gram=inner if target is None else target.input_gram,
        output_gram=outer,
        start=piece.start,
        generator=None if piece.seed is None else torch.Generator().manual_seed(piece.seed),
    )
    error = relative_error(layer.weight, matrix, input_gram=inner, output_gram=outer)
    layer.release()
    return LayerFit(matrix, error, time.perf_counter() - start)


def _put(
    model: nn.Module, piece: Piece, fit: LayerFit, log: list[dict[str, Any]], correct_biases: bool
) -> nn.Module:
    """Puts a fit in its layer's place, and an entry into the log."""
    layer, target = piece.layer, piece.target
    model = replace_layer(model, layer.names, fit.matrix)
    shift = None
    if correct_biases and target is None:
        shift = bias_correction(layer, fit.matrix)
    elif correct_biases and target is not None:
        shift = bias_shift(layer, fit.matrix.to_dense(), target)
    if shift is not None:
        with torch.no_grad():
            for bias in {id(found): found for found in _biases(model, layer.names)}.values():
                bias += shift.to(bias)
    log.append(log_entry(layer, fit))
    return model


def log_entry(layer: LayerSurvey, fit: LayerFit) -> dict[str, Any]:
    """What is told of a fitted layer.

    Args:
        layer: its survey.
        fit: its fit.

    Returns:
        JSON-ready data.
    """
    cost = layer.per_sample(fit.matrix.cost(layer.geometry))
    return {
        "layer": layer.name,
        "structure": fit.matrix.structure.to_json(),
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "multiply_adds": cost.multiply_adds,
        "error": fit.error,
        "only_storage_shrinks": fit.matrix.only_storage_shrinks(layer.geometry),
        "seconds": fit.seconds,
    }


def _biases(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return [layer.bias for layer in layers if layer.bias is not None]
