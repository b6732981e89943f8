"""Closed-form corrections after a fit: biases and batch-norm statistics."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft import checks
from weft.measure import Batch, batch_size, call, device_of, evaluating, to_device
from weft.progress import track
from weft.structures.base import StructuredMatrix
from weft.survey import LayerSurvey


def bias_correction(layer: LayerSurvey, matrix: StructuredMatrix) -> Tensor | None:
    """What a fit takes from the mean output: (W − Ŵ) E[x], to be added to the bias.

    Args:
        layer: the layer's survey.
        matrix: the structured weight.

    Returns:
        Shape (outputs,), float64; None where the survey saw no data.
    """
    if layer.mean_input is None:
        return None
    weight = layer.weight.detach().double().flatten(1).cpu()
    lost = weight - matrix.to_dense().detach().double().flatten(1).cpu()
    if layer.mean_input.ndim == 1:
        return lost @ layer.mean_input
    grouped = lost.reshape(len(layer.mean_input), -1, lost.shape[1])  # one mean patch per group
    return (grouped @ layer.mean_input.unsqueeze(-1)).reshape(-1)


def correct_batch_norm(
    model: nn.Module, dense: nn.Module, batches: Iterable[Batch], *, shown: bool | None = None
) -> int:
    """Corrects batch-norm statistics by what compression did to their inputs.

    The running statistics are not re-estimated from the few calibration data, but moved by the difference
    between both networks on the same data, so that a layer whose input did not change keeps its statistics,
    and sampling noise cancels. With means m and m₀ and variances v and v₀ of compressed and dense network,

        variance' = variance · r,   mean' = m + √r (mean − m₀),   r = √(v / v₀).

    A fit leaves out variance. To restore all of it (r = v / v₀) amplifies what the fit got wrong, to restore
    none is best for one layer alone but lets signals fade with depth; on ResNet-20 the geometric mean of the
    two was better than either (0.64, 0.60 and 0.58 at 0.35 of the parameters). Every batch runs with its own
    correction, so that later layers see inputs that are corrected already.

    Args:
        model: the compressed network, changed in place.
        dense: the dense network.
        batches: calibration data without labels.
        shown: whether to draw a progress bar; where None, on a terminal (lines elsewhere).

    Returns:
        How many batch-norm layers were corrected.

    Raises:
        ValueError: there are batch-norm layers but no samples in the batches.
    """
    ours = _tracking(model)
    theirs = _tracking(dense)
    names = [name for name in ours if name in theirs]
    if not names:
        return 0
    reference: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}  # one per call, in order
    before = {name: (ours[name].running_mean.clone(), ours[name].running_var.clone()) for name in names}
    sums: dict[str, list[Tensor]] = {}
    weights: dict[str, int] = dict.fromkeys(names, 0)
    handles = []

    def observe(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            reference[name].append(_statistics(given[0]))

        return hook

    def correct(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            own, other = _statistics(given[0]), reference[name].pop(0)
            count = given[0].shape[0]
            parts = [count * part for pair in (own, other) for part in pair]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
            weights[name] += count
            _put(module, before[name], own, other)

        return hook

    for name in names:
        handles.append(theirs[name].register_forward_pre_hook(observe(name)))
        handles.append(ours[name].register_forward_pre_hook(correct(name)))
    try:
        with evaluating(model), evaluating(dense), torch.no_grad():
            for batch in track(batches, "correcting", shown=shown):
                if not batch_size(batch):
                    continue
                call(dense, to_device(batch, device_of(dense)))
                call(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
        for name in names:
            if name in sums:
                own_mean, own_var, mean, var = (part / weights[name] for part in sums[name])
                _put(ours[name], before[name], (own_mean, own_var), (mean, var))
    if not sums:
        remedy = "pass at least one batch; a generator can be used only once"
        raise ValueError(checks.fault("batches", "not empty", "no samples", remedy))
    return len(sums)


def restart_batch_norm(model: nn.Module, dense: nn.Module) -> None:
    """Gives batch-norm layers the dense network's statistics again, before they are corrected anew.

    Args:
        model: the compressed network, changed in place.
        dense: the dense network.
    """
    theirs = _tracking(dense)
    with torch.no_grad():
        for name, module in _tracking(model).items():
            if name in theirs:
                module.running_mean.copy_(theirs[name].running_mean)
                module.running_var.copy_(theirs[name].running_var)


def _tracking(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None  # noqa: SLF001
    }


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel, in float32 at least."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, axes, correction=0)
    return mean, variance


def _put(
    module: Any, before: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> None:
    mean, variance = before
    # A channel that is constant on the calibration data says nothing about its scale.
    known = (other[1] > module.eps) & (own[1] > 0)
    ratio = torch.where(known, own[1] / other[1].clamp_min(module.eps), 1.0).sqrt()
    scale = ratio.sqrt()
    module.running_mean.copy_(scale * mean + (own[0] - scale * other[0]))  # exact where nothing changed
    module.running_var.copy_(variance * ratio)
