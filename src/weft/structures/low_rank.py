"""Low rank: Ŵ = L R with r columns in L, the classical compression of a layer.

With Grams the fit has a closed form, the generalised Eckart-Young theorem: see
`numerics/nearest_low_rank.py`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.low_rank import low_rank_apply
from weft.numerics.aca import adaptive_cross_approximation
from weft.numerics.gram import BlockDiagonalGram
from weft.numerics.nearest_low_rank import nearest_of_rank
from weft.numerics.rank_revealing_qr import rank_revealing_qr
from weft.numerics.svd import randomized_svd, truncated_svd
from weft.structures.base import (
    Candidate,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    channels_last,
    ladder,
    matrix_shape,
    points_by_rank,
    pointwise,
)

METHODS = ("svd", "randomized", "rrqr", "aca")


@dataclass(frozen=True)
class LowRank(Structure):
    """Matrices of a given rank, stored as two factors; a convolution becomes two.

    A convolution's kernel (outputs, channels, *kernel) is taken as the matrix (outputs, channels · kernel): a
    convolution to `rank` channels with the original kernel size, then a 1×1 convolution. All groups of a
    grouped convolution share the first one.

    Args:
        rank: number of columns of the left factor, from 1 to the smaller side.
        method: how the column space is found: "svd" (optimal), "randomized" (Halko et al. 2011), "rrqr"
            (column-pivoted QR), "aca" (adaptive cross approximation).

    Raises:
        TypeError: the rank is no whole number.
        ValueError: the rank is below 1 or the method unknown.

    Examples:
        >>> LowRank(rank=30).parameter_count((1000, 512))
        45360
    """

    source: ClassVar[str] = "Eckart and Young 1936; Denton et al. 2014, section 3.3.1"

    rank: int
    method: str = "svd"

    def __post_init__(self) -> None:
        checks.integer_between("rank", self.rank, 1, None)
        checks.one_of("method", self.method, METHODS)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        yield from (cls(rank) for rank in ladder(1, _break_even(shape)))

    def parameter_count(self, shape: Shape) -> int:
        return self.rank * sum(matrix_shape(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        outputs, inputs = matrix_shape(shape)
        if geometry is None:
            return self.rank * (inputs + outputs)
        first = geometry.groups * inputs * geometry.positions(shape[2:])
        return self.rank * (first + outputs * geometry.output_positions(shape[2:]))

    def chain(self, shape: Shape) -> Mapping[str, Shape]:
        return {"left": (shape[0], self.rank), "right": (self.rank, *shape[1:])}

    def resized(self, factor: float, shape: Shape) -> "LowRank":
        return replace(self, rank=max(1, min(round(self.rank * factor), *matrix_shape(shape))))

    def check(self, shape: Shape) -> None:
        checks.integer_between("rank", self.rank, 1, min(matrix_shape(shape)), of=f"a {tuple(shape)} weight")

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "LowRankMatrix":
        left, right = nearest_of_rank(
            weight.flatten(1),
            self.rank,
            input_gram=input_gram,
            output_gram=output_gram,
            method=self._method(generator),
        )
        return LowRankMatrix(self, weight.shape, left, right.reshape(self.rank, *weight.shape[1:]))

    def _method(self, generator: torch.Generator | None) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """What gives the column space."""
        match self.method:
            case "svd":
                return truncated_svd
            case "randomized":
                return partial(randomized_svd, generator=generator or torch.Generator().manual_seed(0))
            case "rrqr":
                return rank_revealing_qr
            case _:
                return adaptive_cross_approximation

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "LowRankMatrix":
        self.check(shape)
        outputs, inputs = matrix_shape(shape)
        left = torch.randn(outputs, self.rank, dtype=dtype, generator=generator) / math.sqrt(self.rank)
        right = torch.randn(self.rank, *shape[1:], dtype=dtype, generator=generator) / math.sqrt(inputs)
        return LowRankMatrix(self, shape, left, right)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "LowRankMatrix":
        self.check(shape)
        checks.tensor_names(tensors.keys(), ["left", "right"], str(self))
        remedy = "load the file that belongs to this model"
        checks.shape("left", tensors["left"].shape, (shape[0], self.rank), remedy)
        checks.shape("right", tensors["right"].shape, (self.rank, *shape[1:]), remedy)
        return LowRankMatrix(self, shape, tensors["left"], tensors["right"])

    @classmethod
    def error_curve(
        cls,
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
        inner: Iterable[Structure] = (),
    ) -> list[Candidate]:
        """All ranks from one SVD: the squared error of rank r is Σ σ_k² over k > r."""
        if isinstance(input_gram, BlockDiagonalGram):
            return super().error_curve(
                weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry, inner=inner
            )
        return points_by_rank(
            cls,
            _break_even(tuple(weight.shape)),
            weight,
            input_gram=input_gram,
            output_gram=output_gram,
            geometry=geometry,
        )


def _break_even(shape: Shape) -> int:
    """The largest rank that stores fewer numbers than the dense weight, at least 1."""
    outputs, inputs = matrix_shape(shape)
    return max(1, (outputs * inputs - 1) // (outputs + inputs))


class LowRankMatrix(StructuredMatrix):
    """A member of `LowRank`: `left` (outputs, rank), `right` (rank, inputs) or (rank, channels, *kernel)."""

    def __init__(self, structure: LowRank, shape: Shape, left: Tensor, right: Tensor) -> None:
        super().__init__(structure, shape)
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())
        self.native_call = ("low_rank_apply", "left", "right", "bias", "threads")

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        left, right = self.in_place(("left", "right"))
        return low_rank_apply(x, left, right if right.ndim == 2 else right.flatten(1), bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups = geometry.groups
        # Groups share R: they join the batch.
        folded = channels_last(x if groups == 1 else x.reshape(x.shape[0] * groups, -1, *x.shape[2:]))
        hidden = geometry.convolve(folded, self.right, groups=1)
        hidden = hidden if groups == 1 else hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
        return pointwise(hidden, self.left, bias, groups)

    def to_dense(self) -> Tensor:
        return torch.tensordot(self.left, self.right, dims=1)

    def rows(self, indices: Tensor) -> Tensor:
        return self.left[indices] @ self.right.flatten(1)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        if geometry is None:
            return self.left.numel() + self.right.numel()
        first = geometry.groups * self.right.numel() * geometry.positions(self.shape[2:])
        return first + self.left.numel() * geometry.output_positions(self.shape[2:])

    def picture(self) -> list[Rectangle]:
        rank = self.left.shape[1]
        return [Rectangle(0, 0, self.outputs, self.inputs, "low_rank", str(rank))]
