"""Reshaped: a structure imposed on another view of the weight's entries.

The weight is viewed as `axes`, permuted, and viewed as a matrix of `rows` rows; that matrix has the inner
structure. Low rank seen so is richer than low rank: with twice the rows, W (outputs, inputs) viewed row-major
as (2 · outputs, inputs / 2) is W = [L₁R  L₂R], whose own rank is up to twice that of R; with the axes
(m₁, m₂, n₁, n₂) in the order (0, 2, 1, 3) and m₁n₁ rows, rank r is a sum of r Kronecker products.

Where every axis belongs to the outputs or to the inputs, and to the rows or to the columns of the view, a
product of two factors L R is applied in two small products, without the dense weight:

    y[o_L, o_R] = Σ L[o_L, i_L, r] (Σ R[r, o_R, i_R] x[i_L, i_R]).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from weft import checks
from weft.numerics.gram import DenseGram, squared_error
from weft.structures.base import (
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    check_nesting,
    matrix_multiply_adds,
    matrix_shape,
    refine_values,
)

# The widest view whose metric is formed, to start a weighted fit from.
_WIDEST_METRIC = 4096


@dataclass(frozen=True)
class Reshaped(Structure):
    """Matrices whose entries, viewed in another shape, have a structure.

    Args:
        of: the structure of the view.
        rows: of the view; divides the number of the weight's entries.
        axes: the sizes that the weight is first viewed as, row-major; the weight's own entries in a row where
            None.
        order: how the axes are permuted; as they are where None.

    Raises:
        TypeError: `of` is no structure, or a size no whole number.
        ValueError: a size is below 1, the order no permutation of the axes, or the nesting too deep.

    Examples:
        >>> from weft.structures.low_rank import LowRank
        >>> Reshaped(LowRank(rank=10), rows=2000).parameter_count((1000, 512))
        22560
    """

    source: ClassVar[str] = (
        "Idelbayev and Carreira-Perpinan 2021 (reshapes); Van Loan and Pitsianis 1993 (Kronecker order)"
    )

    of: Structure
    rows: int
    axes: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.of, Structure):
            remedy = "pass e.g. LowRank(rank=8)"
            raise TypeError(checks.fault("of", "a structure", repr(self.of), remedy))
        checks.integer_between("rows", self.rows, 1, None)
        for size in self.axes or ():
            checks.integer_between("axes", size, 1, None)
        count = len(self.axes or ())
        if self.order is not None and sorted(self.order) != list(range(count)):
            expected = f"a permutation of the {count} axes"
            raise ValueError(checks.fault("order", expected, self.order, "name every axis once, from 0 on"))
        check_nesting(self)

    # -- the view

    def view_shape(self, shape: Shape) -> tuple[int, int]:
        """The shape of the matrix that has the structure.

        Args:
            shape: the weight's shape.

        Returns:
            (rows, entries / rows).
        """
        return self.rows, math.prod(shape) // self.rows

    def view(self, weight: Tensor) -> Tensor:
        """The weight as the matrix that has the structure.

        Args:
            weight: any shape with as many entries.

        Returns:
            Shape (rows, entries / rows).
        """
        axes, order = self._axes(weight.numel())
        return weight.reshape(axes).permute(order).reshape(self.rows, -1)

    def undo(self, matrix: Tensor, shape: Shape) -> Tensor:
        """Undoes `view`.

        Args:
            matrix: shape (rows, entries / rows).
            shape: the weight's shape.

        Returns:
            The weight.
        """
        axes, order = self._axes(matrix.numel())
        back = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([axes[axis] for axis in order]).permute(back).reshape(shape)

    def _axes(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        axes = (count,) if self.axes is None else self.axes
        return axes, tuple(range(len(axes))) if self.order is None else self.order

    # -- sizes

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, inputs = matrix_shape(shape)
        sizes = [outputs * factor for factor in (2, 4) if inputs % factor == 0]
        sizes += [outputs // 2] if outputs % 2 == 0 else []
        found = []
        for of, rows in itertools.product(inner, sizes):
            # Entry by entry nothing changes in another shape: only products of matrices gain.
            view = (rows, math.prod(shape) // rows)
            if len(of.chain(view)) < 2:
                continue
            candidate = cls(of, rows)
            try:
                candidate.check(shape)
            except ValueError:
                continue
            if (candidate.parameter_count(shape) or 0) < math.prod(shape):
                found.append(candidate)
        yield from sorted(found, key=lambda one: one.parameter_count(shape) or 0)

    def parameter_count(self, shape: Shape) -> int | None:
        return self.of.parameter_count(self.view_shape(shape))

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        view = self.view_shape(shape)
        inner = self.of.multiply_adds(view)
        if inner is None:
            return None
        _, own = _cheapest(self._routing(shape), _rank(self.of, view), inner, shape)
        return matrix_multiply_adds(own, shape, geometry)

    def check(self, shape: Shape) -> None:
        count = math.prod(matrix_shape(shape))
        owner = f"the entries of a {tuple(shape)} weight"
        if self.axes is not None and math.prod(self.axes) != count:
            got = f"{self.axes} with {math.prod(self.axes)}"
            remedy = "factorise the weight's own shape"
            raise ValueError(checks.fault("axes", f"of {count} entries together, {owner}", got, remedy))
        if count % self.rows:
            expected = f"a divisor of {count}, {owner}"
            remedy = f"use a multiple or a divisor of {shape[0]}"
            raise ValueError(checks.fault("rows", expected, self.rows, remedy))
        self.of.check(self.view_shape(shape))

    def _routing(self, shape: Shape) -> "_Routing | None":
        axes, order = self._axes(math.prod(shape))
        return _Routing.of(axes, order, matrix_shape(shape)[0], self.rows)

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "ReshapedMatrix":
        target = self.view(weight)
        given = start.of if isinstance(start, ReshapedMatrix) and start.structure == self else None
        fits = [self.of.fit(target, start=given, generator=generator)]
        if input_gram is None and output_gram is None:
            return ReshapedMatrix(self, weight.shape, fits[0])
        # The metric does not factor in the view: what comes nearest gives a start, refined in the true one.
        metrics = self._metrics(weight.shape, input_gram, output_gram)
        if metrics is not None:
            columns, rows = metrics
            fits.append(self.of.fit(target, input_gram=columns, output_gram=rows, generator=generator))
        if given is not None:
            fits.append(given)
        members = [ReshapedMatrix(self, weight.shape, fit) for fit in fits]

        def error(member: ReshapedMatrix) -> float:
            lost = (weight - member.to_dense()).flatten(1)
            return float(squared_error(lost, input_gram, output_gram))

        best = min(members, key=error)
        refined = self.from_tensors(
            weight.shape, {name: tensor.clone() for name, tensor in best.stored().items()}
        )
        refine_values(refined, weight, input_gram=input_gram, output_gram=output_gram)
        return min(best, refined, key=error)

    def _metrics(
        self, shape: Shape, input_gram: Gram | None, output_gram: Gram | None
    ) -> tuple[Gram, Gram] | None:
        """Metrics on the view's columns and rows: of each the part that its own axes have in Ĝ and H."""
        routing = self._routing(shape)
        if routing is None or max(self.view_shape(shape)) > _WIDEST_METRIC:
            return None
        outputs, inputs = matrix_shape(shape)
        identity = torch.eye(inputs, dtype=torch.float64)
        columns = identity if input_gram is None else input_gram.dense()
        identity = torch.eye(outputs, dtype=torch.float64)
        rows = identity if output_gram is None else output_gram.dense()
        whole = float(columns.diagonal().mean() * rows.diagonal().mean()) or 1.0
        right = routing.metric(columns, rows, left=False)
        left = routing.metric(columns, rows, left=True) / whole
        return DenseGram(right, shrinkage=0.0), DenseGram(left, shrinkage=0.0)

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "ReshapedMatrix":
        self.check(shape)
        view = self.view_shape(shape)
        member = self.of.initialise(view, dtype=dtype, generator=generator)
        # The inner member's entries suit its own number of columns, not the weight's.
        factor = math.sqrt(view[1] / matrix_shape(shape)[1])
        with torch.no_grad():
            for name in list(self.of.chain(view))[-1:]:
                member.get_parameter(name).mul_(factor)
        return ReshapedMatrix(self, shape, member)

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "ReshapedMatrix":
        self.check(shape)
        surplus = [name for name in tensors if not name.startswith("of.")]
        own = {name.removeprefix("of."): tensor for name, tensor in tensors.items() if name not in surplus}
        if surplus:
            checks.tensor_names(tensors.keys(), [f"of.{name}" for name in own], str(self))
        return ReshapedMatrix(self, shape, self.of.from_tensors(self.view_shape(shape), own))


# ------------------------------------------------------------------------------------------------------------
# The cheap route


@dataclass(frozen=True)
class _Routing:
    """Axes that belong each to the outputs or the inputs, and to the rows or the columns of the view.

    Attributes:
        sizes: of the weight's axes, outputs first, then inputs.
        order: the axes as the view has them, rows first.
        outputs: how many of the axes are outputs.
        left: how many of the ordered axes are rows of the view.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    outputs: int
    left: int

    @classmethod
    def of(cls, axes: Sequence[int], order: Sequence[int], outputs: int, rows: int) -> "_Routing | None":
        """Splits axes where outputs meet inputs and rows meet columns; None where that is impossible."""
        sizes, order = list(axes), list(order)
        count = _split(sizes, order, range(len(sizes)), outputs)
        if count is None:
            return None
        before = len(sizes)
        left = _split(sizes, order, tuple(order), rows)
        if left is None:
            return None
        if len(sizes) > before:  # the split axis may be one of the outputs
            count = next(index for index in range(len(sizes) + 1) if math.prod(sizes[:index]) == outputs)
        return cls(tuple(sizes), tuple(order), count, left)

    def group(self, *, output: bool, left: bool) -> list[int]:
        """The axes that are outputs or inputs, rows or columns of the view, as the weight orders them."""
        chosen = self.order[: self.left] if left else self.order[self.left :]
        return sorted(axis for axis in chosen if (axis < self.outputs) == output)

    def size(self, *, output: bool, left: bool) -> int:
        return math.prod([self.sizes[axis] for axis in self.group(output=output, left=left)])

    def side(self, tensor: Tensor, *, left: bool) -> Tensor:
        """A factor (side, rank) of the view's rows or columns as (outputs, inputs, rank) of that side."""
        own = self.order[: self.left] if left else self.order[self.left :]
        wanted = [*self.group(output=True, left=left), *self.group(output=False, left=left)]
        places = [own.index(axis) for axis in wanted]
        spread = tensor.reshape([*(self.sizes[axis] for axis in own), tensor.shape[1]])
        spread = spread.permute([*places, len(own)])
        sizes = [self.size(output=output, left=left) for output in (True, False)]
        return spread.reshape([*sizes, tensor.shape[1]])

    def metric(self, columns: Tensor, rows: Tensor, *, left: bool) -> Tensor:
        """H and Ĝ on one side's axes, averaged over the other's: the metric of the view's rows or columns."""
        parts = []
        for matrix, output in ((rows, True), (columns, False)):
            first = 0 if output else self.outputs
            axes = range(first, self.outputs if output else len(self.sizes))
            kept = self.group(output=output, left=left)
            gone = self.group(output=output, left=not left)
            places = [axis - first for axis in (*kept, *gone)]
            sizes = [self.sizes[axis] for axis in axes]
            size = self.size(output=output, left=left)
            both = [*places, *(place + len(sizes) for place in places)]
            spread = matrix.reshape([*sizes, *sizes]).permute(both)
            spread = spread.reshape(size, len(matrix) // size, size, len(matrix) // size)
            parts.append(spread.diagonal(dim1=1, dim2=3).mean(-1))
        # The side's rows run over its axes in the view's order.
        own = self.order[: self.left] if left else self.order[self.left :]
        wanted = [*self.group(output=True, left=left), *self.group(output=False, left=left)]
        sizes = [self.sizes[axis] for axis in wanted]
        places = [wanted.index(axis) for axis in own]
        both = [*places, *(place + len(sizes) for place in places)]
        whole = torch.kron(*parts)
        return whole.reshape([*sizes, *sizes]).permute(both).reshape(whole.shape).contiguous()


def _split(sizes: list[int], order: list[int], along: Sequence[int], boundary: int) -> int | None:
    """Splits an axis, in place, so that the first axes along an order hold `boundary` entries; their number.

    Returns:
        How many axes come before the boundary; None where no axis can be split there.
    """
    product = 1
    for position, axis in enumerate(along):
        if product == boundary:
            return position
        if product * sizes[axis] > boundary:
            if boundary % product or sizes[axis] % (boundary // product):
                return None
            outer = boundary // product
            sizes[axis : axis + 1] = [outer, sizes[axis] // outer]
            place = order.index(axis)
            shifted = [other + (other > axis) for other in order]
            order[:] = [*shifted[: place + 1], axis + 1, *shifted[place + 1 :]]
            return position + 1
        product *= sizes[axis]
    return len(along)


def _rank(of: Structure, view: Shape) -> int | None:
    """The inner size of a product of two factors; None for every other structure."""
    chain = list(of.chain(view).values())
    return math.prod(chain[0][1:]) if len(chain) == 2 else None


def _cheapest(routing: _Routing | None, rank: int | None, inner: int, shape: Shape) -> tuple[str, int]:
    """The cheapest route and its multiply-adds per vector.

    "right", "left": two products, that factor first; "pieces": the inner member applied to pieces of the
    vector; "dense": the weight, formed once.

    Returns:
        The route's name and its multiply-adds.
    """
    outputs, inputs = matrix_shape(shape)
    costs = {"dense": outputs * inputs}
    if routing is not None:
        pieces = routing.size(output=True, left=False) * routing.size(output=False, left=True)
        costs["pieces"] = pieces * inner
    if routing is not None and rank is not None:
        for name in ("right", "left"):
            first = routing.size(output=True, left=name == "left")
            open_inputs = routing.size(output=False, left=name == "right")
            costs[name] = rank * (inputs * first + outputs * open_inputs)
    route = min(costs, key=lambda name: (costs[name], name != "right"))
    return route, costs[route]


class ReshapedMatrix(StructuredMatrix):
    """A member of `Reshaped`: stores the inner member's tensors, named "of." and their own names."""

    def __init__(self, structure: Reshaped, shape: Shape, of: StructuredMatrix) -> None:
        super().__init__(structure, shape)
        self.of = of
        self.undo, self.view = structure.undo, structure.view_shape(shape)
        self.routing = structure._routing(self.shape)
        self.rank = _rank(structure.of, self.view)
        self.factor_names = list(structure.of.chain(self.view)) if self.rank is not None else []
        self.route, self.own_multiply_adds = _cheapest(
            self.routing, self.rank, of.multiply_adds(), self.shape
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        checks.last_dimension(x, self.inputs)
        if self.route == "dense" or self.routing is None:
            return F.linear(x, self.derived("dense", self._matrix), bias)
        batch = x.shape[:-1]
        rows = x.reshape(-1, self.inputs)
        if self.route == "pieces":
            y = self._by_pieces(rows, self.routing)
        else:
            y = self._by_factors(rows, self.routing, first_is_left=self.route == "left")
        y = y.reshape(*batch, self.outputs)
        return y if bias is None else y + bias

    def _matrix(self) -> Tensor:
        return self.to_dense().flatten(1)

    def _by_factors(self, x: Tensor, routing: _Routing, *, first_is_left: bool) -> Tensor:
        """The product with one factor, then with the other; (batch, inputs) -> (batch, outputs)."""
        first, second = self.derived(f"factors {first_is_left}", lambda: self._factors(first_is_left))
        hidden = F.linear(self._arrange(x, routing, near_is_left=first_is_left), first)
        near_outputs = routing.size(output=True, left=first_is_left)
        y = second @ hidden.reshape(x.shape[0], second.shape[1], near_outputs)
        return self._restore(y, routing, near_is_left=first_is_left)

    def _factors(self, first_is_left: bool) -> tuple[Tensor, Tensor]:
        """The first factor (rank · its outputs, its inputs), the second (its outputs, its inputs · rank)."""
        assert self.routing is not None
        left, right = (getattr(self.of, name).flatten(1) for name in self.factor_names)
        sides = (self.routing.side(right.T, left=False), self.routing.side(left, left=True))
        near, far = reversed(sides) if first_is_left else sides
        return near.permute(2, 0, 1).flatten(0, 1), far.flatten(1)

    def _arrange(self, x: Tensor, routing: _Routing, *, near_is_left: bool) -> Tensor:
        """Inputs (batch, inputs) as (batch, far inputs, near inputs)."""
        sizes = routing.sizes[routing.outputs :]
        far = routing.group(output=False, left=not near_is_left)
        near = routing.group(output=False, left=near_is_left)
        places = [1 + axis - routing.outputs for axis in (*far, *near)]
        size = routing.size(output=False, left=not near_is_left)
        spread = x.reshape([x.shape[0], *sizes]).permute([0, *places])
        return spread.reshape(x.shape[0], size, self.inputs // size)

    def _restore(self, y: Tensor, routing: _Routing, *, near_is_left: bool) -> Tensor:
        """Outputs (batch, far outputs, near outputs) as (batch, outputs)."""
        far = routing.group(output=True, left=not near_is_left)
        near = routing.group(output=True, left=near_is_left)
        axes = [*far, *near]
        back = [1 + axes.index(axis) for axis in range(routing.outputs)]
        sizes = [routing.sizes[axis] for axis in axes]
        return y.reshape([y.shape[0], *sizes]).permute([0, *back]).reshape(y.shape[0], self.outputs)

    def _by_pieces(self, x: Tensor, routing: _Routing) -> Tensor:
        """The inner member applied to every piece of x, once for every output that the columns hold."""
        pieces = self._arrange(x, routing, near_is_left=False)
        near_outputs = routing.size(output=True, left=False)
        unit = torch.eye(near_outputs, dtype=x.dtype, device=x.device)
        spread = torch.einsum("bfn,oe->bfoen", pieces, unit)  # a piece for each output e, zero for others
        own = routing.order[routing.left :]
        wanted = [*routing.group(output=True, left=False), *routing.group(output=False, left=False)]
        sizes = [routing.sizes[axis] for axis in wanted]
        places = [3 + wanted.index(axis) for axis in own]
        batch, far = pieces.shape[:2]
        spread = spread.reshape(batch, far, near_outputs, *sizes).permute(0, 1, 2, *places)
        got = self.of(spread.reshape(batch, far, near_outputs, self.view[1]))
        got = routing.side(
            got.reshape(batch * far * near_outputs, self.view[0]).T, left=True
        )  # (far outputs, far inputs, pieces)
        got = got.reshape(got.shape[0], far, batch, far, near_outputs)
        y = got.diagonal(dim1=1, dim2=3).sum(-1)  # each piece meets its own inputs only
        return self._restore(y.permute(1, 0, 2), routing, near_is_left=False)

    def to_dense(self) -> Tensor:
        return self.undo(self.of.to_dense(), self.shape)

    def rows(self, indices: Tensor) -> Tensor:
        if self.routing is None:
            return self.derived("dense", self._matrix)[indices]
        routing, chosen = self.routing, indices.reshape(-1)
        left_outputs = self._places(chosen, routing, left=True)
        right_outputs = self._places(chosen, routing, left=False)
        table = torch.arange(self.view[0], device=chosen.device)[:, None]
        mine = routing.side(table, left=True)[left_outputs, :, 0]  # (chosen, far inputs) rows of the view
        picked = self.of.rows(mine)  # (chosen, far inputs, columns of the view)
        count, far = mine.shape
        spread = routing.side(picked.reshape(-1, self.view[1]).T, left=False)
        spread = spread.reshape(*spread.shape[:2], count, far)
        picked = spread[right_outputs, :, torch.arange(count, device=chosen.device)]  # (chosen, near, far)
        axes = [*routing.group(output=False, left=True), *routing.group(output=False, left=False)]
        sizes = [routing.sizes[axis] for axis in axes]
        back = [1 + axes.index(axis) for axis in range(routing.outputs, len(routing.sizes))]
        picked = picked.transpose(1, 2).reshape([count, *sizes]).permute([0, *back])
        return picked.reshape(*indices.shape, self.inputs)

    def _places(self, chosen: Tensor, routing: _Routing, *, left: bool) -> Tensor:
        """Where the chosen outputs stand among the outputs of one side."""
        sizes = routing.sizes[: routing.outputs]
        place = torch.zeros_like(chosen)
        for axis in routing.group(output=True, left=left):
            step = math.prod(sizes[axis + 1 :])
            place = place * sizes[axis] + (chosen // step) % sizes[axis]
        return place

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        return matrix_multiply_adds(self.own_multiply_adds, self.shape, geometry)

    def parameter_count(self) -> int:
        return self.of.parameter_count()

    def relax(self) -> StructuredMatrix:
        return self._exchanged(self.of.relax())

    def harden(self) -> StructuredMatrix:
        return self._exchanged(self.of.harden())

    def _exchanged(self, of: StructuredMatrix) -> "ReshapedMatrix":
        structure = self.structure
        if of is self.of or not isinstance(structure, Reshaped):
            return self
        return ReshapedMatrix(structure, self.shape, of)

    def picture(self) -> list[Rectangle]:
        kind = self.of.picture()[0].kind
        label = f"{self.view[0]}×{self.view[1]}: {self.rank or self.of.structure}"
        return [Rectangle(0, 0, self.outputs, self.inputs, kind, label)]
