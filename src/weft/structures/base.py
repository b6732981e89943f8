"""The contract between families of matrices and everything that uses them.

A `Structure` is a family together with its size: a frozen value without tensors. A `StructuredMatrix` is one
member: a module that holds exactly the stored tensors and can be applied. Layers, planner, schemes, storage,
command line and report know families only through these two classes.

A class here is abstract or final. Public methods validate and are not overridden where an underscored twin
exists (`fit` and `_fit`); the underscored one computes. Methods with a default that a family may replace say
so.
"""

import itertools
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, partial
from inspect import getattr_static
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import checks
from weft.kernels.dispatch import in_eager, in_plain_eager
from weft.numerics.gauss_newton import refine
from weft.numerics.gram import (
    BlockDiagonalGram,
    DenseGram,
    DiagonalGram,
    Gram,
    full_precision,
    row_sizes,
    row_weights,
    squared_error,
)
from weft.numerics.nearest_low_rank import errors_by_rank

__all__ = [
    "BlockDiagonalGram",
    "Candidate",
    "Cost",
    "DenseGram",
    "DiagonalGram",
    "Geometry",
    "Gram",
    "Rectangle",
    "RowProfile",
    "Structure",
    "StructuredMatrix",
    "can_unfold",
    "check_nesting",
    "channels_last",
    "exchange_channels",
    "ladder",
    "matrix_multiply_adds",
    "matrix_shape",
    "pointwise",
    "refine_values",
    "relative_error",
    "runs_dense",
]

# What `relative_error` converts to float64 at a time: 8 MiB.
_NUMBERS_AT_A_TIME = 2**20

Shape = tuple[int, ...]
# How the work of an error curve divides over its sizes; see `Structure.curve_work`.
CurveWork = Literal["whole", "shared", "apart"]
Derived = TypeVar("Derived")


# ------------------------------------------------------------------------------------------------------------
# Values


@dataclass(frozen=True, order=True)
class Cost:
    """What a weight costs.

    Attributes:
        parameters: real coefficients before packing (one for every entry that is stored as a code), scales
            and codebooks included; indices, which are none, count in bytes only.
        bytes: those of the stored tensors.
        multiply_adds: per input vector; for a convolution per image where its input size is known, else per
            position.
    """

    parameters: int = 0
    bytes: int = 0
    multiply_adds: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.multiply_adds + other.multiply_adds,
        )

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters - other.parameters,
            self.bytes - other.bytes,
            self.multiply_adds - other.multiply_adds,
        )


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel meets its input, for any number of spatial axes.

    A transposed convolution is the convolution of its input with stride − 1 zeros put between neighbours, by
    the kernel turned round. Its kernel too is (outputs, channels / groups, *kernel) here, not torch's
    (channels, outputs / groups, *kernel): `exchange_channels` leads from one to the other. Whatever runs as a
    chain of convolutions thus runs transposed as well, the step that knows the kernel being transposed.

    Attributes:
        stride: one step per spatial axis.
        padding: (before, after) per spatial axis, so that an asymmetric "same" padding is exact; what a
            transposed convolution leaves out of its result at either end.
        dilation: one spacing per spatial axis.
        groups: number of groups.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        input_size: the input's spatial size where it is known; costs are then per image.
        transposed: whether input and output change their places.
        output_padding: by how much a transposed convolution's result is longer at the end, per spatial axis;
            none where empty.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    input_size: tuple[int, ...] | None = None
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def output_size(self, kernel: Sequence[int], input_size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The output's spatial size.

        Args:
            kernel: the kernel's spatial size.
            input_size: the input's spatial size; the geometry's own where None.

        Returns:
            One size per spatial axis.

        Raises:
            ValueError: neither gives an input size.
        """
        size = self.input_size if input_size is None else input_size
        if size is None:
            raise ValueError(checks.fault("input_size", "known", None, "survey the model with batches"))
        if self.transposed:
            longer = self.output_padding or (0,) * len(self.stride)
            return tuple(
                (extent - 1) * stride - sum(pads) + dilation * (width - 1) + more + 1
                for extent, pads, dilation, width, stride, more in zip(
                    size, self.padding, self.dilation, kernel, self.stride, longer, strict=True
                )
            )
        return tuple(
            (extent + sum(pads) - dilation * (width - 1) - 1) // stride + 1
            for extent, pads, dilation, width, stride in zip(
                size, self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )

    def positions(self, kernel: Sequence[int]) -> int:
        """How often the kernel is applied per image; 1 where the input size is unknown.

        Args:
            kernel: the kernel's spatial size.

        Returns:
            The number of output positions; of input positions where the convolution is transposed.
        """
        if self.input_size is None:
            return 1
        return math.prod(self.input_size if self.transposed else self.output_size(kernel))

    def output_positions(self, kernel: Sequence[int]) -> int:
        """How many positions the output has, where a chain's later 1×1 convolutions are applied.

        Args:
            kernel: the kernel's spatial size.

        Returns:
            The number of positions; 1 where the input size is unknown.
        """
        return 1 if self.input_size is None else math.prod(self.output_size(kernel))

    def along(self, kernel: Sequence[int], *parts: Sequence[int]) -> "list[Geometry]":
        """The geometries of a chain of convolutions that each know some of the axes, in this order.

        A kernel that is a product of kernels along its axes is such a chain: every padding mode pads one axis
        after the other, and what is padded along one axis is not changed by a convolution along another.

        Args:
            kernel: the kernel's spatial size.
            parts: the axes of every step; along all others a step has stride 1 and no padding.

        Returns:
            One geometry per part; each input size, where it is known, is the output size of the step before.
        """
        longer = self.output_padding or (0,) * len(kernel)
        steps, size = [], self.input_size
        for part in parts:
            chosen = [axis in part for axis in range(len(kernel))]
            step = replace(
                self,
                stride=tuple(self.stride[axis] if own else 1 for axis, own in enumerate(chosen)),
                padding=tuple(self.padding[axis] if own else (0, 0) for axis, own in enumerate(chosen)),
                dilation=tuple(self.dilation[axis] if own else 1 for axis, own in enumerate(chosen)),
                output_padding=tuple(longer[axis] if own else 0 for axis, own in enumerate(chosen)),
                input_size=size,
            )
            widths = [width if own else 1 for width, own in zip(kernel, chosen, strict=True)]
            size = None if size is None else step.output_size(widths)
            steps.append(step)
        return steps

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Applies the padding that a convolution cannot do itself.

        Args:
            x: images, shape (*batch, channels, *space).

        Returns:
            The padded images and the symmetric zero padding that is left to the convolution.
        """
        if self.padding_mode == "zeros" and all(before == after for before, after in self.padding):
            return x, tuple(before for before, _ in self.padding)
        flat = list(itertools.chain.from_iterable(reversed(self.padding)))
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, flat, mode=mode), (0,) * len(self.padding)

    def convolve(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, groups: int | None = None
    ) -> Tensor:
        """The dense convolution with this geometry.

        Args:
            x: images, shape (batch, channels, *space) or without the batch axis.
            kernel: shape (outputs, channels / groups, *kernel).
            bias: shape (outputs,).
            groups: in place of the geometry's own number, for one step of a chain.

        Returns:
            Shape (batch, outputs, *space).
        """
        groups = self.groups if groups is None else groups
        if self.transposed:
            kernel = exchange_channels(kernel, groups)
            padding = tuple(before for before, _ in self.padding)
            longer = self.output_padding or (0,) * len(self.stride)
            run = TRANSPOSED_CONVOLUTIONS[len(self.stride)]
            return run(x, kernel, bias, self.stride, padding, longer, groups, self.dilation)
        x, padding = self.pad(x)
        return CONVOLUTIONS[len(self.stride)](x, kernel, bias, self.stride, padding, self.dilation, groups)


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED_CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def channels_last(x: Tensor) -> Tensor:
    """Images laid out for a chain of convolutions: channels innermost, where that is faster.

    On a processor a 1×1 convolution is then one matrix product without reordering its images, and a
    depthwise one works on whole vectors of channels. Measured on a 512→512 layer at 7² and batch 64 a
    canonical polyadic chain takes half the time. The result of a convolution keeps the layout, so that the
    next chain finds it.

    Args:
        x: shape (batch, channels, *space).

    Returns:
        The same values, in another layout for images on a processor in eager mode.
    """
    if x.ndim == 4 and x.device.type == "cpu" and in_eager():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """A 1×1 convolution, the outer steps of a chain.

    Args:
        x: images, shape (batch, channels, *space).
        matrix: shape (outputs, channels / groups).
        bias: shape (outputs,), or None.
        groups: number of groups.

    Returns:
        Shape (batch, outputs, *space).
    """
    kernel = matrix.reshape(*matrix.shape, *(1,) * (x.ndim - 2))
    return CONVOLUTIONS[x.ndim - 2](x, kernel, bias, groups=groups)


def exchange_channels(kernel: Tensor, groups: int = 1) -> Tensor:
    """Exchanges the channel axes of a kernel, group by group; its own inverse.

    Args:
        kernel: shape (outputs, channels / groups, *kernel), as every member has it, or
            (channels, outputs / groups, *kernel), as torch's transposed convolutions store it.
        groups: number of groups.

    Returns:
        The other one, a view where there is one group.
    """
    if groups == 1:
        return kernel.transpose(0, 1)
    return kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Rectangle:
    """One block of a structure's picture, in units of the matrix's rows and columns.

    Attributes:
        row: first row.
        column: first column.
        rows: height.
        columns: width.
        kind: what the block holds; the report colours low rank green and dense red.
        label: short text written into the block, such as its rank.
        factor: which factor of a product the block belongs to; 0 for structures of one factor.
    """

    row: int
    column: int
    rows: int
    columns: int
    kind: Literal["dense", "low_rank", "sparse", "zero", "coded"] = "dense"
    label: str = ""
    factor: int = 0


@dataclass(frozen=True)
class Candidate:
    """One point of an error curve.

    Attributes:
        structure: the family and its size.
        cost: what the member costs.
        error: the relative error ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F / ‖H^{1/2}WĜ^{1/2}‖_F.
    """

    structure: "Structure"
    cost: Cost
    error: float


@dataclass(frozen=True)
class RowProfile:
    """What every row loses in each of several sizes, of all rows or of some that stand for them.

    Attributes:
        rows: increasing row numbers, shape (n,).
        factors: by what a row's error counts in the whole squared error: its weight in the output metric, and
            how many rows it stands for; float64, shape (n,).
        errors: by structure the rows' squared errors in the metric of the inputs, float64, shape (n,).
    """

    rows: Tensor
    factors: Tensor
    errors: "Mapping[Structure, Tensor]"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that a weight is to a family that knows only matrices.

    Args:
        shape: (outputs, inputs) or (outputs, channels, *kernel).

    Returns:
        (outputs, inputs) with channels and kernel axes merged, row-major.

    Raises:
        ValueError: it has fewer than two axes or an empty one.

    Examples:
        >>> matrix_shape((64, 32, 3, 3))
        (64, 288)
    """
    if len(shape) < 2 or any(size < 1 for size in shape):
        expected = "(outputs, inputs) or (outputs, channels, *kernel), no axis empty"
        raise ValueError(checks.fault("shape", expected, tuple(shape), "pass a weight's own shape"))
    return int(shape[0]), math.prod(int(size) for size in shape[1:])


def ladder(low: int, high: int, *, ratio: float = 1.25) -> Iterator[int]:
    """Sizes from `low` to `high`, both included, each about `ratio` times the one before, without repetition.

    Args:
        low: the first size, at least 1.
        high: the last size; nothing is yielded where it is below `low`.
        ratio: the growth per step.

    Yields:
        Increasing whole numbers.

    Examples:
        >>> list(ladder(1, 10, ratio=2))
        [1, 2, 4, 8, 10]
    """
    size = low
    while size < high:
        yield size
        size = max(size + 1, round(size * ratio))
    if high >= low:
        yield high


def points_by_rank(
    of_rank: "Callable[[int], Structure]",
    largest: int,
    weight: Tensor,
    *,
    input_gram: Gram | None,
    output_gram: Gram | None,
    geometry: Geometry | None,
) -> "list[Candidate]":
    """The curve of a family whose members are the matrices of a rank, from one SVD.

    The squared error of rank r is Σ σ_k² over k > r.

    Args:
        of_rank: the structure of a rank.
        largest: the largest rank.
        weight: W.
        input_gram: Ĝ, of one block; the identity where None.
        output_gram: H; the identity where None.
        geometry: the convolution's; its input size makes multiply-adds those of an image.

    Returns:
        One candidate per rank, cheapest first; large ranks stand one per cent apart, so that the curves of
        many large layers fit into memory.
    """
    checks.weight(weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    errors = errors_by_rank(weight.detach().to(dtype).flatten(1), input_gram, output_gram).tolist()
    ranks = ladder(1, largest, ratio=1.01)
    return [of_rank(rank).point(weight, errors[rank - 1], geometry) for rank in ranks]


def relative_error(
    weight: Tensor,
    approximation: "Tensor | StructuredMatrix",
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
) -> float:
    """The relative error of an approximation in the fit's norm.

    Without Grams a few rows at a time are in memory, in float64; with them the whole matrix is.

    Args:
        weight: W, any weight's shape.
        approximation: Ŵ: the same shape, or a member.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.

    Returns:
        ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F / ‖H^{1/2}WĜ^{1/2}‖_F; 0 where both vanish.
    """
    dense = weight.detach().reshape(weight.shape[0], -1)
    rows = len(dense)
    if input_gram is None and output_gram is None:
        rows = max(1, _NUMBERS_AT_A_TIME // dense.shape[1])
    elif isinstance(approximation, StructuredMatrix):
        approximation = approximation.to_dense()
    size = distance = 0.0
    for first in range(0, len(dense), rows):
        part = dense[first : first + rows].to(torch.float64)
        if isinstance(approximation, Tensor):
            near = approximation[first : first + rows]
        else:
            near = approximation.rows(torch.arange(first, first + len(part), device=dense.device))
        error = part - near.detach().to(torch.float64).reshape(part.shape)
        size += float(squared_error(part, input_gram, output_gram))
        distance += float(squared_error(error, input_gram, output_gram))
    if size <= 0:
        return 0.0 if distance <= 0 else math.inf
    return math.sqrt(max(distance, 0.0) / size)


def refine_values(
    member: "StructuredMatrix",
    weight: Tensor,
    *,
    input_gram: Gram | None = None,
    output_gram: Gram | None = None,
    steps: int = 10,
    products: int = 20,
) -> None:
    """Improves all trainable values of a member together, in place; supports, codes and orders stay.

    Members whose values have a closed form are not improved by it; those that are put together from others,
    by a sum or a reshape, are.

    Args:
        member: fitted already; never made worse.
        weight: W, float32 or float64, the member's shape.
        input_gram: Ĝ; the identity where None.
        output_gram: H; the identity where None.
        steps: the most Gauss-Newton steps.
        products: the most products with the Jacobian per step.
    """
    named = {name: value for name, value in member.named_parameters() if value.requires_grad}
    if not named:
        return
    built = _Built(member)
    shape = (weight.shape[0], -1)

    def synthesise(values: tuple[Tensor, ...]) -> Tensor:
        given = {f"member.{name}": value for name, value in zip(named, values, strict=True)}
        return torch.func.functional_call(built, given, ()).reshape(shape)

    found = refine(
        synthesise,
        tuple(named.values()),
        weight.reshape(shape),
        input_gram=input_gram,
        output_gram=output_gram,
        steps=steps,
        products=products,
    )
    with torch.no_grad():
        for value, new in zip(named.values(), found, strict=True):
            value.copy_(new)


class _Built(nn.Module):
    """A module whose output is a member's dense weight."""

    def __init__(self, member: "StructuredMatrix") -> None:
        super().__init__()
        self.member = member

    def forward(self) -> Tensor:
        return self.member.to_dense()


# ------------------------------------------------------------------------------------------------------------
# Convolutions of families that know only matrices

# Numbers of unfolded patches at a time.
PIECE = 2**23
# A member whose kernel is one point is unfolded where its multiply-adds are at most this share of the dense
# kernel's.
UNFOLDED_SHARE = 0.1


def can_unfold(shape: Shape, geometry: Geometry) -> bool:
    """Whether a convolution can be unfolded into products of its matrix with patches.

    Args:
        shape: the weight's.
        geometry: the convolution's.

    Returns:
        True for one or two spatial axes, one group and no transposition.
    """
    return len(shape) in {3, 4} and geometry.groups == 1 and not geometry.transposed


def runs_dense(multiply_adds: int, shape: Shape, geometry: Geometry) -> bool:
    """Whether a family that knows only matrices runs a convolution by the dense kernel, formed once.

    Then nothing but storage shrinks. Unfolding writes every input as often as the kernel covers it, and turns
    the product into images again. For larger kernels that takes longer than the dense convolution in batches,
    however few the multiply-adds (for single images of many channels it can pay, which this rule gives
    away); for a kernel of one point it can be worth it. The benchmark `convolution_latency.py` measures both
    routes.

    Args:
        multiply_adds: the member's, for one vector.
        shape: the weight's.
        geometry: the convolution's.

    Returns:
        True where the dense kernel is faster or unfolding impossible.
    """
    outputs, inputs = matrix_shape(shape)
    if math.prod(shape[2:]) > 1 or not can_unfold(shape, geometry):
        return True
    return multiply_adds > UNFOLDED_SHARE * outputs * inputs


def matrix_multiply_adds(multiply_adds: int, shape: Shape, geometry: Geometry | None) -> int:
    """What a family that knows only matrices costs, as `StructuredMatrix.convolve` runs it.

    Args:
        multiply_adds: the member's, for one vector.
        shape: the weight's.
        geometry: a convolution's, or None.

    Returns:
        Multiply-adds of the dense kernel where that runs, else those of the member; per image where the
        geometry has an input size.
    """
    if geometry is None:
        return multiply_adds
    dense = runs_dense(multiply_adds, shape, geometry)
    return (math.prod(shape) if dense else multiply_adds) * geometry.positions(shape[2:])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(kept: list[tuple[Tensor, int]], tensors: list[Tensor]) -> bool:
    if len(kept) != len(tensors):
        return False
    return all(
        old.data_ptr() == new.data_ptr() and version == _version(new) and old.dtype == new.dtype
        for (old, version), new in zip(kept, tensors, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------
# The member


class StructuredMatrix(nn.Module, ABC):
    """One member of a family: holds exactly the stored tensors and can be applied.

    Stored tensors are the module's parameters (trainable) and persistent buffers (indices, codes). Copies
    packed for kernels are non-persistent buffers. A subclass's constructor takes `(structure, shape, **stored
    tensors)`.

    Attributes:
        structure: the family with its sizes as they came out; a tolerance has become ranks where the family
            has them.
        shape: the weight's own shape, (outputs, inputs) or (outputs, channels, *kernel).
        native_call: how a linear layer has the native library compute what `affine` gives, without a frame of
            Python's: one of its functions and the arguments after x. Names stand for what the member keeps
            under them, "bias" for the layer's and "threads" for their number. Where the function declines,
            `affine` runs. None, or replaced in a subclass with another `affine`, for `affine` alone.
    """

    structure: "Structure"
    shape: Shape

    def __init__(self, structure: "Structure", shape: Sequence[int]) -> None:
        super().__init__()
        self.structure = structure
        self.shape = tuple(int(size) for size in shape)
        self.outputs, self.inputs = matrix_shape(self.shape)
        self.native_call: tuple[Any, ...] | None = None
        self._derived: dict[str, tuple[list[tuple[Tensor, int]], Any]] = {}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Applies the matrix: (*batch, inputs) -> (*batch, outputs); never by rebuilding the dense weight."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight in its own shape, by a route independent of `forward`."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """The rows asked for, without forming the matrix: (*batch,) of integers -> (*batch, inputs)."""

    @abstractmethod
    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        """Multiply-adds of one application, from the tensors; per image where the geometry has a size."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Applies matrix and bias; a family whose last product can add the bias replaces this.

        Args:
            x: shape (*batch, inputs).
            bias: shape (outputs,), or None.

        Returns:
            Shape (*batch, outputs).
        """
        return self(x) if bias is None else self(x) + bias

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        """Applies the member as a convolution; families that run as a chain of convolutions replace this.

        Here by the dense kernel where `runs_dense` says that it is faster, else by unfolding. The kernel is
        formed once for as long as the stored tensors stay as they are; where they train or under autocast,
        once per call.

        Args:
            x: images, shape (batch, channels, *space).
            geometry: stride, padding, dilation, groups.
            bias: shape (outputs,), or None.

        Returns:
            Shape (batch, outputs, *space).
        """
        if not can_unfold(self.shape, geometry) or (
            in_eager() and runs_dense(self._vector_multiply_adds, self.shape, geometry)
        ):
            return geometry.convolve(x, self.derived("kernel", partial(self._kernel, x.device.type)), bias)
        if torch.is_grad_enabled() or not in_eager():
            return self._unfold(x, geometry, bias)
        numbers = self.inputs * math.prod(geometry.output_size(self.shape[2:], x.shape[2:]))
        pieces = [self._unfold(piece, geometry, bias) for piece in x.split(max(1, PIECE // max(1, numbers)))]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _kernel(self, device_type: str) -> Tensor:
        """The dense kernel, as exact under autocast as without."""
        if not torch.is_autocast_enabled(device_type):
            return self.to_dense()
        with torch.autocast(device_type, enabled=False):
            return self.to_dense()

    @cached_property
    def _vector_multiply_adds(self) -> int:
        return self.multiply_adds()

    def _unfold(self, x: Tensor, geometry: Geometry, bias: Tensor | None) -> Tensor:
        """Every patch a vector that the matrix is applied to."""
        kernel = self.shape[2:]
        size = geometry.output_size(kernel, x.shape[2:])
        x, padding = geometry.pad(x)
        stride, dilation = geometry.stride, geometry.dilation
        if len(kernel) == 1:  # F.unfold knows images only
            x, kernel, padding = x.unsqueeze(2), (1, *kernel), (0, *padding)
            stride, dilation = (1, *stride), (1, *dilation)
        patches = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
        return self.affine(patches, bias).transpose(1, 2).reshape(x.shape[0], self.outputs, *size)

    def derived(self, name: str, make: Callable[[], Derived]) -> Derived:
        """What is computed from the stored tensors alone, kept for as long as they stay as they are.

        It is made anew at every call in training mode, where a gradient for the stored tensors is recorded,
        and where a tracer, transform or mode looks on. Changes are known by torch's version counters: what
        writes into `tensor.data` goes round them, and has to be followed by `train()` or `forget()`. Kept
        values are no part of state, pickles and copies.

        Args:
            name: what it is called; one value is kept per name.
            make: computes it: a tensor, or a tuple or list of tensors.

        Returns:
            What `make` returns.
        """
        if self.training:
            self._derived.clear()
        if self.training or not in_plain_eager():
            return make()
        tensors = self._all_tensors()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return make()
        kept = self._derived.get(name)
        if kept is not None and _same(kept[0], tensors):
            return kept[1]
        # An inference tensor could not serve a later call that records a gradient for its input.
        with torch.inference_mode(mode=False), torch.no_grad():
            value = make()
        # Aliases keep the memory from being given to other tensors, whose addresses would then look the same.
        self._derived[name] = ([(tensor.detach(), _version(tensor)) for tensor in tensors], value)
        return value

    def forget(self) -> None:
        """Drops what `derived` keeps, also of nested members; it is computed again when it is needed."""
        for module in self.modules():
            if isinstance(module, StructuredMatrix):
                module._derived.clear()

    def derived_bytes(self) -> int:
        """Bytes that `derived` keeps in memory beside the stored tensors, also in nested members."""
        return sum(
            tensor.nbytes
            for module in self.modules()
            if isinstance(module, StructuredMatrix)
            for _, value in module._derived.values()
            for tensor in (value if isinstance(value, tuple | list) else [value])
        )

    def _all_tensors(self) -> list[Tensor]:
        found = [tensor for tensor in self._parameters.values() if tensor is not None]
        found += [tensor for tensor in self._buffers.values() if tensor is not None]
        for module in self._modules.values():
            if module is not None:
                found += [*module.parameters(), *module.buffers()]
        return found

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._derived.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._derived.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = {name: tensor.clone() for name, tensor in self._indices().items()}
        super()._load_from_state_dict(*args, **kwargs)
        self._derived.clear()
        if all(torch.equal(before[name], tensor) for name, tensor in self._indices().items()):
            return
        # What the constructor made of other indices would be applied to the new values: it is made anew.
        fresh = self.structure.from_tensors(self.shape, self.stored())
        for name in list(self._non_persistent_buffers_set):
            delattr(self, name)
        for name in fresh._non_persistent_buffers_set:
            if name in vars(self):  # a plain None so far
                delattr(self, name)
            self.register_buffer(name, fresh._buffers[name], persistent=False)
        kept = vars(nn.Module()).keys() | {"_derived", "structure"}
        for name in vars(fresh).keys() - kept:
            setattr(self, name, getattr(fresh, name))
        self._modules.update({name: made for name, made in fresh.named_children() if not made.state_dict()})

    def _indices(self) -> dict[str, Tensor]:
        """Its own stored tensors of whole numbers."""
        return {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None
            and name not in self._non_persistent_buffers_set
            and not tensor.is_floating_point()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}

    def parameter_count(self) -> int:
        """Real coefficients; here every floating stored tensor, a family of codes replaces this."""
        return sum(tensor.numel() for tensor in self.stored().values() if tensor.is_floating_point())

    def cost(self, geometry: Geometry | None = None) -> Cost:
        """What the member costs, counted from its tensors.

        Args:
            geometry: the convolution's; its input size makes the multiply-adds those of an image.

        Returns:
            Parameters, bytes and multiply-adds.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.stored().values())
        return Cost(self.parameter_count(), size, self.multiply_adds(geometry))

    def in_place(self, names: Iterable[str]) -> list[Tensor]:
        """Stored tensors as they are now, for a kernel that reads them on every call.

        Args:
            names: which, in the order wanted.

        Returns:
            The tensors themselves.
        """
        # nn.Module looks its tensors up only after all else failed, which costs as much as a small product;
        # what a parametrisation replaced is still found that way.
        parameters, buffers = self._parameters, self._buffers
        try:
            return [parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:
            return [
                parameters[name]
                if name in parameters
                else buffers[name]
                if name in buffers
                else getattr(self, name)
                for name in names
            ]  # type: ignore[misc]

    def only_storage_shrinks(self, geometry: Geometry | None) -> bool:
        """Whether the member costs as many multiply-adds as the dense weight, or more.

        Args:
            geometry: the convolution's, or None.

        Returns:
            True for a convolution that runs by its dense kernel.
        """
        dense = math.prod(self.shape) * (1 if geometry is None else geometry.positions(self.shape[2:]))
        return self.multiply_adds(geometry) >= dense

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name, detached; nested members have dotted names."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def relax(self) -> "StructuredMatrix":
        """A trainable stand-in for values that do not train as they are; here the member itself."""
        return self

    def harden(self) -> "StructuredMatrix":
        """Back from `relax`; here the member itself."""
        return self

    def reinitialise(self, *, generator: torch.Generator | None = None) -> "StructuredMatrix":
        """A member with the same supports and orders and random values, to train what was found anew.

        Here every floating stored tensor is drawn normal with the mean square that it had, so that signals
        keep their size; where values are codes, which are no pattern, the whole member is drawn anew. A
        family that knows better replaces this.

        Args:
            generator: the source of randomness; a fixed seed where None.

        Returns:
            A new member.
        """
        generator = generator or torch.Generator().manual_seed(0)
        stored = self.stored()
        if self.relax() is not self:
            dtype = next((value.dtype for value in stored.values() if value.is_floating_point()), None)
            return self.structure.initialise(self.shape, dtype=dtype or torch.float32, generator=generator)
        drawn = {}
        for name, value in stored.items():
            if not value.is_floating_point():
                drawn[name] = value.clone()
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            drawn[name] = (noise * value.double().cpu().square().mean().sqrt()).to(value)
        return self.structure.from_tensors(self.shape, drawn)

    def picture(self) -> list[Rectangle]:
        """The structure drawn as blocks; here one dense block, a family with blocks replaces this."""
        return [Rectangle(0, 0, self.outputs, self.inputs)]

    def extra_repr(self) -> str:
        return f"{self.structure}, shape={self.shape}"


# ------------------------------------------------------------------------------------------------------------
# The family


@dataclass(frozen=True)
class Structure(ABC):
    """A family of matrices together with its size.

    A subclass is a frozen dataclass whose fields are numbers, strings, None, structures, or tuples of these.
    It gets JSON, equality and hashing from its fields, and a place in every table from standing in the
    folder.
    """

    source: ClassVar[str]

    # -- sizes

    @classmethod
    @abstractmethod
    def candidates(cls, shape: Shape, inner: Iterable["Structure"] = ()) -> Iterator[Self]:
        """The ladder of sizes, cheapest first; a wrapper builds on `inner`, other families' candidates."""

    @abstractmethod
    def parameter_count(self, shape: Shape) -> int | None:
        """Real coefficients of a member; None where the size depends on the weight."""

    @abstractmethod
    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        """Multiply-adds per input vector or per image; None where the size depends on the weight."""

    def predicted_cost(self, shape: Shape, element_size: int, geometry: Geometry | None = None) -> Cost:
        """What a member costs, before it is fitted.

        Here of a family that stores real numbers alone; one of codes or indices replaces this.

        Args:
            shape: the weight's shape.
            element_size: bytes of one of the weight's numbers.
            geometry: the convolution's; its input size makes multiply-adds those of an image.

        Returns:
            The cost.

        Raises:
            ValueError: the size depends on the weight.
        """
        count, products = self.parameter_count(shape), self.multiply_adds(shape, geometry)
        if count is None or products is None:
            expected = "of a size that does not depend on the weight"
            raise ValueError(checks.fault("structure", expected, str(self), "fit it and ask the member"))
        return Cost(count, count * element_size, products)

    def point(self, weight: Tensor, error: float, geometry: Geometry | None = None) -> Candidate:
        """A point of an error curve, the cost predicted.

        Args:
            weight: W.
            error: the relative error of the member nearest to it.
            geometry: the convolution's.

        Returns:
            The candidate.
        """
        return Candidate(
            self, self.predicted_cost(tuple(weight.shape), weight.element_size(), geometry), error
        )

    def refusal(self, shape: Shape, geometry: Geometry | None = None) -> str | None:
        """Why this family cannot take a layer; here None, a family with bounds replaces this.

        Args:
            shape: the weight's shape.
            geometry: the convolution's, or None for a linear layer.

        Returns:
            The reason, worded to follow "left dense, because".
        """
        return None

    def chain(self, shape: Shape) -> Mapping[str, Shape]:
        """The stored tensors whose product, as matrices from left to right, is the weight.

        A wrapper that stores another family's factors in its own form (pruned, coded) asks this; a family
        whose members are such products replaces it.

        Args:
            shape: the weight's shape.

        Returns:
            Shape by name, in the order of the product; empty where members are no such products.
        """
        return {}

    # -- members

    def fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        start: StructuredMatrix | None = None,
        generator: torch.Generator | None = None,
    ) -> StructuredMatrix:
        """The member nearest to a weight in ‖H^{1/2}(W − Ŵ)Ĝ^{1/2}‖_F.

        Computed in float64 for float64 weights, else in float32, also under autocast; stored in the weight's
        dtype. A weight that is not finite, a Gram or a start of another shape, and a size that is impossible
        for the weight are ValueErrors.

        Args:
            weight: W, shape (outputs, inputs) or (outputs, channels, *kernel), floating.
            input_gram: Ĝ of the layer's inputs (of its patches for a convolution); the identity where None.
            output_gram: H of the layer's outputs; the identity where None.
            start: a member of the same family to start from; the result is never worse.
            generator: the source of randomness; a fixed seed where None, so that fits repeat.

        Returns:
            The member.

        Raises:
            TypeError: the start is no structured matrix.
        """
        checks.weight(weight)
        shape = tuple(weight.shape)
        outputs, inputs = matrix_shape(shape)
        self._check_gram("input_gram", input_gram, inputs, "columns", outputs)
        self._check_gram("output_gram", output_gram, outputs, "rows", outputs)
        self.check(shape)
        if start is not None:
            if not isinstance(start, StructuredMatrix):
                got = type(start).__name__
                raise TypeError(checks.fault("start", "a structured matrix", got, "pass a member or None"))
            checks.shape("start", start.shape, shape, "start from a member fitted to a weight of this shape")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dense = weight.detach().to(dtype).contiguous()
        with torch.no_grad(), full_precision():
            member = self._fit(
                dense, input_gram=input_gram, output_gram=output_gram, start=start, generator=generator
            ).to(weight.dtype)
            if start is not None and start.structure == member.structure:

                def error(candidate: StructuredMatrix) -> float:
                    return relative_error(
                        dense, candidate.to_dense(), input_gram=input_gram, output_gram=output_gram
                    )

                if error(start) < error(member):
                    member = self.from_tensors(
                        shape, {name: tensor.clone() for name, tensor in start.stored().items()}
                    ).to(weight.dtype)
        return member

    @abstractmethod
    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> StructuredMatrix:
        """The member nearest to a checked, contiguous float32 or float64 weight."""

    @abstractmethod
    def initialise(
        self,
        shape: Shape,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> StructuredMatrix:
        """A random member to train from scratch, scaled so that signals keep their size."""

    @abstractmethod
    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> StructuredMatrix:
        """The member with the given tensors (dotted names for nested ones); refuses what does not fit."""

    def share_out(
        self, weights: Sequence[Tensor], input_grams: Sequence[Gram | None] = ()
    ) -> "list[Structure]":
        """One structure per weight, where this one's size is that of all weights together.

        A family whose size can be shared replaces this: the largest 5 % of the entries of all weights are
        more than 5 % of some and less of others.

        Args:
            weights: the weights.
            input_grams: Ĝ of every weight's inputs, where entries count by what they give out; none where
                weights are compared as they are.

        Raises:
            ValueError: the family has no such size.
        """
        remedy = "give every weight a structure of its own"
        raise ValueError(checks.fault("structure", "of a size that weights can share", str(self), remedy))

    def resized(self, factor: float, shape: Shape) -> "Structure":
        """A larger or smaller structure of this kind; a family with one number for its size replaces this.

        Args:
            factor: what the size is multiplied by; other options stay as they are.
            shape: the weight's shape, which bounds the size.

        Raises:
            ValueError: the family has no such number.
        """
        remedy = "use a family with one number for its size, such as a rank or a density"
        raise ValueError(checks.fault("structure", "of a size that can change", str(self), remedy))

    def check(self, shape: Shape) -> None:
        """Checks that the size is possible for a weight (ValueError); families with bounds replace this.

        Args:
            shape: the weight's shape.
        """
        matrix_shape(shape)

    @classmethod
    def error_curve(
        cls,
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
        inner: Iterable["Structure"] = (),
    ) -> list[Candidate]:
        """Cost and error over the ladder of sizes, here of those of `curve_sizes`.

        Args:
            weight: W.
            input_gram: Ĝ.
            output_gram: H.
            geometry: the convolution's; its input size makes multiply-adds those of an image.
            inner: other families' candidates, for wrappers.

        Returns:
            One candidate per size, cheapest first.
        """
        checks.weight(weight)
        inner = tuple(inner)
        return cls.points(
            list(cls.candidates(tuple(weight.shape), inner)) if inner else cls.curve_sizes(weight),
            weight,
            input_gram=input_gram,
            output_gram=output_gram,
            geometry=geometry,
        )

    @classmethod
    def curve_sizes(cls, weight: Tensor) -> "list[Structure]":
        """The sizes of a weight's error curve, cheapest first; here all candidates that stand by themselves.

        A family with many kinds of sizes, of which a quick look at the weight tells the useful ones, replaces
        this.

        Args:
            weight: W.

        Returns:
            Structures of this family.
        """
        return list(cls.candidates(tuple(weight.shape)))

    @classmethod
    def points(
        cls,
        structures: "Sequence[Structure]",
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
    ) -> list[Candidate]:
        """Cost and error of some sizes, here by a fit each; a family that knows them sooner replaces this.

        Args:
            structures: of this family.
            weight: W.
            input_gram: Ĝ.
            output_gram: H.
            geometry: the convolution's; its input size makes multiply-adds those of an image.

        Returns:
            One candidate per structure, in their order.
        """
        curve = []
        for structure in structures:
            member = structure.fit(weight, input_gram=input_gram, output_gram=output_gram)
            error = relative_error(weight, member, input_gram=input_gram, output_gram=output_gram)
            curve.append(Candidate(structure, member.cost(geometry), error))
        return curve

    @classmethod
    def curve_work(cls, *, weighted: bool) -> CurveWork:
        """How the work of an error curve divides over its sizes, so that a planner may ask for part of it.

        "whole": one factorisation gives all sizes, and part of them takes as long. "shared": sizes that are
        asked for together (`points`) share work, and part of them takes less. "apart": every size is a fit
        of its own. Here it follows from what a family replaces: `error_curve`, `points` or neither; a family
        of which that says the wrong thing replaces this.

        Args:
            weighted: whether the errors are measured in a Gram.

        Returns:
            One of the three words.
        """
        replaced = {
            name
            for name in ("error_curve", "points")
            if getattr_static(cls, name) is not vars(Structure)[name]
        }
        return "whole" if "error_curve" in replaced else "shared" if replaced else "apart"

    @property
    def approximated(self) -> "Structure | None":
        """The structure whose members this one's only approximate, so that it loses no less; here none."""
        return None

    @property
    def rows_apart(self) -> bool:
        """Whether every row is fitted by itself, so that rows may be divided among sizes; here not."""
        return False

    @classmethod
    def row_profile(
        cls,
        structures: Sequence["Structure"],
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
    ) -> RowProfile:
        """Every row's error in each of several sizes, for families whose rows are apart.

        Args:
            structures: of this family, all with `rows_apart`.
            weight: W.
            input_gram: Ĝ.
            output_gram: H; what error feedback over rows gains is predicted.

        Returns:
            The profile; here from one fit per structure.
        """
        matrix = weight.detach().double().flatten(1)
        errors = {}
        for structure in structures:
            member = structure.fit(weight, input_gram=input_gram)
            lost = matrix - member.to_dense().detach().double().flatten(1)
            errors[structure] = row_sizes(lost, input_gram)
        rows = len(matrix)
        return RowProfile(torch.arange(rows), row_weights(output_gram, rows), errors)

    # -- JSON

    def to_json(self) -> dict[str, Any]:
        """The structure as JSON-ready data; fields at their default are left out.

        Returns:
            A dictionary that starts with the family's name.
        """
        data: dict[str, Any] = {"family": type(self).__name__}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                data[field.name] = _to_data(value)
        return data

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> Self:
        """Builds a structure of this family from JSON data whose nested structures are already built.

        Args:
            data: values by field name, without the family.

        Returns:
            The structure.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            remedy = f"known are {', '.join(known) or 'none'}"
            raise ValueError(checks.fault(f"fields of {cls.__name__}", "known", ", ".join(unknown), remedy))
        missing = [name for name, field in known.items() if field.default is MISSING and name not in data]
        if missing:
            raise ValueError(
                checks.fault(
                    f"fields of {cls.__name__}", "complete", f"none for {', '.join(missing)}", "add them"
                )
            )
        hints = typing.get_type_hints(cls)
        return cls(**{name: _from_data(value, hints[name]) for name, value in data.items()})

    def __str__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!s}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @staticmethod
    def _check_gram(argument: str, gram: Gram | None, size: int, side: str, outputs: int) -> None:
        if gram is None:
            return
        if not isinstance(gram, Gram):
            got = type(gram).__name__
            raise TypeError(checks.fault(argument, "a Gram", got, "wrap the moment, e.g. DenseGram(moment)"))
        if gram.size != size:
            expected = f"of size {size}, one per weight {side[:-1]}"
            raise ValueError(checks.fault(argument, expected, gram.size, "survey this layer's own data"))
        if isinstance(gram, BlockDiagonalGram) and outputs % gram.groups:
            expected = f"of a number of blocks that divides the {outputs} outputs"
            raise ValueError(checks.fault(argument, expected, gram.groups, "use the convolution's groups"))


# How many wrappers may stand around each other: SumOf((Quantized(4, of=LowRank(8)), ...)) is two.
DEEPEST_NESTING = 2


def check_nesting(structure: Structure) -> None:
    """Checks that wrappers are not nested too deeply; a wrapper calls it when it is made.

    Args:
        structure: the wrapper. Fields at their default, such as `of=Dense()`, do not count.

    Raises:
        ValueError: more than two wrappers stand around each other.
    """
    depth = _nesting(structure)
    if depth > DEEPEST_NESTING:
        expected = f"nested at most {DEEPEST_NESTING} deep"
        remedy = "take the innermost structure out, or flatten sums into one"
        raise ValueError(checks.fault(type(structure).__name__, expected, f"{depth}: {structure}", remedy))


def _nesting(structure: Structure) -> int:
    own = 0
    for field in fields(structure):
        value = getattr(structure, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Structure):
                own = max(own, 1 + _nesting(item))
    return own


def _to_data(value: object) -> object:
    """One field's value as JSON-ready data."""
    if isinstance(value, Structure):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_data(item) for item in value]
    return value


def _from_data(value: Any, hint: object) -> Any:
    """One field's value from JSON data: lists become tuples, whole floats stay as the hint wants them."""
    if isinstance(value, list):
        return tuple(_from_data(item, Any) for item in value)
    wanted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in wanted and int not in wanted:
        return float(value)  # 1 and 1.0 are the same JSON number and must give the same hash
    return value
