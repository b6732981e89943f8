"""Dense: the weight as it is, the reference point and the planner's way to leave a layer alone."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.structures.base import Geometry, Gram, Shape, Structure, StructuredMatrix, matrix_shape


@dataclass(frozen=True)
class Dense(Structure):
    """Every matrix; stored in full.

    Examples:
        >>> Dense().parameter_count((1000, 512))
        512000
    """

    source: ClassVar[str] = "the network itself"

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        yield cls()

    def parameter_count(self, shape: Shape) -> int:
        return math.prod(matrix_shape(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        return self.parameter_count(shape) * (1 if geometry is None else geometry.positions(shape[2:]))

    def chain(self, shape: Shape) -> Mapping[str, Shape]:
        return {"weight": tuple(shape)}

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "DenseMatrix":
        return DenseMatrix(self, weight.shape, weight.clone())

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "DenseMatrix":
        _, inputs = matrix_shape(shape)
        bound = math.sqrt(3 / inputs)  # uniform with variance 1 / inputs
        weight = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return DenseMatrix(self, shape, weight)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "DenseMatrix":
        checks.tensor_names(tensors.keys(), ["weight"], str(self))
        checks.shape("weight", tensors["weight"].shape, shape, "load the file that belongs to this model")
        return DenseMatrix(self, shape, tensors["weight"])


class DenseMatrix(StructuredMatrix):
    """A member of `Dense`: stores `weight` in its own shape."""

    def __init__(self, structure: Dense, shape: Shape, weight: Tensor) -> None:
        super().__init__(structure, shape)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return F.linear(x, self.weight.flatten(1))

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return F.linear(x, self.weight.flatten(1), bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        return geometry.convolve(x, self.weight, bias)

    def to_dense(self) -> Tensor:
        return self.weight

    def rows(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight.flatten(1))

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return self.weight.numel() * (1 if geometry is None else geometry.positions(self.shape[2:]))
