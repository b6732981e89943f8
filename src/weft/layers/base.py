"""What all layers share: a structured matrix with a bias, and a dense weight for code that looks at it."""

from abc import ABC

import torch
from torch import Tensor, nn

from weft import checks
from weft.structures.base import StructuredMatrix


class DenseView(Tensor):
    """A layer's dense weight, formed for code that looks at it.

    Being a subclass of `Tensor` it keeps fused paths (that of `nn.TransformerEncoderLayer`) from computing with the
    rebuilt weight behind the layer's back: they step aside for tensors that override functions.
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
        """The dense weight in its own shape, formed anew at every access; weft's own forward never asks for it."""
        return self.matrix.to_dense().detach().as_subclass(DenseView)

    def relax(self) -> None:
        """Makes the matrix trainable in place; see `StructuredMatrix.relax`."""
        self.matrix = self.matrix.relax().train(self.training)

    def harden(self) -> None:
        """Undoes `relax` in place."""
        with torch.no_grad():
            self.matrix = self.matrix.harden().train(self.training)
