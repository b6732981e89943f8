"""Products of sparse matrices: Ŵ = S₁ S₂ … S_Q with few entries in every row and column of each factor.

The support is stored once, as indices in the smallest integer type, and only values train. A row's entries
lie together, so that applying a factor to a batch, held with one row per coordinate, gathers and adds whole
rows: the cost is that of the entries, and no dense weight is ever formed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypedDict, cast

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.sparse import SparseChain, apply_factor, sparse_chain_apply
from weft.numerics.factor_target import product_of
from weft.numerics.gram import DiagonalGram, squared_error
from weft.numerics.palm4msa import Metric, SparseFactorisation, hierarchical, palm4msa, refit, splitting
from weft.structures.base import (
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    ladder,
    matrix_multiply_adds,
    matrix_shape,
)

# Weights of at most so many entries are refitted once more, which costs nothing there.
_ALWAYS_REFITTED = 1 << 14
ALGORITHMS = ("palm4msa", "splitting", "hierarchical", "random")


@dataclass(frozen=True)
class SparseProduct(Structure):
    """Products of Q sparse factors of shapes (D, d), (d, d), …, (d, D') with d = min(D, D').

    Every factor keeps what is among the K largest of its row or of its column: at least K entries in each row
    and column, between K and 2K on average. One factor is pruning with that pattern. A convolution's kernel
    (outputs, channels, *kernel) is taken as the matrix (outputs, channels · kernel).

    Algorithms:
        "palm4msa": PALM4MSA as published, then a least-squares refit of the values on the supports. In a
            weighted norm the published step, the inverse of a Lipschitz constant that contains ‖Ĝ‖, is too
            short to move: there the fit is that of "splitting".
        "splitting": a support search by alternating directions, then projected steps with refits; far lower
            errors than PALM4MSA's at the same cost, and the planner's choice.
        "hierarchical": one factor split off after the other, then as many projected steps as pay. It finds
            exact products of many factors, such as butterflies.
        "random": a random support with K entries in every row and column and values fitted on it.

    Args:
        factors: Q, at least 1.
        sparsity: K, from 1 to the smaller side of the weight.
        algorithm: how the support is found.

    Raises:
        TypeError: a count is no whole number.
        ValueError: a count is below 1 or the algorithm unknown.

    Examples:
        >>> SparseProduct(factors=2, sparsity=14, algorithm="random").parameter_count((1000, 512))
        21168
    """

    source: ClassVar[str] = "Le Magoarou and Gribonval 2016, Figs. 4 and 5; Giffon et al. 2021"

    factors: int
    sparsity: int
    algorithm: str = "palm4msa"

    def __post_init__(self) -> None:
        checks.integer_between("factors", self.factors, 1, None)
        checks.integer_between("sparsity", self.sparsity, 1, None)
        checks.one_of("algorithm", self.algorithm, ALGORITHMS)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, inputs = matrix_shape(shape)
        # Two factors of K entries per row and column hold at least K(D + D') numbers.
        break_even = max(1, (outputs * inputs - 1) // (outputs + inputs))
        yield from (cls(2, sparsity, "splitting") for sparsity in ladder(1, break_even, ratio=1.5))

    def factor_shapes(self, shape: Shape) -> list[tuple[int, int]]:
        """The shapes of the factors, from left to right.

        Args:
            shape: the weight's shape.

        Returns:
            (rows, columns) of each factor.
        """
        outputs, inputs = matrix_shape(shape)
        sizes = [outputs, *[min(outputs, inputs)] * (self.factors - 1), inputs]
        return list(zip(sizes, sizes[1:], strict=False))

    def parameter_count(self, shape: Shape) -> int | None:
        if self.algorithm != "random":
            return None
        return sum(self.sparsity * max(size) for size in self.factor_shapes(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        entries = self.parameter_count(shape)
        return None if entries is None else matrix_multiply_adds(entries, shape, geometry)

    def resized(self, factor: float, shape: Shape) -> "SparseProduct":
        return replace(self, sparsity=max(1, min(round(self.sparsity * factor), *matrix_shape(shape))))

    def check(self, shape: Shape) -> None:
        smaller = min(matrix_shape(shape))
        checks.integer_between("sparsity", self.sparsity, 1, smaller, of=f"a {tuple(shape)} weight")

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "SparseProductMatrix":
        matrix = weight.flatten(1)
        given = start.factorisation() if isinstance(start, SparseProductMatrix) else None
        if given is None or len(given.factors) != self.factors:
            given = None
            if self.algorithm == "random":
                drawn = self.initialise(weight.shape, dtype=weight.dtype, generator=generator)
                given = drawn.factorisation()
        # The support is searched in single precision, so that it does not depend on the weight's dtype.
        single = matrix.to(torch.float32)
        fits = [self._factor(single, given, None, None)]
        metrics: _Metrics = {"input_metric": _metric(input_gram), "output_metric": _metric(output_gram)}
        if input_gram is not None or output_gram is not None:
            fits.append(self._factor(single, given, **metrics))
            # The plain fit's supports, refitted, are now and then the better ones in the weighted norm.
            fits.append(refit(single, fits[0], **metrics))
        if matrix.dtype == torch.float64 or matrix.numel() <= _ALWAYS_REFITTED:
            fits += [refit(matrix, fit, **metrics) for fit in fits]
        errors = [
            float(squared_error(matrix - fit.to_dense().to(matrix), input_gram, output_gram)) for fit in fits
        ]
        best = fits[min(range(len(fits)), key=errors.__getitem__)]
        factors = [factor.to(matrix) for factor in best.balanced()]
        return SparseProductMatrix(self, weight.shape, **_tensors(factors, self.factor_shapes(weight.shape)))

    def _factor(
        self, matrix: Tensor, start: SparseFactorisation | None, input_metric: Metric, output_metric: Metric
    ) -> SparseFactorisation:
        """The factorisation in one norm, from a start if there is one."""
        metrics: _Metrics = {"input_metric": input_metric, "output_metric": output_metric}
        weighted = input_metric is not None or output_metric is not None
        if start is None and self.algorithm == "hierarchical":
            start = hierarchical(matrix, self.sparsity, self.factors)
        if start is not None and self.algorithm == "random":
            return refit(matrix, start, **metrics)
        if start is None and self.algorithm == "palm4msa" and not weighted:
            return refit(matrix, palm4msa(matrix, self.sparsity, self.factors))
        return splitting(matrix, self.sparsity, self.factors, start=start, **metrics)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "SparseProductMatrix":
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        shapes = self.factor_shapes(shape)
        factors = [_random_support(size, self.sparsity, generator).to(dtype) for size in shapes]
        member = SparseProductMatrix(self, shape, **_tensors(factors, shapes))
        return member.reinitialise(generator=generator)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "SparseProductMatrix":
        self.check(shape)
        checks.tensor_names(tensors.keys(), ["values", "columns", "counts"], str(self))
        shapes = self.factor_shapes(shape)
        remedy = "load the file that belongs to this model"
        longest = max(columns for _, columns in shapes)
        counts, columns, values = tensors["counts"], tensors["columns"], tensors["values"]
        checks.shape("counts", counts.shape, (sum(rows for rows, _ in shapes), _width(longest)), remedy)
        checks.shape("columns", columns.shape, (int(_widen(counts).sum()), _width(longest - 1)), remedy)
        checks.shape("values", values.shape, columns.shape[:1], remedy)
        return SparseProductMatrix(self, shape, values, columns, counts)


class _Metrics(TypedDict):
    input_metric: Metric
    output_metric: Metric


def _metric(gram: Gram | None) -> Metric:
    """The metric that the algorithms take: the same for every row."""
    if gram is None:
        return None
    return gram.diagonal() if isinstance(gram, DiagonalGram) else gram.dense()


# ----------------------------------------------------------------------------------------------------
# Supports


def _width(bound: int) -> int:
    """Bytes of the smallest integer type that holds the numbers from 0 to `bound`."""
    return 1 if bound < 1 << 8 else 2 if bound < 1 << 16 else 4


def _narrow(indices: Tensor, width: int) -> Tensor:
    """Whole numbers as bytes, least significant first: (n,) -> (n, width) of uint8."""
    return torch.stack([(indices >> (8 * place)) & 0xFF for place in range(width)], dim=1).to(torch.uint8)


def _widen(packed: Tensor) -> Tensor:
    """Undoes `_narrow`: (n, width) of uint8 -> (n,) of int64."""
    places = 256 ** torch.arange(packed.shape[1], device=packed.device)
    return (packed.to(torch.int64) * places).sum(1)


def _random_support(size: tuple[int, int], sparsity: int, generator: torch.Generator) -> Tensor:
    """A 0-1 matrix, a permuted sum of cyclic diagonals: K per line of the longer side, at least K across."""
    short, long = min(size), max(size)
    shifts = torch.randperm(short, generator=generator)[:sparsity]
    across = (torch.arange(long)[:, None] + shifts) % short
    across = torch.randperm(short, generator=generator)[across]
    support = torch.zeros(long, short).scatter_(1, across, 1.0)[torch.randperm(long, generator=generator)]
    return support if size[0] == long else support.T


def _tensors(factors: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The stored tensors of dense factors with explicit zeros, one factor's rows after the other's."""
    longest = max(columns for _, columns in shapes)
    values, columns, counts = [], [], []
    for factor in factors:
        # A factor of zeros, as a zero weight gives it, keeps a diagonal to train on.
        pattern = factor != 0 if bool(factor.any()) else torch.ones_like(factor).tril().triu()
        row, column = pattern.nonzero(as_tuple=True)
        values.append(factor[row, column])
        columns.append(column)
        counts.append(torch.bincount(row, minlength=len(factor)))
    return {
        "values": torch.cat(values),
        "columns": _narrow(torch.cat(columns), _width(longest - 1)),
        "counts": _narrow(torch.cat(counts), _width(longest)),
    }


# ----------------------------------------------------------------------------------------------------
# The member


class SparseProductMatrix(StructuredMatrix):
    """A member of `SparseProduct`.

    Stores `values` of all entries, factor after factor and row after row, with the bytes of their `columns`
    and of the `counts` of entries in every row.
    """

    columns: Tensor
    counts: Tensor

    def __init__(
        self, structure: SparseProduct, shape: Shape, values: Tensor, columns: Tensor, counts: Tensor
    ) -> None:
        super().__init__(structure, shape)
        self.values = nn.Parameter(values.contiguous())
        self.register_buffer("columns", columns.contiguous())
        self.register_buffer("counts", counts.contiguous())
        self.sizes = structure.factor_shapes(shape)
        # Unpacks the indices once, into buffers that are not stored.
        self.chain = SparseChain(self.sizes, _widen(self.counts), _widen(self.columns))
        self.entries = self.chain.entries
        self.longest_row = int(_widen(self.counts[: self.sizes[0][0]]).max())

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        (values,) = self.in_place(("values",))
        chain: Any = self._modules["chain"]  # found like the values, without nn.Module's search
        return sparse_chain_apply(x, values, chain, bias)

    def dense_factors(self) -> list[Tensor]:
        """The factors as dense matrices, from left to right; differentiable."""
        factors = []
        for index, part in enumerate(self.values.split(self.entries)):
            (rows, columns), support = self.sizes[index], self.chain.support(index)
            place = support.rows.to(torch.int64) * columns + support.columns
            factors.append(part.new_zeros(rows * columns).scatter(0, place, part).reshape(rows, columns))
        return factors

    def to_dense(self) -> Tensor:
        return product_of(self.dense_factors()).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        chosen = indices.reshape(-1)
        support = self.chain.support(0)
        counts = _widen(self.counts[: self.sizes[0][0]])[chosen]
        # Rows are padded to the longest: a mask instead of lengths keeps the shapes static.
        offset = torch.arange(self.longest_row, device=chosen.device)
        place = (support.starts[chosen][:, None] + offset).clamp_max(self.entries[0] - 1).to(torch.int64)
        values = self.values.split(self.entries)
        first = torch.where(offset < counts[:, None], values[0][place], 0)
        columns = support.columns[place].to(torch.int64)
        picked = first.new_zeros(len(chosen), self.sizes[0][1]).scatter_add(1, columns, first).T
        for index in range(1, len(self.sizes)):
            support = self.chain.support(index)
            picked = apply_factor(values[index][support.order], picked, support.transposed())
        return picked.T.reshape(*indices.shape, self.inputs)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(self.values.numel(), self.shape, geometry)

    def factorisation(self) -> SparseFactorisation:
        """The member as the algorithms know it: normalised factors and a scale."""
        factors = [factor.detach() for factor in self.dense_factors()]
        norms = [float(factor.norm()) for factor in factors]
        normalised = tuple(factor / (norm or 1.0) for factor, norm in zip(factors, norms, strict=True))
        return SparseFactorisation(math.prod(norms), normalised, math.nan)

    def reinitialise(self, *, generator: torch.Generator | None = None) -> "SparseProductMatrix":
        """A member with the same supports and random values, to train a found pattern from scratch.

        The factor that meets the input is drawn after He, the others after Xavier, both with the number of
        connections that an entry's row and column have in place of the matrix's width and height.

        Args:
            generator: the source of randomness; a fixed seed where None.

        Returns:
            A new member.
        """
        generator = generator or torch.Generator().manual_seed(0)
        deviations = []
        for index, size in enumerate(self.sizes):
            support = self.chain.support(index)
            fan_in = torch.bincount(support.rows, minlength=size[0])[support.rows]
            fan_out = torch.bincount(support.columns, minlength=size[1])[support.columns]
            first = index == len(self.sizes) - 1
            deviations.append((2 / fan_in if first else 2 / (fan_in + fan_out)).sqrt())
        noise = torch.randn(self.values.shape, generator=generator, dtype=torch.float64)
        values = (noise.to(self.values.device) * torch.cat(deviations)).to(self.values.dtype)
        structure = cast(SparseProduct, self.structure)
        return SparseProductMatrix(structure, self.shape, values, self.columns.clone(), self.counts.clone())

    def picture(self) -> list[Rectangle]:
        return [
            Rectangle(0, 0, *size, "sparse", f"{entries / size[0]:.1f} per row", index)
            for index, (size, entries) in enumerate(zip(self.sizes, self.entries, strict=True))
        ]
