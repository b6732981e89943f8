"""Separable filters: a kernel of S×S as r kernels of S×1 and then r of 1×S over all channels.

    Ŵ[f, c, i, j] = Σ_r left[f, r, j] right[r, c, i]

This is low rank of the kernel's unfolding with rows (f, j) and columns (c, i). The first convolution runs
along the kernel's first axis and takes that axis' stride, so that the second one meets fewer positions.
Without Grams the truncated SVD of the unfolding is optimal; in the metric of the patches `left` has a closed
form for every `right`, which is refined by variable projection.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.low_rank import low_rank_apply
from weft.numerics.gram import BlockDiagonalGram
from weft.numerics.nearest_low_rank import balance, errors_by_rank, leading_gram, nearest_of_rank
from weft.numerics.svd import truncated_svd
from weft.numerics.variable_projection import fit_chain
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
    pointwise,
    relative_error,
)

# Evaluations of a weighted refinement within an error curve; the fit itself takes more.
_CURVE_EVALUATIONS = 12


@dataclass(frozen=True)
class Separable(Structure):
    """Kernels of a given rank between their first axis and the others.

    On a linear layer, a 1×1 convolution and a convolution with one axis this is low rank.

    Args:
        rank: the number of hidden channels.

    Raises:
        TypeError: the rank is no whole number.
        ValueError: the rank is below 1.

    Examples:
        >>> Separable(rank=10).parameter_count((64, 32, 3, 3))
        2880
    """

    source: ClassVar[str] = "Jaderberg et al. 2014, scheme 2; Idelbayev and Carreira-Perpiñán 2020, scheme 2"

    rank: int

    def __post_init__(self) -> None:
        checks.integer_between("rank", self.rank, 1, None)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        yield from (cls(rank) for rank in ladder(1, _break_even(shape)))

    def parameter_count(self, shape: Shape) -> int:
        return self.rank * sum(_sides(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        return _multiply_adds(self.rank, shape, geometry)

    def check(self, shape: Shape) -> None:
        checks.integer_between("rank", self.rank, 1, min(_sides(shape)), of=f"a {tuple(shape)} weight")

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "SeparableMatrix":
        return self._fitted(weight, input_gram, output_gram)

    def _fitted(
        self,
        weight: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        evaluations: int | None = None,
    ) -> "SeparableMatrix":
        shape, matrix = tuple(weight.shape), weight.flatten(1)
        outputs = shape[0]
        rows, columns = _sides(shape)
        across = rows // outputs  # kernel positions of the second convolution
        if across == 1:
            left, right = nearest_of_rank(matrix, self.rank, input_gram=input_gram, output_gram=output_gram)
        elif input_gram is None and output_gram is None:
            left, right = balance(*truncated_svd(_unfolded(matrix, across), self.rank))
        else:

            def starts(dense: Tensor, gram: Gram | None) -> list[Tensor]:
                own = None if gram is None else leading_gram(gram, columns)
                # The coloured weight's rows are mixed already: its own rows here have no metric left.
                return [nearest_of_rank(_unfolded(dense, across), self.rank, input_gram=own)[1]]

            def basis(factors: Sequence[Tensor]) -> Tensor:
                eye = torch.eye(across, dtype=factors[0].dtype)
                spread = torch.einsum("rc,jk->rjck", factors[0], eye)
                return spread.reshape(self.rank * across, -1)

            chain, factors = fit_chain(
                matrix, basis, starts, input_gram=input_gram, output_gram=output_gram, evaluations=evaluations
            )
            left = chain.reshape(outputs, self.rank, across).mT.reshape(rows, self.rank)
            left, right = balance(left, factors[0])
        left = left.reshape(outputs, across, self.rank).mT.reshape(outputs, self.rank, *shape[3:])
        right = right.reshape(self.rank, *shape[1:3])
        return SeparableMatrix(self, shape, left.to(weight.dtype), right.to(weight.dtype))

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "SeparableMatrix":
        self.check(shape)
        rows, columns = _sides(shape)
        left = torch.randn(shape[0], self.rank, *shape[3:], dtype=dtype, generator=generator)
        right = torch.randn(self.rank, *shape[1:3], dtype=dtype, generator=generator)
        scale = math.sqrt(self.rank * rows / shape[0])
        return SeparableMatrix(self, shape, left / scale, right / math.sqrt(columns))

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "SeparableMatrix":
        self.check(shape)
        checks.tensor_names(tensors.keys(), ["left", "right"], str(self))
        remedy = "load the file that belongs to this model"
        checks.shape("left", tensors["left"].shape, (shape[0], self.rank, *shape[3:]), remedy)
        checks.shape("right", tensors["right"].shape, (self.rank, *shape[1:3]), remedy)
        return SeparableMatrix(self, shape, tensors["left"], tensors["right"])

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
        """Every rank from one SVD where that is the fit; else a ladder of ranks with short refinements."""
        checks.weight(weight)
        shape = tuple(weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dense = weight.detach().to(dtype)
        across = _sides(shape)[0] // shape[0]
        plain = input_gram is None and output_gram is None
        curve = []
        if plain or (across == 1 and not isinstance(input_gram, BlockDiagonalGram)):
            errors = errors_by_rank(_unfolded(dense.flatten(1), across), input_gram, output_gram).tolist()
            for rank in range(1, _break_even(shape) + 1):
                structure = cls(rank)
                curve.append(structure.point(weight, errors[rank - 1], geometry))
            return curve
        for structure in cls.candidates(shape):
            member = structure._fitted(dense, input_gram, output_gram, _CURVE_EVALUATIONS)
            error = relative_error(weight, member.to_dense(), input_gram=input_gram, output_gram=output_gram)
            curve.append(structure.point(weight, error, geometry))
        return curve


def _sides(shape: Shape) -> tuple[int, int]:
    """Rows and columns of the unfolding: outputs and later axes, channels and the first axis."""
    matrix_shape(shape)
    return shape[0] * math.prod(shape[3:]), math.prod(shape[1:3])


def _unfolded(matrix: Tensor, across: int) -> Tensor:
    """(f, (c, i, j)) -> ((f, j), (c, i))."""
    outputs, inputs = matrix.shape
    return matrix.reshape(outputs, inputs // across, across).mT.reshape(outputs * across, -1)


def _break_even(shape: Shape) -> int:
    """The largest rank that stores fewer numbers than the dense weight, at least 1."""
    rows, columns = _sides(shape)
    return max(1, (rows * columns - 1) // (rows + columns))


def _steps(shape: Shape) -> tuple[range, range]:
    """The kernel axes of the first and of the second convolution."""
    space = len(shape) - 2
    return range(min(1, space)), range(1, space)


def _multiply_adds(rank: int, shape: Shape, geometry: Geometry | None) -> int:
    rows, columns = _sides(shape)
    if geometry is None:
        return rank * (columns * (rows // shape[0]) + rows)
    kernel = shape[2:]
    first, second = geometry.along(kernel, *_steps(shape))
    before = first.positions((kernel[0], *(1,) * (len(kernel) - 1)))
    if len(kernel) == 1:
        after = geometry.output_positions(kernel)
    else:
        after = second.positions((1, *kernel[1:]))
    return rank * (geometry.groups * columns * before + rows * after)


class SeparableMatrix(StructuredMatrix):
    """A member of `Separable`: `left` (outputs, rank, *later axes), `right` (rank, channels, first axis)."""

    def __init__(self, structure: Separable, shape: Sequence[int], left: Tensor, right: Tensor) -> None:
        super().__init__(structure, shape)
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        left, right = self.left.flatten(1), self.right.flatten(1)
        if left.shape[1] == right.shape[0]:  # no later axes
            return low_rank_apply(x, left, right, bias)
        patches = x.reshape(*x.shape[:-1], right.shape[1], self.inputs // right.shape[1])
        return nn.functional.linear(torch.matmul(right, patches).flatten(-2), left, bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups, space = geometry.groups, len(self.shape) - 2
        first, second = geometry.along(self.shape[2:], *_steps(self.shape))
        hidden = channels_last(x if groups == 1 else x.reshape(x.shape[0] * groups, -1, *x.shape[2:]))
        right = self.right.reshape(*self.right.shape, *(1,) * (space - 1))
        hidden = first.convolve(hidden, right, groups=1)
        hidden = hidden if groups == 1 else hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
        if space == 1:
            return pointwise(hidden, self.left, bias, groups)
        return second.convolve(hidden, self.left.unsqueeze(2), bias)

    def to_dense(self) -> Tensor:
        later = self.left.flatten(2) if self.left.ndim > 2 else self.left.unsqueeze(2)
        dense = torch.einsum("frj,rk->fkj", later, self.right.flatten(1))
        return dense.reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        chosen = self.left[indices].reshape(*indices.shape, self.left.shape[1], -1)
        return torch.matmul(self.right.flatten(1).mT, chosen).flatten(-2)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return _multiply_adds(self.left.shape[1], self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        return [Rectangle(0, 0, self.outputs, self.inputs, "low_rank", str(self.left.shape[1]))]
