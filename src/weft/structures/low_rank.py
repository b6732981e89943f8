"""Low rank: Ŵ = L R with r columns in L, the classical compression of a layer.

With Grams the fit has a closed form (generalised Eckart-Young): with roots Ĝ = S Sᵀ and H = T Tᵀ the nearest
matrix of rank r in ‖Tᵀ(W − Ŵ)S‖_F is Ŵ = T⁻ᵀ U_r U_rᵀ Tᵀ W, where U_r are the leading left singular vectors
of Tᵀ W S. S is never inverted, so a singular input Gram needs no care.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.kernels.low_rank import low_rank_apply
from weft.numerics.aca import adaptive_cross_approximation
from weft.numerics.gram import BlockDiagonalGram, squared_error
from weft.numerics.rank_revealing_qr import rank_revealing_qr
from weft.numerics.svd import randomized_svd, truncated_svd
from weft.structures.base import (
    CONVOLUTIONS,
    Candidate,
    Cost,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    ladder,
    matrix_shape,
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
        matrix = weight.flatten(1)
        groups = isinstance(input_gram, BlockDiagonalGram)
        closed_form = self.method == "svd" and not groups
        # Without a closed form the plain fit may happen to be the better one in the weighted norm.
        metrics = [(input_gram, output_gram)]
        if not closed_form and (input_gram is not None or output_gram is not None):
            metrics.append((None, None))
        fits = []
        for column_metric, row_metric in metrics:
            mean = None if column_metric is None else column_metric.average()
            left, right = self._project(matrix, mean, row_metric, generator)
            if groups and output_gram is None:
                left = _solve_left_by_group(matrix, right, input_gram)
            fits.append((left, right))
        if len(fits) > 1:
            fits.sort(key=lambda fit: float(squared_error(matrix - fit[0] @ fit[1], input_gram, output_gram)))
        left, right = _balance(*fits[0])
        return LowRankMatrix(self, weight.shape, left, right.reshape(self.rank, *weight.shape[1:]))

    def _project(
        self,
        matrix: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """L = T⁻ᵀ U_r and R = U_rᵀ Tᵀ W."""
        coloured = matrix if output_gram is None else output_gram.whiten(matrix.T).T  # Tᵀ W
        basis = self._basis(coloured if input_gram is None else input_gram.whiten(coloured), generator)
        left = basis if output_gram is None else output_gram.unwhiten(basis.T).T
        return left, basis.T @ coloured

    def _basis(self, matrix: Tensor, generator: torch.Generator | None) -> Tensor:
        """An orthonormal basis of `rank` columns near the leading left singular vectors."""
        match self.method:
            case "svd":
                left, _ = truncated_svd(matrix, self.rank)
            case "randomized":
                left, _ = randomized_svd(
                    matrix, self.rank, generator=generator or torch.Generator().manual_seed(0)
                )
            case "rrqr":
                left, _ = rank_revealing_qr(matrix, self.rank)
            case _:
                left, _ = adaptive_cross_approximation(matrix, self.rank)
        # Householder's Q is orthonormal whatever the columns: zeros stand in where the matrix had no more to
        # give.
        return torch.linalg.qr(F.pad(left, (0, self.rank - left.shape[1]))).Q

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
        """Every rank from one SVD: the squared error of rank r is Σ σ_k² over k > r."""
        if isinstance(input_gram, BlockDiagonalGram):
            return super().error_curve(
                weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry, inner=inner
            )
        checks.weight(weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = weight.detach().to(dtype).flatten(1)
        if output_gram is not None:
            matrix = output_gram.whiten(matrix.T).T
        if input_gram is not None:
            matrix = input_gram.whiten(matrix)
        energy = torch.linalg.svdvals(matrix.to(torch.float64)).square()
        beyond = energy.flip(0).cumsum(0).flip(0)
        errors = (torch.cat([beyond[1:], beyond.new_zeros(1)]) / beyond[0].clamp_min(1e-300)).sqrt().tolist()
        shape = tuple(weight.shape)
        curve = []
        for rank in range(1, _break_even(shape) + 1):
            structure = cls(rank)
            parameters = structure.parameter_count(shape)
            cost = Cost(
                parameters, parameters * weight.element_size(), structure.multiply_adds(shape, geometry)
            )
            curve.append(Candidate(structure, cost, errors[rank - 1]))
        return curve


def _break_even(shape: Shape) -> int:
    """The largest rank that stores fewer numbers than the dense weight, at least 1."""
    outputs, inputs = matrix_shape(shape)
    return max(1, (outputs * inputs - 1) // (outputs + inputs))


def _solve_left_by_group(matrix: Tensor, right: Tensor, gram: BlockDiagonalGram) -> Tensor:
    """The best L for a given R, each group of rows in its own metric: L_i = W_i Ĝ_i Rᵀ (R Ĝ_i Rᵀ)⁻¹."""
    metric = gram.matmul(right.repeat(gram.groups, 1)).reshape(gram.groups, *right.shape)  # R Ĝ_i
    target = matrix.reshape(gram.groups, -1, matrix.shape[1]) @ metric.mT
    solution = torch.linalg.lstsq(metric @ right.T, target.mT, driver="gelsd").solution
    return solution.mT.reshape(len(matrix), -1)


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scales every column of L and row of R to the same norm, which trains and quantises best."""
    column, row = left.norm(dim=0), right.norm(dim=1)
    tiny = torch.finfo(left.dtype).tiny
    scale = torch.where((column > tiny) & (row > tiny), (row / column.clamp_min(tiny)).sqrt(), 1.0)
    return left * scale, right / scale[:, None]


class LowRankMatrix(StructuredMatrix):
    """A member of `LowRank`: `left` (outputs, rank), `right` (rank, inputs) or (rank, channels, *kernel)."""

    def __init__(self, structure: LowRank, shape: Shape, left: Tensor, right: Tensor) -> None:
        super().__init__(structure, shape)
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        return low_rank_apply(x, self.left, self.right.flatten(1), bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups, space = geometry.groups, len(self.shape) - 2
        folded = x.reshape(x.shape[0] * groups, -1, *x.shape[2:])  # groups share R: they join the batch
        hidden = geometry.convolve(folded, self.right, groups=1)
        hidden = hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
        left = self.left.reshape(*self.left.shape, *(1,) * space)
        return CONVOLUTIONS[space](hidden, left, bias, groups=groups)

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
