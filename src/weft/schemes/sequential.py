"""Sequential fitting: every layer fitted to the inputs that the compressed layers before it give.

A layer fitted by itself knows nothing of what the layers before it lost. Here layers are fitted in the order
in which they run. With x the layer's input in the dense network and x̂ that in the network compressed so far,
the target is the dense network's output (Zhang et al. 2016, Accelerating very deep convolutional networks,
section 3.3, its asymmetric reconstruction, here with a ridge):

    min_Ŵ  E‖W (x − m) − Ŵ (x̂ − m̂)‖² + ρ‖W − Ŵ‖²,   m = E[x], m̂ = E[x̂].

With Ĉ = Cov(x, x̂) + ρI and Ĝ = Cov(x̂) + ρI the minimiser over all matrices is W̃ = W Ĉ Ĝ⁻¹, and what is left
to a family is to be near to W̃ in the metric Ĝ. The bias takes up W m − Ŵ m̂.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.layers.replace import geometry_of_layer
from weft.measure import Batch, batch_size, call, device_of, evaluating, slow_attention_path, to_device
from weft.numerics.gram import DEFAULT_SHRINKAGE, BlockDiagonalGram, DenseGram, Gram
from weft.structures.base import Geometry, matrix_shape
from weft.survey import WIDEST_DENSE_GRAM, LayerSurvey, input_vectors


@dataclass(frozen=True)
class Target:
    """What a layer shall be fitted to.

    Attributes:
        weight: W̃, the weight's own shape and dtype.
        input_gram: Ĝ, about the mean.
        mean: m, the mean input of the dense network, float64, shape (groups, inputs).
        reached_mean: m̂, that of the network compressed so far.
    """

    weight: Tensor
    input_gram: Gram
    mean: Tensor
    reached_mean: Tensor


def execution_order(model: nn.Module, layers: Iterable[LayerSurvey], batch: Batch) -> dict[str, int]:
    """Weights in the order in which they first run.

    Args:
        model: the network.
        layers: weights of it.
        batch: inputs for one run.

    Returns:
        By the weight's name: how often the layers that share it ran; those that did not come last, with 0.
    """
    wanted = list(layers)
    calls: dict[str, int] = {}
    handles = []
    for layer in wanted:

        def note(*_: Any, name: str = layer.name) -> None:
            calls[name] = calls.get(name, 0) + 1

        handles += [module.register_forward_pre_hook(note) for module in _modules(model, layer)]
    try:
        with evaluating(model), torch.no_grad(), slow_attention_path():
            call(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return calls | {layer.name: 0 for layer in wanted if layer.name not in calls}


def _modules(model: nn.Module, layer: LayerSurvey) -> list[nn.Module]:
    """The layers that share a weight, each once."""
    return list(dict.fromkeys(model.get_submodule(name) for name in layer.names))


def sequential_target(
    dense: nn.Module,
    small: nn.Module,
    layer: LayerSurvey,
    batches: Iterable[Batch],
    *,
    calls: int,
    shrinkage: float = DEFAULT_SHRINKAGE,
) -> Target | None:
    """The target of one layer, from both networks' inputs to it on the same data.

    Args:
        dense: the dense network.
        small: the network compressed up to this layer.
        layer: the layer's survey.
        batches: calibration data.
        calls: how often the layers that share the weight run in one forward pass, which ends after them.
        shrinkage: ρ in units of the mean variance of x̂.

    Returns:
        The target; None for a layer that takes no vectors (a lookup), is too wide for a square matrix, or
        that no data reached.
    """
    _, inputs = matrix_shape(layer.shape)
    if layer.lookup or not calls or inputs > WIDEST_DENSE_GRAM:
        return None
    groups = 1 if layer.geometry is None else layer.geometry.groups
    own = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    cross = torch.zeros_like(own)
    sums = torch.zeros(2, groups, inputs, dtype=torch.float64)
    count = 0
    for batch in batches:
        if not batch_size(batch):
            continue
        theirs = _inputs_of(dense, layer, calls, batch)
        ours = _inputs_of(small, layer, calls, batch)
        for (x, geometry), (reached, _) in zip(theirs, ours, strict=True):
            pieces = (input_vectors(_real(one), layer.shape, geometry) for one in (x, reached))
            for exact, given in zip(*pieces, strict=True):
                own += (given.mT @ given).double()
                cross += (exact.mT @ given).double()
                sums += torch.stack([exact.sum(1), given.sum(1)]).double()
                count += given.shape[1]
    if not count:
        return None
    mean, reached_mean = sums / count
    own = own / count - reached_mean.unsqueeze(2) * reached_mean.unsqueeze(1)
    cross = cross / count - mean.unsqueeze(2) * reached_mean.unsqueeze(1)
    gram = DenseGram(own[0], shrinkage) if groups == 1 else BlockDiagonalGram(own, shrinkage)
    identity = torch.eye(inputs, dtype=torch.float64)
    weight = layer.weight.detach().double().cpu().reshape(groups, -1, inputs)
    ridged = own + gram.ridge * identity
    target = torch.linalg.solve(ridged, (weight @ (cross + gram.ridge * identity)).mT).mT
    return Target(target.reshape(layer.shape).to(layer.weight), gram, mean, reached_mean)


def bias_shift(layer: LayerSurvey, matrix: Tensor, target: Target) -> Tensor:
    """What the bias takes up: W m − Ŵ m̂.

    Args:
        layer: the layer's survey.
        matrix: Ŵ, the dense form of the fitted weight.
        target: what it was fitted to.

    Returns:
        Shape (outputs,), float64.
    """
    groups = len(target.mean)
    parts = []
    for weight, mean in ((layer.weight, target.mean), (matrix, target.reached_mean)):
        grouped = weight.detach().double().cpu().reshape(groups, -1, mean.shape[1])
        parts.append((grouped @ mean.unsqueeze(-1)).reshape(-1))
    return parts[0] - parts[1]


class _Enough(Exception):  # noqa: N818  (no error)
    """Ends a forward pass once what was wanted of it has run."""


def _inputs_of(
    model: nn.Module, layer: LayerSurvey, calls: int, batch: Batch
) -> list[tuple[Tensor, Geometry | None]]:
    """The inputs of the layers that share a weight, in the order in which they ran."""
    caught: list[tuple[Tensor, Geometry | None]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        caught.append((x.detach(), geometry_of_layer(module)))
        if len(caught) == calls:
            raise _Enough

    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in _modules(model, layer)]
    try:
        with evaluating(model), torch.no_grad(), slow_attention_path(), suppress(_Enough):
            call(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _real(x: Tensor) -> Tensor:
    """An input as it is summed up: float32 or float64, in host memory."""
    return (x if x.dtype == torch.float64 else x.float()).cpu()
