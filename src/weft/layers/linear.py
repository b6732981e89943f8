"""A linear layer with a structured weight."""

from typing import Any

import torch
from torch import Tensor

from weft.kernels import dispatch
from weft.layers.base import StructuredLayer
from weft.structures.base import StructuredMatrix

# The whole product without a frame of Python's, where the matrix can be applied so. Bound once, as looking
# names up costs more than calling them.
_apply_layer = None if dispatch.native is None else dispatch.native.apply_layer
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class StructuredLinear(StructuredLayer):
    """Stands where an `nn.Linear` stood: y = x Wᵀ + b, (*batch, inputs) -> (*batch, outputs).

    Args:
        matrix: the weight, shape (outputs, inputs).
        bias: shape (outputs,), or None.

    Examples:
        >>> import torch
        >>> from weft.structures.low_rank import LowRank
        >>> layer = StructuredLinear(LowRank(rank=2).fit(torch.randn(6, 4)), torch.zeros(6))
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(self, matrix: StructuredMatrix, bias: Tensor | None = None) -> None:
        super().__init__(matrix, bias)
        self.in_features = matrix.inputs
        self.out_features = matrix.outputs

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name, used as a keyword by callers)
        if _apply_layer is not None and not _is_dynamo_compiling():
            y = _apply_layer(self, input)
            if y is not None:
                return y
        # Looked up where nn.Module keeps them: its own way there costs as much as a small product. What a
        # parametrisation replaced is found that way.
        parameters = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias
        matrix: Any = self._modules["matrix"]
        return matrix.affine(input, bias)
