"""What all layers share: a structured matrix with a bias, and a dense weight for code that looks at it."""

from abc import ABC
from collections.abc import Callable

import torch
from torch import Tensor, nn

from weft import checks
from weft.structures.base import StructuredMatrix


class DenseView(Tensor):
    """A layer's dense weight, formed for code that looks at it.

    Being a subclass of `Tensor` it keeps fused paths (that of `nn.TransformerEncoderLayer`) from computing
    with the rebuilt weight behind the layer's back: they step aside for tensors that override functions.
    """


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
        """The dense weight in its own shape, formed at every access; weft's own forward never asks for it."""
        return self.matrix.to_dense().detach().as_subclass(DenseView)


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
