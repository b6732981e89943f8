"""Interpolative low rank: r of the matrix's own rows, and what combinations of them its other rows are.

A matrix of rank r stored as two factors, L R = (L G)(G⁻¹ R) for every invertible G, has r² numbers too many.
With G the inverse of r rows of L, these rows become those of the identity and need not be stored. That leaves
r (m + n − r) numbers, as many as the matrices of rank r have dimensions: no accuracy is lost, and the product
takes r² multiply-adds less as well.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.block_sequence import Program, Segment, Space, Step, block_sequence_apply, write_program
from weft.numerics.bit_mask import mask_bytes, mask_of, packed, places_of, unpacked
from weft.numerics.gram import BlockDiagonalGram
from weft.numerics.maxvol import by_own_rows, with_identity
from weft.numerics.nearest_low_rank import nearest_of_rank
from weft.structures.base import (
    Candidate,
    Cost,
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


@dataclass(frozen=True)
class Interpolative(Structure):
    """Matrices of a given rank, stored as some of their rows and the combinations that give the others.

    The same matrices as those of `LowRank`, in rank · (outputs + inputs − rank) numbers. A convolution's
    kernel (outputs, channels, *kernel) is taken as the matrix (outputs, channels · kernel): a convolution to
    `rank` of its own output channels, then a 1×1 convolution to the others. Groups of a grouped convolution
    share the first one, and give their other channels' parts of it as well.

    Args:
        rank: the number of rows, from 1 to the smaller side.

    Raises:
        TypeError: the rank is no whole number.
        ValueError: the rank is below 1.

    Examples:
        >>> Interpolative(rank=30).parameter_count((1000, 512))
        44460
    """

    source: ClassVar[str] = "Cheng et al. 2005 (interpolative decomposition); Zhao et al. 2025 (PIFA)"

    rank: int

    def __post_init__(self) -> None:
        checks.integer_between("rank", self.rank, 1, None)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        yield from (cls(rank) for rank in ladder(1, _largest(shape)))

    def parameter_count(self, shape: Shape) -> int:
        return self.rank * (sum(matrix_shape(shape)) - self.rank)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int:
        outputs, inputs = matrix_shape(shape)
        return _multiply_adds(self.rank, outputs, inputs, shape, geometry)

    def predicted_cost(self, shape: Shape, element_size: int, geometry: Geometry | None = None) -> Cost:
        cost = super().predicted_cost(shape, element_size, geometry)
        return replace(cost, bytes=cost.bytes + mask_bytes(shape[0]))

    def resized(self, factor: float, shape: Shape) -> "Interpolative":
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
    ) -> "InterpolativeMatrix":
        left, right = nearest_of_rank(
            weight.flatten(1), self.rank, input_gram=input_gram, output_gram=output_gram
        )
        skeleton, combinations, marked = by_own_rows(left, right)
        return InterpolativeMatrix(self, weight.shape, skeleton, combinations, packed(marked))

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "InterpolativeMatrix":
        self.check(shape)
        outputs, inputs = matrix_shape(shape)
        # Every row of the matrix gets the same norm.
        skeleton = torch.randn(inputs, self.rank, dtype=dtype, generator=generator) / math.sqrt(inputs)
        rest = outputs - self.rank
        combinations = torch.randn(self.rank, rest, dtype=dtype, generator=generator) / math.sqrt(self.rank)
        chosen = torch.arange(self.rank) * outputs // self.rank
        return InterpolativeMatrix(self, shape, skeleton, combinations, packed(mask_of(chosen, outputs)))

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "InterpolativeMatrix":
        self.check(shape)
        outputs, inputs = matrix_shape(shape)
        remedy = "load the file that belongs to this model"
        checks.tensor_names(tensors.keys(), ["skeleton", "combinations", "chosen"], str(self))
        checks.shape("skeleton", tensors["skeleton"].shape, (inputs, self.rank), remedy)
        checks.shape("combinations", tensors["combinations"].shape, (self.rank, outputs - self.rank), remedy)
        checks.shape("chosen", tensors["chosen"].shape, (mask_bytes(outputs),), remedy)
        count = int(unpacked(tensors["chosen"], outputs).sum())
        if count != self.rank:
            raise ValueError(checks.fault("chosen", f"{self.rank} rows marked", count, remedy))
        return InterpolativeMatrix(self, shape, **tensors)

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
            _largest(tuple(weight.shape)),
            weight,
            input_gram=input_gram,
            output_gram=output_gram,
            geometry=geometry,
        )


class InterpolativeMatrix(StructuredMatrix):
    """A member of `Interpolative`.

    Stores `skeleton` (inputs, rank), some of the matrix's rows, transposed; `combinations` (rank, outputs −
    rank), for every other row what its combination of these is; and `chosen`, which rows are in the skeleton:
    one bit per row, the first ones in the low bits of the first byte. Rows of either kind stand in their own
    order.
    """

    chosen: Tensor
    places: Tensor

    def __init__(
        self, structure: Interpolative, shape: Shape, skeleton: Tensor, combinations: Tensor, chosen: Tensor
    ) -> None:
        super().__init__(structure, shape)
        self.skeleton = nn.Parameter(skeleton.contiguous())
        self.combinations = nn.Parameter(combinations.contiguous())
        self.register_buffer("chosen", chosen.contiguous())
        marked = unpacked(chosen, self.outputs)
        # Where each row stands among the skeleton's, followed by the others.
        self.register_buffer("places", places_of(marked), persistent=False)
        self._program = _write_program(structure.rank, self.outputs, self.inputs, self.places.cpu())
        self.native_call = self._program.native_call

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return block_sequence_apply(x, self._parameters, self._program, bias, self._composed)

    def _composed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of PyTorch's operations."""
        checks.last_dimension(x, self.inputs)
        own = x @ self.skeleton
        result = torch.cat([own, own @ self.combinations], -1).index_select(-1, self.places)
        return result if bias is None else result + bias

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups = geometry.groups
        kernel = self.skeleton.mT.reshape(-1, *self.shape[1:])
        if groups == 1:
            parts = [geometry.convolve(channels_last(x), kernel)]
            if self.combinations.shape[1]:
                parts.append(pointwise(parts[0], self.combinations.mT))
            result = torch.cat(parts, 1).index_select(1, self.places)
            return result if bias is None else result + bias.reshape(-1, *(1 for _ in self.shape[2:]))
        # Every group has the skeleton's channels of its own: they join the batch.
        folded = channels_last(x.reshape(x.shape[0] * groups, -1, *x.shape[2:]))
        own = geometry.convolve(folded, kernel, groups=1)
        return pointwise(own.reshape(x.shape[0], -1, *own.shape[2:]), self._left(), bias, groups)

    def _left(self) -> Tensor:
        """The left factor that the skeleton's rows are those of the identity in, shape (outputs, rank)."""
        return with_identity(self.combinations, self.places).mT

    def to_dense(self) -> Tensor:
        return (self._left() @ self.skeleton.mT).reshape(self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        places, rank = self.places[indices], self.skeleton.shape[1]
        own = self.skeleton.mT[places.clamp_max(rank - 1)]
        if not self.combinations.shape[1]:
            return own
        others = self.combinations.mT[(places - rank).clamp_min(0)] @ self.skeleton.mT
        return torch.where((places < rank)[..., None], own, others)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return _multiply_adds(self.skeleton.shape[1], self.outputs, self.inputs, self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        rank = self.skeleton.shape[1]
        return [Rectangle(0, 0, self.outputs, self.inputs, "low_rank", str(rank))]


# How many outputs a step gives at most: the unit in which threads share a product.
_STRETCH = 128


def _write_program(rank: int, outputs: int, inputs: int, places: Tensor) -> Program:
    """The product in two phases: inputs to the skeleton's rows, then these to the others."""
    own = [
        [Step(Space.OUTPUT, begin, size, (Segment(0, begin, rank, Space.INPUT, 0, inputs),))]
        for begin, size in _stretches(rank)
    ]
    rest = outputs - rank
    others = [
        [Step(Space.OUTPUT, rank + begin, size, (Segment(1, begin, rest, Space.OUTPUT, 0, rank),))]
        for begin, size in _stretches(rest)
    ]
    return write_program(
        inputs,
        outputs,
        0,
        [inputs * rank, rank * rest],
        [own, others] if others else [own],
        output_places=places,
        names=("skeleton", "combinations"),
    )


def _stretches(count: int) -> list[tuple[int, int]]:
    return [(begin, min(_STRETCH, count - begin)) for begin in range(0, count, _STRETCH)]


def _multiply_adds(rank: int, outputs: int, inputs: int, shape: Shape, geometry: Geometry | None) -> int:
    if geometry is None:
        return rank * (inputs + outputs - rank)
    # With several groups every one computes the skeleton's channels, and combines them to all of its own.
    combined = outputs - rank if geometry.groups == 1 else outputs
    first = geometry.groups * inputs * geometry.positions(shape[2:])
    return rank * (first + combined * geometry.output_positions(shape[2:]))


def _largest(shape: Shape) -> int:
    """The largest rank below the full one, at least 1: each stores fewer numbers than the dense weight."""
    return max(1, min(matrix_shape(shape)) - 1)
