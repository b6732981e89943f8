"""Which layers of a network can hold a structured matrix, and how they are replaced."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft import checks
from weft.layers.base import StructuredLayer
from weft.layers.convolution import (
    CONVOLUTION_CLASSES,
    Convolution,
    StructuredConvolution,
    StructuredTransposedConvolution,
    TransposedConvolution,
    geometry_of,
)
from weft.layers.embedding import StructuredEmbedding
from weft.layers.linear import StructuredLinear
from weft.structures.base import Geometry, StructuredMatrix, exchange_channels

_SUPPORTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTION_CLASSES)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def dense_weight(module: nn.Module) -> Tensor | None:
    """The weight of a layer that can be replaced.

    Args:
        module: any module.

    Returns:
        The weight as a structured matrix would have it: the parameter itself, or its values as (outputs,
        channels / groups, *kernel) for a transposed convolution. None where the layer cannot be replaced;
        `refusal` says why.
    """
    layer: Any = module
    if refusal(module) is not None:
        return None
    geometry = geometry_of_layer(module)
    if geometry is None or not geometry.transposed:
        return layer.weight
    return exchange_channels(layer.weight, geometry.groups)


def put_dense_weight(module: nn.Module, weight: Tensor) -> None:
    """Writes the weight of a layer that can be replaced.

    Args:
        module: the layer, changed in place.
        weight: as `dense_weight` gives it, which may be a copy.
    """
    layer: Any = module
    with torch.no_grad():
        layer.weight.copy_(as_torch_has_it(weight, geometry_of_layer(module)))


def as_torch_has_it(weight: Tensor, geometry: Geometry | None) -> Tensor:
    """A weight in the layout in which torch's own layer keeps it.

    Args:
        weight: as `dense_weight` gives it.
        geometry: the convolution's; None for a linear layer.

    Returns:
        The weight itself, or (channels, outputs / groups, *kernel) for a transposed convolution.
    """
    if geometry is None or not geometry.transposed:
        return weight
    return exchange_channels(weight, geometry.groups)


def refusal(module: nn.Module) -> str | None:
    """Why a layer with a weight cannot be replaced.

    Args:
        module: any module.

    Returns:
        None for a layer that can be replaced; "" for a module that holds no weight of this kind at all; else
        the reason, worded to follow "left dense, because".
    """
    if isinstance(module, StructuredLayer):
        return "it is compressed already"
    if not isinstance(module, _SUPPORTED):
        return ""
    if _computes_differently(module):
        return f"{type(module).__name__} computes in its own way"
    if "weight" not in module._parameters:  # noqa: SLF001  (tells a parameter from a computed attribute)
        return (
            "its weight is computed by a parametrisation; remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm)"
        )
    weight = module._parameters["weight"]  # noqa: SLF001
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and has not seen an input yet"
    if weight is None or not weight.is_floating_point():
        return f"its weight is {None if weight is None else weight.dtype}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm changes rows of the table as they are looked up"
    return None


def _computes_differently(module: nn.Module) -> bool:
    """Whether a subclass, or a wrapper put on the instance, has changed how the layer computes."""
    plain = next(kind for kind in _SUPPORTED if isinstance(module, kind))
    steps = [step for step in ("forward", "_conv_forward", "_output_padding") if step in vars(plain)]
    return any(step in vars(module) or getattr(type(module), step) is not vars(plain)[step] for step in steps)


def replace_layer(model: nn.Module, names: Sequence[str], matrix: StructuredMatrix) -> nn.Module:
    """Replaces layers that share one weight by structured layers that share one matrix.

    Biases, geometry, training mode, frozen weights and hooks of each layer are kept. A module that stands in
    several places of the network stays one module.

    Args:
        model: the network, changed in place.
        names: the layers' names; "" where the model itself is the layer.
        matrix: the structured weight.

    Returns:
        The model, or the new layer where the model itself was the layer.

    Raises:
        ValueError: a layer does not exist or cannot be replaced.
    """
    # All of them before the first one is replaced: a shared block has one layer under many names.
    modules: dict[str, nn.Module] = {}
    for name in names:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            remedy = "survey this model itself"
            raise ValueError(checks.fault(f"layer {name}", "a layer of the model", "none", remedy)) from error
    layers = {module: structured_layer(module, matrix) for module in dict.fromkeys(modules.values())}
    for name, module in modules.items():
        parent_name, _, attribute = name.rpartition(".")
        if not attribute:
            return layers[module]
        setattr(model.get_submodule(parent_name), attribute, layers[module])
    return model


def structured_layer(module: nn.Module, matrix: StructuredMatrix) -> StructuredLayer:
    """The layer that stands in for a dense one.

    Args:
        module: the dense layer.
        matrix: its structured weight, of the same shape.

    Returns:
        A layer with the dense one's bias, geometry, mode, frozen state and hooks.

    Raises:
        ValueError: the layer cannot be replaced, or the matrix has another shape.
    """
    weight = dense_weight(module)
    if weight is None:
        reason = refusal(module) or f"{type(module).__name__} holds no weight of this kind"
        remedy = f"leave it dense, because {reason}"
        raise ValueError(checks.fault("layer", "one that can be replaced", type(module).__name__, remedy))
    checks.shape("matrix", matrix.shape, weight.shape, "fit the structure to this layer's weight")
    matrix.requires_grad_(weight.requires_grad).to(weight.device)
    layer = _around(matrix, module)
    layer.train(module.training)
    for kind in _HOOKS:
        getattr(layer, kind).update(getattr(module, kind))
    layer._is_full_backward_hook = module._is_full_backward_hook  # noqa: SLF001  (else torch passes them over)
    return layer


def _around(matrix: StructuredMatrix, module: Any) -> StructuredLayer:
    if isinstance(module, nn.Embedding):
        return StructuredEmbedding(matrix, module.padding_idx)
    geometry = geometry_of_layer(module)
    if geometry is None:
        return StructuredLinear(matrix, module.bias)
    kind = StructuredTransposedConvolution if geometry.transposed else StructuredConvolution
    return kind(matrix, geometry, module.bias)


def looks_up(module: nn.Module) -> bool:
    """Whether a layer looks rows up instead of multiplying by its weight.

    Args:
        module: a dense or structured layer.

    Returns:
        True for embeddings.
    """
    return isinstance(module, nn.Embedding | StructuredEmbedding)


def geometry_of_layer(module: nn.Module) -> Geometry | None:
    """The geometry of a convolution; None for a linear layer.

    Args:
        module: a dense or structured layer.

    Returns:
        The geometry without an input size, or None.
    """
    if isinstance(module, StructuredConvolution):
        return module.geometry
    return geometry_of(module) if isinstance(module, Convolution | TransposedConvolution) else None
