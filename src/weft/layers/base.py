"""What all layers share: a structured matrix with a bias, and a dense weight for code that looks at it."""

import itertools
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from weft import checks
from weft.structures.base import StructuredMatrix


class DenseView(Tensor):
    """A layer's dense weight for code that looks at it, formed only when something is computed with it.

    Being a subclass of `Tensor` it keeps fused paths (that of `nn.TransformerEncoderLayer`, which reads the
    weight at every call) from computing with the rebuilt weight behind the layer's back: they step aside for
    tensors that override functions. Shape, dtype and device cost nothing; results are plain tensors.

    Args:
        layer: the layer whose weight it is.
    """

    def __new__(cls, layer: "StructuredLayer") -> "DenseView":
        matrix = layer.matrix
        stored = itertools.chain(matrix.parameters(), matrix.buffers())
        like = next((tensor for tensor in stored if tensor.is_floating_point()), torch.empty(0))
        return cls._make_wrapper_subclass(cls, layer.weight_shape, dtype=like.dtype, device=like.device)

    def __init__(self, layer: "StructuredLayer") -> None:
        self.layer = layer

    # Without it torch would take the class for one that overrides nothing, and fused paths would not step
    # aside.
    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def form(view: DenseView) -> Tensor:
            return view.layer.form_weight().detach()

        return func(*tree_map_only(cls, form, args), **tree_map_only(cls, form, kwargs or {}))


class FormedDenseView(Tensor):
    """The dense weight while a compiler traces, which drops it where nothing computes with it."""


class StructuredLayer(nn.Module, ABC):
    """A layer whose weight is a structured matrix.

    Args:
        matrix: the weight.
        bias: shape (outputs,), or None.

    Raises:
        ValueError: the bias does not have one number per output.

    Attributes:
        matrix: the weight; layers with tied weights hold the same one.
        bias: the bias, or None.
    """

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None:
            remedy = "pass the dense layer's own bias"
            checks.shape("bias", bias.shape, (matrix.outputs,), remedy)
        self.matrix = matrix
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight in its own shape, formed when it is used; weft's own forward never asks for it."""
        if torch.compiler.is_dynamo_compiling():
            return self.form_weight().detach().as_subclass(FormedDenseView)
        return DenseView(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the dense layer's weight had; here that of the matrix."""
        return self.matrix.shape

    def form_weight(self) -> Tensor:
        """The dense weight as the dense layer had it."""
        return self.matrix.to_dense()


def relax(model: nn.Module) -> None:
    """Makes every structured matrix of a network trainable, in place; see `StructuredMatrix.relax`.

    Args:
        model: the network; layers that share a matrix share its stand-in.
    """
    _exchange(model, lambda matrix: matrix.relax())


def harden(model: nn.Module) -> None:
    """Undoes `relax`.

    Args:
        model: the network, changed in place.
    """
    with torch.no_grad():
        _exchange(model, lambda matrix: matrix.harden())


def _exchange(model: nn.Module, step: Callable[[StructuredMatrix], StructuredMatrix]) -> None:
    layers = [module for module in model.modules() if isinstance(module, StructuredLayer)]
    modes = {layer.matrix: layer.matrix.training for layer in layers}
    made = {matrix: step(matrix).train(mode) for matrix, mode in modes.items()}
    for layer in layers:
        layer.matrix = made[layer.matrix]
