"""Divided rows: the rows in parts by importance, each part with a structure of its own.

Most lookups in a table of tokens ask for few of its rows, and errors of outputs weigh differently. The rows
are ordered by what their errors cost, H_ii ‖w_i‖² in the metric of the inputs, and divided by shares: the
most important rows take the first part's structure, with more bits or a larger rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from weft import checks
from weft.kernels.quantized import pack, row_bytes, unpack
from weft.numerics.gram import BlockDiagonalGram, DiagonalGram, row_sizes, squared_error
from weft.structures.base import (
    Candidate,
    Cost,
    Geometry,
    Gram,
    Rectangle,
    Shape,
    Structure,
    StructuredMatrix,
    check_nesting,
    matrix_shape,
)

# The shares of important rows that are tried.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
# Fewer rows than this are not worth dividing: which part a row is in costs more than what is gained.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class DividedRows(Structure):
    """Matrices whose rows are in parts, each part a member of its own family.

    Args:
        parts: the parts' structures, the most important rows first.
        shares: the shares of the rows in all parts but the last, which takes the rest.

    Raises:
        TypeError: a part is no structure.
        ValueError: there is no part, not one share less than parts, a share out of bounds, or wrappers are
            nested too deeply.

    Examples:
        >>> from weft.structures.low_rank import LowRank
        >>> DividedRows((LowRank(20), LowRank(4)), (0.1,)).parameter_count((1000, 100))
        8000
    """

    source: ClassVar[str] = (
        "Chen et al. 2018 (GroupReduce: parts of a vocabulary by frequency); Baevski and Auli 2019"
    )

    parts: tuple[Structure, ...]
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            remedy = "write e.g. DividedRows((LowRank(20), LowRank(4)), (0.1,))"
            raise ValueError(checks.fault("parts", "a tuple of structures, not empty", self.parts, remedy))
        for part in self.parts:
            if not isinstance(part, Structure):
                raise TypeError(checks.fault("parts", "structures", repr(part), "pass e.g. LowRank(rank=8)"))
        if not isinstance(self.shares, tuple) or len(self.shares) != len(self.parts) - 1:
            expected = f"a tuple of {len(self.parts) - 1}, one for every part but the last"
            raise ValueError(checks.fault("shares", expected, self.shares, "the last part takes the rest"))
        for share in self.shares:
            checks.share("shares", share)
        if not sum(self.shares) < 1:
            expected = "of a sum below 1"
            raise ValueError(
                checks.fault("shares", expected, sum(self.shares), "leave rows to the last part")
            )
        check_nesting(self)

    def __str__(self) -> str:
        named = [f"{share:.3g} {part}" for share, part in zip(self.shares, self.parts, strict=False)]
        return f"DividedRows({', '.join([*named, str(self.parts[-1])])})"

    # -- sizes

    @classmethod
    def candidates(cls, shape: Shape, inner: Iterable[Structure] = ()) -> Iterator[Self]:
        outputs, inputs = matrix_shape(shape)
        if outputs < _LEAST_ROWS:
            return
        size = {
            structure: structure.predicted_cost((outputs, inputs), 4).bytes
            for structure in inner
            if structure.rows_apart
        }
        for cheap, dear in combinations(sorted(size, key=lambda one: size[one]), 2):
            if type(cheap) is type(dear) and size[cheap] < size[dear]:
                yield from (cls((dear, cheap), (share,)) for share in _SHARES)

    def counts(self, outputs: int) -> tuple[int, ...]:
        """How many rows every part has.

        Args:
            outputs: rows of the weight.

        Returns:
            At least one each, where there are as many rows as parts.
        """
        counts: list[int] = []
        for index, share in enumerate(self.shares):
            left = outputs - sum(counts) - (len(self.shares) - index)  # one at least for every later part
            counts.append(max(1, min(left, round(share * outputs))))
        return (*counts, outputs - sum(counts))

    def _with_shapes(self, shape: Shape) -> list[tuple[Structure, Shape]]:
        """The parts' structures, each with the shape of its rows."""
        counts = self.counts(shape[0])
        return [(part, (count, *shape[1:])) for part, count in zip(self.parts, counts, strict=True)]

    def parameter_count(self, shape: Shape) -> int | None:
        return _total([part.parameter_count(own) for part, own in self._with_shapes(shape)])

    def multiply_adds(self, shape: Shape, geometry: Geometry | None = None) -> int | None:
        if geometry is not None and geometry.groups > 1:
            return math.prod(shape) * geometry.positions(shape[2:])
        return _total([part.multiply_adds(own, geometry) for part, own in self._with_shapes(shape)])

    def predicted_cost(self, shape: Shape, element_size: int, geometry: Geometry | None = None) -> Cost:
        total = Cost(bytes=self._label_bytes(shape[0]))
        for part, own in self._with_shapes(shape):
            total = total + part.predicted_cost(own, element_size, geometry)
        if geometry is not None and geometry.groups > 1:
            total = replace(total, multiply_adds=math.prod(shape) * geometry.positions(shape[2:]))
        return total

    @property
    def _label_bits(self) -> int:
        return (len(self.parts) - 1).bit_length()

    def _label_bytes(self, outputs: int) -> int:
        return row_bytes(outputs, self._label_bits) if self._label_bits else 0

    def refusal(self, shape: Shape, geometry: Geometry | None = None) -> str | None:
        reasons = (part.refusal(own, geometry) for part, own in self._with_shapes(shape))
        return next((reason for reason in reasons if reason is not None), None)

    def check(self, shape: Shape) -> None:
        outputs, _ = matrix_shape(shape)
        if outputs < len(self.parts):
            expected = f"at most {outputs} for a {tuple(shape)} weight"
            raise ValueError(checks.fault("parts", expected, len(self.parts), "take fewer parts"))
        for part, own in self._with_shapes(shape):
            part.check(own)

    # -- members

    def _fit(
        self,
        weight: Tensor,
        *,
        input_gram: Gram | None,
        output_gram: Gram | None,
        start: StructuredMatrix | None,
        generator: torch.Generator | None,
    ) -> "DividedRowsMatrix":
        fits = [self._divide(weight, None, None, generator)]
        if input_gram is not None or output_gram is not None:
            fits.append(self._divide(weight, input_gram, output_gram, generator))

        def error(fit: StructuredMatrix) -> float:
            return float(squared_error((weight - fit.to_dense()).flatten(1), input_gram, output_gram))

        return min(fits, key=error)

    def _divide(
        self,
        weight: Tensor,
        input_gram: Gram | None,
        output_gram: Gram | None,
        generator: torch.Generator | None,
    ) -> "DividedRowsMatrix":
        """Every part fitted to its rows; where H couples rows, to what the parts before it have lost, too."""
        importance = _importance(weight.flatten(1), input_gram, output_gram)
        owners = _owners(importance, self.counts(weight.shape[0]))
        inner = input_gram.average() if isinstance(input_gram, BlockDiagonalGram) else input_gram
        coupling = None
        if output_gram is not None and not isinstance(output_gram, DiagonalGram):
            coupling = output_gram.dense().to(weight)
        lost, members = torch.zeros_like(weight).flatten(1), []
        for index, part in enumerate(self.parts):
            own = (owners == index).nonzero()[:, 0]
            target = weight[own]
            if coupling is not None and index:
                known = (owners < index).nonzero()[:, 0]
                pull = torch.linalg.solve(coupling[own][:, own], coupling[own][:, known] @ lost[known])
                target = target + pull.reshape(target.shape)
            member = part.fit(
                target,
                input_gram=inner,
                output_gram=None if output_gram is None else output_gram.restrict(own),
                generator=generator,
            )
            lost[own] = (weight[own] - member.to_dense()).flatten(1)
            members.append(member)
        return DividedRowsMatrix(self, weight.shape, members, self._labels(owners))

    def _labels(self, owners: Tensor) -> Tensor | None:
        return pack(owners[None], self._label_bits) if self._label_bits else None

    def initialise(
        self, shape: Shape, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> "DividedRowsMatrix":
        self.check(shape)
        generator = generator or torch.Generator().manual_seed(0)
        owners = _owners(torch.rand(shape[0], generator=generator), self.counts(shape[0]))
        members = [
            part.initialise(own, dtype=dtype, generator=generator) for part, own in self._with_shapes(shape)
        ]
        return DividedRowsMatrix(self, shape, members, self._labels(owners))

    def from_tensors(self, shape: Shape, tensors: Mapping[str, Tensor]) -> "DividedRowsMatrix":
        self.check(shape)
        own: list[dict[str, Tensor]] = [{} for _ in self.parts]
        surplus = []
        labels = None
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if name == "labels" and self._label_bits:
                labels = tensor
            elif group == "parts" and index.isdecimal() and int(index) < len(own) and inner:
                own[int(index)][inner] = tensor
            else:
                surplus.append(name)
        known = [name for name in tensors if name not in surplus]
        needed = ["labels"] if self._label_bits and labels is None else []
        checks.tensor_names(tensors.keys(), [*known, *needed], str(self))
        members = [
            part.from_tensors(part_shape, stored)
            for (part, part_shape), stored in zip(self._with_shapes(shape), own, strict=True)
        ]
        if labels is not None:
            remedy = "load the file that belongs to this model"
            checks.shape("labels", labels.shape, (1, self._label_bytes(shape[0])), remedy)
            found = unpack(labels, self._label_bits, shape[0])[0].long()
            counts = tuple(torch.bincount(found, minlength=len(self.parts)).tolist())
            if counts != self.counts(shape[0]):
                expected = f"parts of {self.counts(shape[0])} rows"
                raise ValueError(checks.fault("labels", expected, counts, remedy))
        return DividedRowsMatrix(self, shape, members, labels)

    # -- curves

    @classmethod
    def points(
        cls,
        structures: Sequence[Structure],
        weight: Tensor,
        *,
        input_gram: Gram | None = None,
        output_gram: Gram | None = None,
        geometry: Geometry | None = None,
    ) -> list[Candidate]:
        """All divisions of the rows among sizes from every row's error in each of them."""
        checks.weight(weight)
        wanted = [structure for structure in structures if isinstance(structure, cls)]
        if any(not part.rows_apart for structure in wanted for part in structure.parts):
            return super().points(
                structures, weight, input_gram=input_gram, output_gram=output_gram, geometry=geometry
            )
        sizes = list(dict.fromkeys(part for structure in wanted for part in structure.parts))
        # All of one family come from one pass.
        profiles = {}
        for family in dict.fromkeys(type(size) for size in sizes):
            own = [size for size in sizes if type(size) is family]
            profile = family.row_profile(own, weight, input_gram=input_gram, output_gram=output_gram)
            profiles |= dict.fromkeys(own, profile)
        importance = _importance(weight.flatten(1), input_gram, output_gram)
        whole = float(squared_error(weight.detach().double().flatten(1), input_gram, output_gram))
        owners: dict[tuple[int, ...], Tensor] = {}
        curve = []
        for structure in wanted:
            counts = structure.counts(weight.shape[0])
            if counts not in owners:
                owners[counts] = _owners(importance, counts)
            lost = 0.0
            for index, part in enumerate(structure.parts):
                profile = profiles[part]
                own = owners[counts][profile.rows] == index
                lost += float(profile.factors[own] @ profile.errors[part][own])
            curve.append(structure.point(weight, math.sqrt(lost / whole) if whole > 0 else 0.0, geometry))
        return curve


def _importance(matrix: Tensor, input_gram: Gram | None, output_gram: Gram | None) -> Tensor:
    """H_ii ‖w_i‖² in the metric of the inputs, shape (rows,)."""
    sizes = row_sizes(matrix, input_gram)
    return sizes if output_gram is None else sizes * output_gram.diagonal().to(sizes)


def _owners(importance: Tensor, counts: Sequence[int]) -> Tensor:
    """The part that every row belongs to, shape (rows,), int64."""
    order = importance.argsort(descending=True, stable=True)
    owners = torch.empty(len(order), dtype=torch.int64, device=order.device)
    owners[order] = torch.repeat_interleave(torch.tensor(counts, device=order.device))
    return owners


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


class DividedRowsMatrix(StructuredMatrix):
    """Stores the parts' tensors, and of every row the number of its part as packed `labels`.

    A part's rows are in the order in which they stand in the whole.
    """

    labels: Tensor | None
    _owners: Tensor
    _places: Tensor
    _within: Tensor

    def __init__(
        self,
        structure: DividedRows,
        shape: Shape,
        parts: Sequence[StructuredMatrix],
        labels: Tensor | None = None,
    ) -> None:
        # What came out may have other sizes than what was asked for, as a tolerance becomes ranks.
        super().__init__(replace(structure, parts=tuple(part.structure for part in parts)), shape)
        self.kind = structure
        self.parts = nn.ModuleList(parts)
        self.register_buffer("labels", labels)
        owners = torch.zeros(self.outputs, dtype=torch.int64)
        if labels is not None:
            owners = unpack(labels, structure._label_bits, self.outputs)[0].long()
        order = owners.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(self.outputs, device=order.device)
        counts = torch.bincount(owners, minlength=len(parts))
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        self.register_buffer("_owners", owners, persistent=False)
        # Where a row stands among the parts one after the other, and within its own.
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("_within", places - first[owners], persistent=False)

    def members(self) -> list[StructuredMatrix]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, StructuredMatrix)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.members()], -1).index_select(-1, self._places)

    def convolve(self, x: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
        if geometry.groups > 1:  # a part's rows are spread over the groups
            return geometry.convolve(x, self.derived("kernel", self.to_dense), bias)
        channels = x.ndim - len(self.shape) + 1
        y = torch.cat([part.convolve(x, geometry) for part in self.members()], channels)
        y = y.index_select(channels, self._places)
        return y if bias is None else y + bias.reshape(-1, *(1,) * (len(self.shape) - 2))

    def to_dense(self) -> Tensor:
        dense = torch.empty(self.shape, dtype=self._dtype, device=self._places.device)
        for index, part in enumerate(self.members()):
            dense = dense.index_copy(0, (self._owners == index).nonzero()[:, 0], part.to_dense())
        return dense

    @property
    def _dtype(self) -> torch.dtype:
        return next(tensor.dtype for tensor in self.state_dict().values() if tensor.is_floating_point())

    def rows(self, indices: Tensor) -> Tensor:
        owners, within = self._owners[indices], self._within[indices]
        found = None
        for index, part in enumerate(self.members()):
            picked = part.rows(within.clamp(max=part.outputs - 1))
            mine = (owners == index).unsqueeze(-1)
            found = picked if found is None else torch.where(mine, picked, found)
        assert found is not None  # noqa: S101  (there is at least one part)
        return found

    def multiply_adds(self, geometry: Geometry | None = None) -> int:
        if geometry is not None and geometry.groups > 1:
            return math.prod(self.shape) * geometry.positions(self.shape[2:])
        return sum(part.multiply_adds(geometry) for part in self.members())

    def parameter_count(self) -> int:
        return sum(part.parameter_count() for part in self.members())

    def relax(self) -> StructuredMatrix:
        relaxed = [part.relax() for part in self.members()]
        if all(new is old for new, old in zip(relaxed, self.members(), strict=True)):
            return self
        return RelaxedRowsMatrix(self.kind, self.shape, relaxed, self.labels)

    def picture(self) -> list[Rectangle]:
        """The parts below each other, as if the rows were sorted."""
        blocks, first = [], 0
        for part in self.members():
            blocks += [replace(block, row=block.row + first) for block in part.picture()]
            first += part.outputs
        return blocks


class RelaxedRowsMatrix(DividedRowsMatrix):
    """Divided rows in training, where a part does not train as it is."""

    def harden(self) -> DividedRowsMatrix:
        hard = [part.harden() for part in self.members()]
        return DividedRowsMatrix(self.kind, self.shape, hard, self.labels).train(self.training)
