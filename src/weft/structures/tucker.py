"""Tucker-2: a kernel compressed along its two channel modes, run as 1×1, a small kernel, 1×1.

    Ŵ[f, c, :] = Σ_ab left[f, a] core[a, b, :] right[b, c]

A mode at its full rank is not factored: ranks (r, channels) are the two convolutions of `LowRank`, a kernel
to r channels and a 1×1 convolution, and ranks (outputs, r) the two of the other unfolding, 1×1 and then the
kernel. Without Grams the factors come from the higher-order SVD and higher-order orthogonal iteration. In the
metric of the patches the outputs' factor has a closed form, and the others follow by variable projection.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.low_rank import low_rank_apply
from weft.numerics.channel_tucker import higher_order_svd, orthogonal_iteration, truncation_errors
from weft.numerics.gram import BlockDiagonalGram
from weft.numerics.nearest_low_rank import errors_by_rank, leading_gram, nearest_of_rank
from weft.numerics.variable_projection import fit_chain
from weft.numerics.vbmf import bayesian_rank
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

VBMF = "vbmf"
Ranks = tuple[int, int]


@dataclass(frozen=True)
class Tucker(Structure):
    """Kernels of given ranks along the output and the input channels.

    On a linear layer and on a 1×1 convolution this is low rank.

    Args:
        ranks: ranks of the output and the input channels; or "vbmf", the ranks of both unfoldings by
            variational Bayesian matrix factorisation; or a share of each mode's size, on a matrix the share
            of its singular values that is kept.

    Raises:
        TypeError: the ranks are neither two whole numbers, nor a share, nor a string.
        ValueError: a rank is below 1, the share is not above 0 and at most 1, or the string is unknown.

    Examples:
        >>> Tucker((16, 24)).parameter_count((64, 32, 3, 3))
        5248
        >>> Tucker(0.25).parameter_count((1000, 512))
        193536
    """

    source: ClassVar[str] = "Tucker 1966; Kim et al. 2016, section 3.1; Nakajima et al. 2013"

    ranks: Ranks | str | float = VBMF

    def __post_init__(self) -> None:
        if isinstance(self.ranks, str):
            checks.one_of("ranks", self.ranks, (VBMF,))
        elif isinstance(self.ranks, tuple):
            if len(self.ranks) != 2:
                expected = "two whole numbers, a share or 'vbmf'"
                remedy = "give the ranks of the output and of the input channels"
                raise ValueError(checks.fault("ranks", expected, self.ranks, remedy))
            for name, rank in zip(("ranks[0]", "ranks[1]"), self.ranks, strict=True):
                checks.integer_between(name, rank, 1, None)
        else:
            checks.share("ranks", self.ranks)

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, channels, positions = _modes(shape)
        if positions == 1:
            break_even = max(1, (outputs * channels - 1) // (outputs + channels))
            yield from (cls((rank, rank)) for rank in ladder(1, break_even))
            return
        whole = outputs * channels * positions
        found = {}
        for step in ladder(1, max(outputs, channels)):
            outer, inner_rank = (
                max(1, round(step * size / max(outputs, channels))) for size in (outputs, channels)
            )
            for ranks in ((outer, inner_rank), (outer, channels), (outputs, inner_rank)):
                found[ranks] = _parameters(ranks, shape)
        fewest = min(found.values())
        kept = {ranks: count for ranks, count in found.items() if count < whole or count == fewest}
        yield from (cls(ranks) for ranks in sorted(kept, key=lambda ranks: (kept[ranks], ranks)))

    def parameter_count(self, shape: Shape) -> int | None:
        return None if isinstance(self.ranks, str) else _parameters(self._given(shape), shape)

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        return None if isinstance(self.ranks, str) else _multiply_adds(self._given(shape), shape, geometry)

    def check(self, shape: Shape) -> None:
        outputs, channels, positions = _modes(shape)
        if isinstance(self.ranks, tuple):
            owner = f"a {tuple(shape)} weight"
            least = min(outputs, channels)
            for index, size in enumerate((outputs, channels)):
                most = least if positions == 1 else size
                checks.integer_between(f"ranks[{index}]", self.ranks[index], 1, most, of=owner)

    def _given(self, shape: Shape) -> Ranks:
        """The ranks for a shape, where they do not depend on the weight."""
        assert not isinstance(self.ranks, str)
        outputs, channels, positions = _modes(shape)
        if isinstance(self.ranks, tuple):
            outer, inner = self.ranks
            return (outer, inner) if positions > 1 else (min(outer, inner), min(outer, inner))
        outer, inner = (min(outputs, channels),) * 2 if positions == 1 else (outputs, channels)
        return max(1, round(self.ranks * outer)), max(1, round(self.ranks * inner))

    def _found(self, weight: Tensor) -> Ranks:
        """The ranks for a weight."""
        if self.ranks != VBMF:
            return self._given(tuple(weight.shape))
        outer = bayesian_rank(weight.flatten(1))
        matrix = _modes(tuple(weight.shape))[2] == 1
        return outer, outer if matrix else bayesian_rank(weight.transpose(0, 1).flatten(1))

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "TuckerMatrix":
        return self._fitted(weight, self._found(weight), input_gram, output_gram)

    @staticmethod
    def _fitted(
        weight: Tensor,
        ranks: Ranks,
        input_gram: Gram | None,
        output_gram: Gram | None,
        evaluations: int | None = None,
    ) -> "TuckerMatrix":
        shape = tuple(weight.shape)
        outputs, channels, positions = _modes(shape)
        outer, inner = ranks
        matrix = weight.flatten(1)
        if positions == 1:
            left, right = nearest_of_rank(matrix, outer, input_gram=input_gram, output_gram=output_gram)
            tensors = {"left": left, "right": right}
        elif inner == channels:
            if outer == outputs:
                tensors = {"core": weight}
            else:
                left, core = nearest_of_rank(matrix, outer, input_gram=input_gram, output_gram=output_gram)
                tensors = {"left": left, "core": core}
        elif input_gram is None and output_gram is None:
            found = orthogonal_iteration(weight.flatten(2), ranks)
            if outer < outputs:
                tensors = found._asdict()
            else:
                tensors = {"core": torch.tensordot(found.left, found.core, dims=1), "right": found.right}
        else:

            def starts(dense: Tensor, gram: Gram | None) -> list[Tensor]:
                kernel = dense.reshape(outputs, channels, positions)
                channel_gram = None if gram is None else leading_gram(gram, channels)
                if channel_gram is not None:
                    kernel = channel_gram.whiten(kernel.mT.flatten(0, 1)).reshape(outputs, -1, channels).mT
                found = orthogonal_iteration(kernel, ranks)
                right = found.right if channel_gram is None else channel_gram.unwhiten(found.right)
                return [right] if outer == outputs else [found.core, right]

            def basis(factors: Sequence[Tensor]) -> Tensor:
                right = factors[-1]
                if outer < outputs:
                    return torch.einsum("abs,bc->acs", factors[0], right).flatten(1)
                eye = torch.eye(positions, dtype=right.dtype)
                return torch.einsum("bc,st->bsct", right, eye).reshape(inner * positions, -1)

            left, factors = fit_chain(
                matrix, basis, starts, input_gram=input_gram, output_gram=output_gram, evaluations=evaluations
            )
            tensors = _orthonormal(left, factors, ranks, shape)
        sizes = _sizes(ranks, shape)
        stored = {name: tensor.reshape(sizes[name]).to(weight.dtype) for name, tensor in tensors.items()}
        return TuckerMatrix(Tucker(ranks), shape, **stored)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "TuckerMatrix":
        self.check(shape)
        if isinstance(self.ranks, str):  # there is no weight to ask: the ranks of half of each mode
            return Tucker(0.5).initialise(shape, dtype=dtype, generator=generator)
        ranks = self._given(shape)
        stored = {}
        for name, size in _sizes(ranks, shape).items():
            drawn = torch.randn(size, dtype=dtype, generator=generator)
            # Every factor keeps the size of what it is applied to.
            stored[name] = drawn / math.sqrt(math.prod(size[1:]))
        return TuckerMatrix(Tucker(ranks), shape, **stored)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "TuckerMatrix":
        self.check(shape)
        remedy = "load the file that belongs to this model"
        if isinstance(self.ranks, str):
            expected = "ranks as they came out of a fit"
            raise ValueError(checks.fault("ranks", expected, self.ranks, "use the member's own structure"))
        ranks = self._given(shape)
        sizes = _sizes(ranks, shape)
        checks.tensor_names(tensors.keys(), list(sizes), str(self))
        for name, size in sizes.items():
            checks.shape(name, tensors[name].shape, size, remedy)
        return TuckerMatrix(Tucker(ranks), shape, **tensors)

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
        """One higher-order SVD orders all pairs of ranks, then the best of each size is fitted."""
        checks.weight(weight)
        shape = tuple(weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dense = weight.detach().to(dtype)
        outputs, channels, positions = _modes(shape)
        curve = []
        if positions == 1 and not isinstance(input_gram, BlockDiagonalGram):
            errors = errors_by_rank(dense.flatten(1), input_gram, output_gram).tolist()
            for structure in cls.candidates(shape):
                error = errors[structure._given(shape)[0] - 1]
                curve.append(structure.point(weight, error, geometry))
            return curve
        if positions == 1:
            return super().error_curve(
                weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry, inner=inner
            )
        for ranks in _best_pairs(dense, input_gram, output_gram):
            member = cls._fitted(dense, ranks, input_gram, output_gram, evaluations=_CURVE_EVALUATIONS)
            error = relative_error(weight, member.to_dense(), input_gram=input_gram, output_gram=output_gram)
            curve.append(cls(ranks).point(weight, error, geometry))
        return curve


# Evaluations of a weighted refinement within an error curve; the fit itself takes more.
_CURVE_EVALUATIONS = 12
# Growth of the parameters from one candidate of the error curve to the next.
_CURVE_RATIO = 1.2


def _modes(shape: Shape) -> tuple[int, int, int]:
    """Outputs, channels and kernel positions of a weight."""
    matrix_shape(shape)
    return shape[0], shape[1], math.prod(shape[2:])


def _sizes(ranks: Ranks, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The stored tensors' shapes by name."""
    outputs, channels, positions = _modes(shape)
    outer, inner = ranks
    if positions == 1:
        return {"left": (outputs, outer), "right": (inner, *shape[1:])}
    sizes: dict[str, tuple[int, ...]] = {}
    if outer < outputs:
        sizes["left"] = (outputs, outer)
    sizes["core"] = (outer, inner, *shape[2:])
    if inner < channels:
        sizes["right"] = (inner, channels)
    return sizes


def _parameters(ranks: Ranks, shape: Shape) -> int:
    return sum(math.prod(size) for size in _sizes(ranks, shape).values())


def _multiply_adds(ranks: Ranks, shape: Shape, geometry: Geometry | None) -> int:
    """Of the chain on images, or of the product with one patch, whose every position meets `right`."""
    counts = {name: math.prod(size) for name, size in _sizes(ranks, shape).items()}
    left, core, right = (counts.get(name, 0) for name in ("left", "core", "right"))
    kernel = shape[2:]
    if geometry is None:
        return left + core + right * (math.prod(kernel) if core else 1)
    inside = 1 if geometry.input_size is None else math.prod(geometry.input_size)
    if not core:  # the 1×1 convolution to the hidden channels takes the stride, and all that belongs to it
        inside = geometry.positions(kernel)
    shared = geometry.groups * (right * inside + core * geometry.positions(kernel))
    if not left:  # the core's outputs are the layer's, shared out over the groups
        shared = geometry.groups * right * inside + core * geometry.positions(kernel)
    return shared + left * geometry.output_positions(kernel)


def _orthonormal(left: Tensor, factors: Sequence[Tensor], ranks: Ranks, shape: Shape) -> dict[str, Tensor]:
    """The factors with orthonormal columns and rows, all scale in the core."""
    outer, inner = ranks
    basis, triangle = torch.linalg.qr(factors[-1].mT)
    tensors = {"right": basis.mT}
    if outer == shape[0]:
        core = left.reshape(outer, inner, -1)
    else:
        tensors["left"], scale = torch.linalg.qr(left)
        core = torch.einsum("ac,cbs->abs", scale, factors[0])
    tensors["core"] = torch.einsum("abs,cb->acs", core, triangle)
    return tensors


def _best_pairs(dense: Tensor, input_gram: Gram | None, output_gram: Gram | None) -> list[Ranks]:
    """For a ladder of sizes the pair of ranks of least error by the truncated higher-order SVD."""
    shape = tuple(dense.shape)
    outputs, channels, _ = _modes(shape)
    kernel = dense.double().flatten(2)
    if output_gram is not None:
        kernel = output_gram.whiten(kernel.flatten(1).mT).mT.reshape(kernel.shape)
    if input_gram is not None:
        gram = leading_gram(input_gram.average(), channels)
        kernel = gram.whiten(kernel.mT.flatten(0, 1)).reshape(outputs, -1, channels).mT
    errors = truncation_errors(higher_order_svd(kernel).core).flatten()
    pairs = [(outer, inner) for outer in range(1, outputs + 1) for inner in range(1, channels + 1)]
    sizes = torch.tensor([_parameters(pair, shape) for pair in pairs])
    order = sizes.argsort(stable=True)
    sizes, errors = sizes[order], errors[order]
    least, where = errors.cummin(0)  # the best pair of at most this size
    chosen: dict[Ranks, None] = {}
    for size in ladder(int(sizes[0]), math.prod(shape) - 1, ratio=_CURVE_RATIO):
        count = int(torch.searchsorted(sizes, size, right=True))
        if count:
            chosen[pairs[int(order[where[count - 1]])]] = None
    return list(chosen) or [pairs[int(order[0])]]


class TuckerMatrix(StructuredMatrix):
    """A member of `Tucker`.

    `left` (outputs, a), `core` (a, b, *kernel), `right` (b, channels), the outer ones absent where a mode is
    at its full rank; on a matrix and a 1×1 kernel `left` (outputs, rank) and `right` (rank, *inputs) alone.
    """

    left: Tensor | None
    core: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        structure: Tucker,
        shape: Sequence[int],
        left: Tensor | None = None,
        core: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        super().__init__(structure, shape)
        for name, tensor in {"left": left, "core": core, "right": right}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        if self.core is None:
            assert self.left is not None
            assert self.right is not None
            return low_rank_apply(x, self.left, self.right.flatten(1), bias)
        hidden = x
        if self.right is not None:
            patches = x.reshape(*x.shape[:-1], self.shape[1], self.inputs // self.shape[1])
            hidden = torch.matmul(self.right, patches).flatten(-2)
        core = self.core.flatten(1)
        if self.left is None:
            return nn.functional.linear(hidden, core, bias)
        return low_rank_apply(hidden, self.left, core, bias)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        groups = geometry.groups
        # Groups share all but the last factor: they join the batch up to there.
        hidden = channels_last(x if groups == 1 else x.reshape(x.shape[0] * groups, -1, *x.shape[2:]))
        if self.core is None:
            assert self.right is not None
            hidden = geometry.convolve(hidden, self.right, groups=1)
        else:
            hidden = hidden if self.right is None else pointwise(hidden, self.right)
            if self.left is None:
                hidden = hidden if groups == 1 else hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
                return geometry.convolve(hidden, self.core, bias)
            hidden = geometry.convolve(hidden, self.core, groups=1)
        assert self.left is not None
        hidden = hidden if groups == 1 else hidden.reshape(x.shape[0], -1, *hidden.shape[2:])
        return pointwise(hidden, self.left, bias, groups)

    def to_dense(self) -> Tensor:
        if self.core is None:
            assert self.left is not None
            assert self.right is not None
            return torch.tensordot(self.left, self.right, dims=1)
        dense = self.core if self.left is None else torch.tensordot(self.left, self.core, dims=1)
        return dense if self.right is None else torch.einsum("fb...,bc->fc...", dense, self.right)

    def rows(self, indices: Tensor) -> Tensor:
        if self.core is None:
            assert self.left is not None
            assert self.right is not None
            return self.left[indices] @ self.right.flatten(1)
        chosen = self.core[indices] if self.left is None else self.left[indices] @ self.core.flatten(1)
        chosen = chosen.reshape(*indices.shape, self.core.shape[1], -1)
        rows = chosen if self.right is None else torch.matmul(self.right.mT, chosen)
        return rows.flatten(-2)

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        outer = self.outputs if self.left is None else self.left.shape[1]
        inner = self.shape[1] if self.right is None else self.right.shape[0]
        return _multiply_adds((outer, inner), self.shape, geometry)

    def picture(self) -> list[Rectangle]:
        outer = self.outputs if self.left is None else self.left.shape[1]
        inner = self.shape[1] if self.right is None else self.right.shape[0]
        label = f"{outer}" if self.core is None else f"{outer}×{inner}"
        return [Rectangle(0, 0, self.outputs, self.inputs, "low_rank", label)]
