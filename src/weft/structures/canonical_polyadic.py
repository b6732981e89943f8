"""Canonical polyadic kernels: a sum of rank-one tensors, run as 1×1, depthwise along the axes, 1×1.

    Ŵ[f, c, i, j] = Σ_k left[f, k] right[k, c] axis_0[k, i] axis_1[k, j]

A flattened convolution, whose every filter is one such product along channels and axes, is the member of rank
`outputs` with the identity for `left`. Without Grams the fit is regularised alternating least squares from
several starts; in the metric of the patches `left` has a closed form for all other factors, which are refined
by variable projection.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.low_rank import low_rank_apply
from weft.numerics.alternating_least_squares import canonical_polyadic, rank_one_terms, unit_rows
from weft.numerics.gram import BlockDiagonalGram
from weft.numerics.nearest_low_rank import errors_by_rank, leading_gram, nearest_of_rank
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

# Evaluations of a weighted refinement and sweeps within an error curve; the fit itself takes more.
_CURVE_EVALUATIONS, _CURVE_SWEEPS = 40, 20
# A product of axis factors is one depthwise kernel up to this many times the factors' numbers: 3×3 is.
_MERGED = 2


@dataclass(frozen=True)
class CanonicalPolyadic(Structure):
    """Kernels that are sums of `rank` products of a vector per mode, for any number of kernel axes.

    On a linear layer and on a 1×1 convolution this is low rank. A kernel axis of length 1 has no factor.

    Args:
        rank: the number of terms; it may exceed the number of channels.

    Raises:
        TypeError: the rank is no whole number.
        ValueError: the rank is below 1.

    Examples:
        >>> CanonicalPolyadic(rank=10).parameter_count((64, 32, 3, 3))
        1020
    """

    source: ClassVar[str] = (
        "Denton et al. 2014; Lebedev et al. 2015; Jin et al. 2014 for flattened convolutions"
    )

    rank: int

    def __post_init__(self) -> None:
        checks.integer_between("rank", self.rank, 1, None)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        most = max(1, (math.prod(shape) - 1) // _per_term(shape))
        yield from (cls(rank) for rank in ladder(1, min(most, _most(shape))))

    def parameter_count(self, shape: Shape) -> int:
        return self.rank * _per_term(shape)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        return _multiply_adds(self.rank, shape, geometry)

    def check(self, shape: Shape) -> None:
        matrix_shape(shape)
        checks.integer_between("rank", self.rank, 1, _most(shape), of=f"a {tuple(shape)} weight")

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "CanonicalPolyadicMatrix":
        left, factors = self._factors(weight, input_gram, output_gram, generator=generator)
        return self._member(weight, left, factors)

    def _factors(
        self,
        weight: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        *,
        before: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The left factor, and one factor of shape (rank, size) for channels and every axis longer than 1.

        Args:
            weight: the kernel.
            input_gram: Ĝ.
            output_gram: H.
            before: the factors of a member with fewer terms to go on from; few steps then do.
            generator: the source of drawn starts.

        Returns:
            Left factor and the others.
        """
        shape, matrix = tuple(weight.shape), weight.flatten(1)
        sizes = [shape[1], *(shape[2 + axis] for axis in _long_axes(shape))]
        if len(sizes) == 1:
            left, right = nearest_of_rank(matrix, self.rank, input_gram=input_gram, output_gram=output_gram)
            return left, [right]

        def starts(dense: Tensor, gram: Gram | None) -> list[Tensor]:
            tensor = dense.reshape(shape[0], *sizes)
            channel_gram = None if gram is None else leading_gram(gram, sizes[0])
            own = None if before is None else list(before)
            if channel_gram is not None:
                tensor = channel_gram.whiten(tensor.movedim(1, -1)).movedim(-1, 1)
                if own is not None:
                    own[0] = channel_gram.whiten(own[0])
            if own is None:
                found, _ = canonical_polyadic(tensor, self.rank, generator=generator)
            else:
                found, _ = canonical_polyadic(tensor, self.rank, start=own, sweeps=_CURVE_SWEEPS)
            if channel_gram is not None:
                found[1] = channel_gram.unwhiten(found[1])
            return found[1:]

        def basis(factors: Sequence[Tensor]) -> Tensor:
            return rank_one_terms([unit_rows(factor) for factor in factors])

        evaluations = None if before is None else _CURVE_EVALUATIONS
        left, factors = fit_chain(
            matrix,
            basis,
            starts,
            input_gram=input_gram,
            output_gram=output_gram,
            ridge=1e-5,
            evaluations=evaluations,
        )
        return left, [unit_rows(factor) for factor in factors]

    def _member(self, weight: Tensor, left: Tensor, factors: Sequence[Tensor]) -> "CanonicalPolyadicMatrix":
        # Every factor of a term gets the same norm, which trains and quantises best.
        norms = [left.norm(dim=0), *(factor.norm(dim=1) for factor in factors)]
        product = torch.stack(norms).prod(0)
        even = product.pow(1 / len(norms))
        tiny = torch.finfo(weight.dtype).tiny
        scales = [torch.where(product > tiny, even / norm.clamp_min(tiny), 1.0) for norm in norms]
        stored = {"left": left * scales[0], "right": factors[0] * scales[1][:, None]}
        for axis, factor, scale in zip(_long_axes(weight.shape), factors[1:], scales[2:], strict=True):
            stored[f"axis_{axis}"] = factor * scale[:, None]
        stored = {name: tensor.to(weight.dtype) for name, tensor in stored.items()}
        return CanonicalPolyadicMatrix(self, weight.shape, **stored)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "CanonicalPolyadicMatrix":
        self.check(shape)
        stored = {
            name: torch.randn(size, dtype=dtype, generator=generator) / math.sqrt(size[1])
            for name, size in _sizes(self.rank, shape).items()
        }
        return CanonicalPolyadicMatrix(self, shape, **stored)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "CanonicalPolyadicMatrix":
        self.check(shape)
        sizes = _sizes(self.rank, shape)
        checks.tensor_names(tensors.keys(), list(sizes), str(self))
        for name, size in sizes.items():
            checks.shape(name, tensors[name].shape, size, "load the file that belongs to this model")
        return CanonicalPolyadicMatrix(self, shape, **tensors)

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
        """A ladder of ranks, every one started from the one before; on a matrix all ranks from one SVD."""
        checks.weight(weight)
        shape = tuple(weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dense = weight.detach().to(dtype)
        errors = None
        if not _long_axes(shape) and not isinstance(input_gram, BlockDiagonalGram):
            errors = errors_by_rank(dense.flatten(1), input_gram, output_gram).tolist()
        curve: list[Candidate] = []
        before: list[Tensor] | None = None
        for structure in cls.candidates(shape):
            if errors is not None:
                error = errors[structure.rank - 1]
            else:
                left, before = structure._factors(dense, input_gram, output_gram, before=before)
                member = structure._member(dense, left, before)
                error = relative_error(
                    weight, member.to_dense(), input_gram=input_gram, output_gram=output_gram
                )
            curve.append(structure.point(weight, error, geometry))
        return curve


def _long_axes(shape: Sequence[int]) -> list[int]:
    """The kernel axes that have a factor."""
    return [axis for axis, width in enumerate(shape[2:]) if width > 1]


def _sizes(rank: int, shape: Shape) -> dict[str, tuple[int, int]]:
    """The stored tensors' shapes by name."""
    sizes = {"left": (shape[0], rank), "right": (rank, shape[1])}
    return sizes | {f"axis_{axis}": (rank, shape[2 + axis]) for axis in _long_axes(shape)}


def _per_term(shape: Shape) -> int:
    matrix_shape(shape)
    return shape[0] + shape[1] + sum(shape[2 + axis] for axis in _long_axes(shape))


def _most(shape: Shape) -> int:
    """The rank that every kernel of this shape has at most: the product of all modes but the largest."""
    return math.prod(shape) // max(shape)


def _parts(shape: Sequence[int], geometry: Geometry) -> list[list[int]]:
    """Gives the axes of the steps: those of the 1×1 convolution, the short ones, then the depthwise steps'.

    The product of small factors is one depthwise kernel: it multiplies more but reads and writes its images
    once, which is what a depthwise convolution spends its time on. Larger ones run axis by axis; what shrinks
    the image most comes first, what grows it most last.

    Args:
        shape: the weight's.
        geometry: the convolution's.

    Returns:
        Axes per step, at least the first.
    """
    kernel, axes = shape[2:], _long_axes(shape)
    short = [axis for axis in range(len(kernel)) if axis not in axes]
    widths = [kernel[axis] for axis in axes]
    if math.prod(widths) <= _MERGED * sum(widths):
        return [short, axes] if axes else [short]
    sign = 1 if geometry.transposed else -1
    return [short, *([axis] for axis in sorted(axes, key=lambda axis: sign * geometry.stride[axis]))]


def _widths(kernel: Sequence[int], part: Sequence[int]) -> tuple[int, ...]:
    """The kernel of one step."""
    return tuple(width if axis in part else 1 for axis, width in enumerate(kernel))


def _multiply_adds(rank: int, shape: Shape, geometry: Geometry | None) -> int:
    kernel, axes = shape[2:], _long_axes(shape)
    if geometry is None:
        positions = math.prod(kernel)
        terms = positions if axes else 0
        return rank * (shape[1] * positions + terms + shape[0])
    return rank * (
        geometry.groups * _shared_multiply_adds(shape, geometry)
        + shape[0] * geometry.output_positions(kernel)
    )


def _shared_multiply_adds(shape: Shape, geometry: Geometry) -> int:
    """Per term and group: of the first 1×1 convolution, with the short axes, and the depthwise ones."""
    kernel, parts = shape[2:], _parts(shape, geometry)
    steps = geometry.along(kernel, *parts)
    total = shape[1] * steps[0].positions((1,) * len(kernel))
    for part, step in zip(parts[1:], steps[1:], strict=True):
        widths = _widths(kernel, part)
        total += math.prod(widths) * step.positions(widths)
    return total


class CanonicalPolyadicMatrix(StructuredMatrix):
    """A member: `left` (outputs, rank), `right` (rank, channels), `axis_i` (rank, width) per long axis."""

    def __init__(
        self, structure: CanonicalPolyadic, shape: Sequence[int], left: Tensor, right: Tensor, **axes: Tensor
    ) -> None:
        super().__init__(structure, shape)
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())
        for name, factor in axes.items():
            self.register_parameter(name, nn.Parameter(factor.contiguous()))

    def _axes(self) -> dict[int, Tensor]:
        return {axis: getattr(self, f"axis_{axis}") for axis in _long_axes(self.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        axes = self._axes()
        if not axes:
            return low_rank_apply(x, self.left, self.right, bias)
        patches = x.reshape(*x.shape[:-1], self.shape[1], self.inputs // self.shape[1])
        hidden = (torch.matmul(self.right, patches) * rank_one_terms(list(axes.values()))).sum(-1)
        return nn.functional.linear(hidden, self.left, bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups, kernel, parts = geometry.groups, self.shape[2:], _parts(self.shape, geometry)
        first, *steps = geometry.along(kernel, *parts)
        # Groups share all factors but the last: they join the batch up to there.
        hidden = x if groups == 1 else x.reshape(x.shape[0] * groups, -1, *x.shape[2:])
        hidden = channels_last(hidden)
        if parts[0]:  # an axis of length 1 may still have a stride or padding
            right = self.right.reshape(*self.right.shape, *(1,) * len(kernel))
            hidden = first.convolve(hidden, right, groups=1)
        else:
            hidden = pointwise(hidden, self.right)
        for part, step in zip(parts[1:], steps, strict=True):
            depthwise = self.derived(f"depthwise {part}", partial(self._depthwise, part))
            hidden = step.convolve(hidden, depthwise, groups=self.right.shape[0])
        hidden = hidden if groups == 1 else hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
        return pointwise(hidden, self.left, bias, groups)

    def _depthwise(self, part: Sequence[int]) -> Tensor:
        """The depthwise kernels of one step, (rank, 1, *widths)."""
        axes = self._axes()
        terms = rank_one_terms([axes[axis] for axis in part])
        return terms.reshape(-1, 1, *_widths(self.shape[2:], part))

    def to_dense(self) -> Tensor:
        terms = rank_one_terms([self.right, *self._axes().values()])
        return (self.left @ terms).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        terms = rank_one_terms([self.right, *self._axes().values()])
        return self.left[indices] @ terms

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return _multiply_adds(self.left.shape[1], self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        return [Rectangle(0, 0, self.outputs, self.inputs, "low_rank", str(self.left.shape[1]))]
